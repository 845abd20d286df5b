"""Training rows that are read again in every epoch instead of being held in memory.

Rows come in blocks of `data.shuffle_rows` in the order of the source; each block is shuffled by (seed, epoch, block).
So the row at a position of the endless chain depends on nothing else, and a resumed run finds its place by reading past
what was used. Every process reads all rows and tokenizes all of a global batch, so a fault ends them all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice

from pipeline.config import DataConfig
from pipeline.data.encode import Encoded
from pipeline.data.rows import IdRegister, Row
from pipeline.data.sampler import permutation
from pipeline.data.shapes.reading import read_sources
from pipeline.data.sources import open_records
from pipeline.data.splits import Splits
from pipeline.data.template import to_row
from pipeline.errors import DataError

_EPOCH = 2**32
"""Blocks of an epoch, at most: an epoch's number stands above them in the key of a shuffle."""


class RowStream:
    """The rows of the train split, read from the source epoch by epoch."""

    def __init__(self, config: DataConfig, owned: Collection[tuple[str, str | None]], kind: str, seed: int) -> None:
        """
        Args:
            owned: questions and units of the other splits: their rows are passed over.
            kind: `Row.kind` that all rows have.
            seed: `train.seed`.
        """
        self._config, self._owned, self._kind, self._seed = config, frozenset(owned), kind, seed
        self._source = read_sources(config)[0]

    def from_position(self, position: int) -> Iterator[Row]:
        """The endless chain of epochs from its 0-based `position` on.

        Raises:
            DataError: a fault in a row, or a source without a training row.
        """
        epoch, skip = 0, position
        while True:
            rows = 0
            for number, block in enumerate(_blocks(self._epoch(), self._config.shuffle_rows)):
                rows += len(block)
                if skip >= len(block):
                    skip -= len(block)
                    continue
                order = permutation(len(block), self._seed, epoch * _EPOCH + number)
                yield from (block[int(index)] for index in order[skip:])
                skip = 0
            if not rows:
                raise DataError(
                    "data.path", self._config.path, "has no row that the other splits do not own", "Give more rows."
                )
            epochs, skip = divmod(skip, rows)  # what a resumed run has behind it is not read again
            epoch += 1 + epochs

    def _epoch(self) -> Iterator[Row]:
        """The source once, as far as `data.train_rows`."""
        return islice(self._read(), self._config.train_rows)

    def _read(self) -> Iterator[Row]:
        source = self._source
        for where, values in open_records(source, streaming=True)["train"]:
            if isinstance(values, DataError):
                raise values
            row = IdRegister().name(to_row(values, source.template, where), values.get("id"), where, values.get("unit"))
            if row.kind != self._kind:
                raise DataError(where, None, f"is a {row.kind} row among {self._kind} rows", "Keep one kind.")
            if self._owned.isdisjoint(_owners(row)):
                yield row


def _owners(row: Row) -> set[tuple[str, str | None]]:
    """What may be in one split only."""
    return {("question", row.question)} | ({("unit", row.unit)} if row.unit else set())


def open_stream(config: DataConfig, splits: Splits, seed: int) -> RowStream:
    """The stream that goes with `splits`, which are taken from the source's first rows."""
    others = [row for rows in (splits.validation, splits.calibration, splits.test) for row in rows]
    return RowStream(config, set().union(*map(_owners, others)), splits.train[0].kind, seed)


class StreamedBatches:
    """Global batches from a stream, tokenized as they are needed."""

    rows: int | None = None
    """Of an epoch: not known beforehand."""
    unit: str = "streamed rows"

    def __init__(
        self, stream: RowStream, encode: Callable[[Sequence[Row]], Sequence[Encoded]], global_batch: int
    ) -> None:
        self._stream, self._encode, self._size = stream, encode, global_batch
        self._chain: Iterator[Row] = iter(())
        self._step = -1
        self._batch: Sequence[Encoded] = ()

    def places(self, step: int) -> list[tuple[int, int]]:
        """Read the global batch of a 0-based step. Any other than the next one is found from the beginning."""
        if step != self._step + 1 or self._step < 0:
            self._chain = self._stream.from_position(step * self._size)
        self._batch = self._encode(list(islice(self._chain, self._size)))
        self._step = step
        return [(step, index) for index in range(self._size)]

    def row(self, step: int, index: int) -> Encoded:
        """Row `index` of the step read last."""
        assert step == self._step
        return self._batch[index]

    def length(self, step: int, index: int) -> int:
        """Its tokens."""
        return len(self.row(step, index).input_ids)


def _blocks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while block := list(islice(iterator, size)):
        yield block
