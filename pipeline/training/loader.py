"""What every optimizer step trains on: the global batch, cut into the passes of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.adapters.layout import RowLayout, reference_of, training_layout, weighed, weightless
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import TrainConfig
from pipeline.data.cache import has_several_answers, lengths_of
from pipeline.data.encode import Encoded
from pipeline.data.packing import PackedRows
from pipeline.data.sampler import global_batch_places, process_share, token_chunks
from pipeline.errors import ConfigError

SEVERAL_ANSWERS = "rows with label_probabilities have several answers, of which a packed row would not tell the weights"
"""Why they are not packed."""


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one pass and how they lie along the member axis."""

    examples: list[Encoded]
    layout: RowLayout

    @property
    def places(self) -> int:
        """Tokens that the pass computes, padding and fillers included."""
        return len(self.layout.source) * max(len(example.input_ids) for example in self.examples)

    @property
    def tokens(self) -> int:
        """Those of them that count."""
        rows = zip(self.layout.source, self.layout.weights, strict=True)
        return sum(len(self.examples[index].input_ids) for index, weight in rows if weight > 0)


@dataclass(frozen=True)
class StepBatch:
    """This process's part of a global batch; every process has equally many passes."""

    micros: list[MicroBatch]
    supervised: float
    """Supervised tokens, each as far as it counts in the loss."""
    tokens: int


class RowSource(Protocol):
    """Global batches, and the rows in them by a pair of numbers each."""

    rows: int | None
    """Rows of an epoch; None where that is not known beforehand."""
    unit: str
    """What a row is called."""

    def places(self, step: int) -> list[tuple[int, int]]:
        """The rows of a 0-based step, in the order of their positions in the global batch."""

    def row(self, first: int, second: int) -> Encoded:
        """A row of the step asked for last: one example, or several packed ones."""

    def length(self, first: int, second: int) -> int:
        """Its tokens."""


class EpochRows(Protocol):
    """Rows by epoch and index, the same number in every epoch."""

    def __len__(self) -> int: ...

    def row(self, epoch: int, index: int) -> Encoded:
        """A row."""

    def length(self, epoch: int, index: int) -> int:
        """Its tokens."""


class ShuffledBatches:
    """Global batches from rows at hand: an endless chain of permutations, one per epoch."""

    def __init__(self, rows: EpochRows, unit: str, train: TrainConfig) -> None:
        self.rows: int | None = len(rows)
        self.unit = unit
        self.row, self.length = rows.row, rows.length
        self._count, self._train = len(rows), train

    def places(self, step: int) -> list[tuple[int, int]]:
        """(epoch, index) of each row."""
        return global_batch_places(self._count, self._train.global_batch, step, self._train.seed)


class SingleRows:
    """Every example is a row."""

    def __init__(self, examples: Sequence[Encoded]) -> None:
        self._examples, self._lengths = examples, lengths_of(examples)

    def __len__(self) -> int:
        return len(self._examples)

    def row(self, epoch: int, index: int) -> Encoded:
        """Example `index`, in every epoch."""
        return self._examples[index]

    def length(self, epoch: int, index: int) -> int:
        """Its tokens."""
        return self._lengths[index]


class BatchLoader:
    """Step -> what this process does in it: a function of the step alone, so that resuming needs no state."""

    def __init__(
        self, source: RowSource, train: TrainConfig, spec: AdapterSpec, process_rank: int, world_size: int,
        end_to_end: bool = False,
    ) -> None:
        """`spec`: whether its sites mask anything, and its consistency term, decide how rows lie along draws.

        `end_to_end`: whether passes will have no padding, which decides how many rows micro_tokens allows.
        """
        self._source, self._train, self._spec, self._end_to_end = source, train, spec, end_to_end
        self._rank, self._world = process_rank, world_size
        self._masked = any(site.rate > 0 for site in spec.sites)

    @property
    def rows(self) -> int | None:
        """Rows of an epoch: examples, or packed rows; None where they are streamed."""
        return self._source.rows

    def describe(self, micro_steps: int) -> str:
        """For people: what a global batch is made of.

        Args:
            micro_steps: passes per process where they have a fixed number of rows.
        """
        train, unit = self._train, self._source.unit
        if train.micro_tokens is not None:
            return f"{train.global_batch} {unit} in passes of up to {train.micro_tokens} tokens, {self._world} at once"
        return f"{train.global_batch} {unit} = {train.micro_batch} × {micro_steps} accumulation × {self._world}"

    def of_step(self, step: int) -> StepBatch:
        """The passes of a 0-based step.

        Raises:
            ConfigError: the global batch is no multiple of the number of processes.
        """
        train = self._train
        places = self._source.places(step)
        share = [position for position, _ in process_share(range(len(places)), self._rank, self._world)]
        if train.micro_tokens is None:
            chunks = [share[i : i + train.micro_batch] for i in range(0, len(share), train.micro_batch)]
        else:
            chunks = self._chunks_by_tokens(places, train.micro_tokens)
        rows = {position: self._source.row(*places[position]) for chunk in chunks for position in chunk}
        micros = [self._micro(chunk, rows) if chunk else self._idle(places) for chunk in chunks]
        return StepBatch(
            micros, sum(row.weighed for row in rows.values()), sum(len(row.input_ids) for row in rows.values())
        )

    def _micro(self, chunk: Sequence[int], rows: Mapping[int, Encoded]) -> MicroBatch:
        """The pass of some positions; the answers of a row stand under the draws of its position."""
        told = [(position, answer) for position in chunk for answer in rows[position].answers]
        layout = self._layout([position for position, _ in told])
        return MicroBatch([answer for _, answer in told], weighed(layout, [answer.weight for _, answer in told]))

    def _chunks_by_tokens(self, places: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
        """This process's chunks of the global batch; chunks of one round have similar lengths on all processes."""
        train = self._train
        lengths = [self._source.length(*place) for place in places]
        branches = 1 if self._spec.consistency.kind == "none" else 2
        classes = train.draws // branches if self._masked and train.draw_layout == "split" else 1

        def size(positions: Sequence[int]) -> int:
            return pass_tokens(self._layout(positions), [lengths[p] for p in positions], self._end_to_end)

        chunks = token_chunks(lengths, budget, size, classes)
        rounds = -(-len(chunks) // self._world)
        return [*chunks[self._rank :: self._world], []][:rounds]

    def _layout(self, positions: Sequence[int]) -> RowLayout:
        train = self._train
        return training_layout(positions, train.draws, train.draw_layout, self._masked, self._spec.consistency)

    def _idle(self, places: Sequence[tuple[int, int]]) -> MicroBatch:
        """A pass without loss over the shortest row: all processes make the same passes through the same modules."""
        shortest = min(places, key=lambda place: self._source.length(*place))
        return MicroBatch([self._source.row(*shortest).answers[0]], weightless(self._layout([0])))


def pass_tokens(layout: RowLayout, lengths: Sequence[int], end_to_end: bool) -> int:
    """Tokens of the larger of the forward passes that a layout takes: branches without gradient have their own.

    Args:
        lengths: of the examples that the layout is of.
        end_to_end: whether there is neither padding nor a filler.
    """
    reference = reference_of(layout)
    own = sum(lengths[layout.source[row]] for row in layout.real) if end_to_end else len(layout.source) * max(lengths)
    return own if reference is None else max(own, pass_tokens(reference, lengths, end_to_end))


def open_loader(
    train: TrainConfig, max_tokens: int, examples: Sequence[Encoded], spec: AdapterSpec, process_rank: int = 0,
    world_size: int = 1, stream: RowSource | None = None, end_to_end: bool = False,
) -> BatchLoader:
    """The batches of a run over its training examples, or over a stream in their place.

    Raises:
        ConfigError: rows are to be packed, and several answers are learnt of some.
    """
    if train.packing and has_several_answers(examples):
        raise ConfigError("train.packing", True, SEVERAL_ANSWERS, "Set train.packing=false.")
    source: RowSource = stream or ShuffledBatches(SingleRows(examples), "rows", train)
    if train.packing:
        packed = PackedRows(examples, lengths_of(examples), max_tokens, train.seed)
        source = ShuffledBatches(packed, f"of {len(packed)} packed rows", train)
    return BatchLoader(source, train, spec, process_rank, world_size, end_to_end)
