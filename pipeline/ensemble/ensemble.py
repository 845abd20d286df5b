"""The chosen, calibrated ensemble with its model: rows in, answers out.

Passes are those of evaluation (`pipeline.prediction`), and so are averaging and scaling (`pipeline.scores`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.adapters.attach import Adapters
from pipeline.adapters.build import attach_stored
from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import read_adapter
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.distributed.world import World, lone_world
from pipeline.ensemble.exported import open_export
from pipeline.ensemble.readout import EvaluatedRun, Readout, free_text, top_probability
from pipeline.ensemble.rows import RowForm, checked
from pipeline.errors import DataError, RunFolderError
from pipeline.files import MANIFEST
from pipeline.prediction.predict import predict_shared
from pipeline.prediction.task import OnChunk, Task, open_task
from pipeline.run_folder.mark import require_mark
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.scores.abstention import Threshold
from pipeline.scores.adaptive import ROUND, settled
from pipeline.scores.bootstrap import Floats
from pipeline.scores.disagreement import entropy, mutual_information, spread


@dataclass(frozen=True)
class Answer:
    """What the ensemble says of one row with choices."""

    id: str
    choice: str
    """The text of the most probable choice, without the blanks around it."""
    index: int
    """Its number, from 0."""
    probabilities: tuple[float, ...]
    """Of the choices, in their order: the members' average, scaled by the temperature."""
    entropy: float
    """Of these, in nats."""
    mutual_information: float
    """H(mean of the members' probabilities) - mean of their entropies, in nats, before scaling: what members disagree
    about; 0 for a single member."""
    spread: tuple[float, ...]
    """Standard deviation over members of each choice's probability, before scaling."""
    passes: int = 1
    """Members that have predicted the row."""
    answered: bool | None = None
    """Whether the row is one of those to answer; None where nothing was asked about risk."""
    members: tuple[tuple[float, ...], ...] = ()
    """Each member's probabilities, before scaling."""


@dataclass(frozen=True)
class NumberAnswer:
    """What the ensemble says of one row with a number."""

    id: str
    value: float
    """Mean over members."""
    spread: float
    """Their standard deviation."""


@dataclass
class Ensemble:
    """The ensemble of a run, ready to predict."""

    task: Task
    adapters: Adapters
    members: list[Member]
    readout: Readout
    form: RowForm
    world: World
    identity: str
    """Hash of all that decides an answer, but the row."""
    run: EvaluatedRun | None = None
    """The run it was loaded from; None: an export."""

    @classmethod
    def load(
        cls, folder: str | Path, draws: int | None = None, trust_remote_code: bool = False, world: World | None = None
    ) -> Ensemble:
        """From a run folder that was evaluated and reported, or from the export/ of one.

        Args:
            folder: the run's, or the export's.
            draws: so many of its mask draws instead of what validation chose; 0 is the adapter without masks.
            trust_remote_code: whether code that comes with the model may run: no folder is asked.
            world: the processes that work together; None: this one alone.

        Raises:
            RunFolderError: something is missing, damaged, or made from something else; of an export, what its manifest
                does not say.
        """
        place, run = Path(folder).expanduser(), None
        if (place / MANIFEST).is_file() and not RunPaths(place).config.exists():
            config, splits, stored, members, readout, form = open_export(place, draws, trust_remote_code)
            identity = readout.identity([one.sha256 for one in stored], config)
        else:
            require_mark(place, "run", "comparison")
            paths = RunPaths(place)
            config = load_saved(paths.config, trust_remote_code)
            run = EvaluatedRun.open(paths, config, splits := load_splits(config.data))
            readout, form = run.readout(draws), RowForm.of_run(config, splits)
            stored, members = [read_adapter(paths.adapter)], [Member(0, draw) for draw in readout.draws]
            identity = run.identity(readout)
        world = world or lone_world()
        task = open_task(config, splits, world.device)
        adapters = attach_stored(task.base, stored, config.train.seed, config.adapter.fused)
        return cls(task, adapters, members, readout, form, world, identity, run)

    def predict(self, rows: Iterable[Mapping[str, Any]], abstain: float | None = None) -> list[Answer | NumberAnswer]:
        """Answers to rows, column -> value as they stand in the run's data; right answers may be missing.

        Args:
            abstain: the risk that answered rows may have (`threshold`).

        Raises:
            DataError: faults of the rows; ConfigError: a risk that cannot be promised.
        """
        threshold = None if abstain is None else self.threshold(abstain)
        records = [(f"row {number}", row_of(row, number)) for number, row in enumerate(rows, start=1)]
        return self.answers(list(checked(self.form.read(records), "rows")), threshold)

    def threshold(self, risk: float) -> Threshold:
        """As `EvaluatedRun.threshold`. Raises `RunFolderError` for an export, which has no calibration rows."""
        if self.run is None:
            what = "is an export, which has none of the calibration rows that a risk is measured on"
            raise RunFolderError("folder", None, what, "Load the run folder.")
        return self.run.threshold(self.readout, risk)

    def answers(
        self, rows: Sequence[Row], threshold: Threshold | None = None, on_chunk: OnChunk | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> list[Answer | NumberAnswer]:
        """Answers to rows, on every process of the world, which share the work.

        Raises:
            RunFolderError: rows of which nothing but the probability of a reference is predicted.
            Stopped: `stop_asked` said so on any process.
        """
        if self.readout.kind == "completion":
            raise free_text("the ensemble")

        def predict(some: Sequence[Row], members: Sequence[Member]) -> Floats:
            found = predict_shared(self.task, self.adapters, some, members, self.world, on_chunk, stop_asked)
            return found.outputs

        if self.readout.kind == "regression":
            return _numbers(predict(rows, self.members), rows, self.readout)
        if self.readout.margin is None:
            return _choices(predict(rows, self.members), rows, self.readout, threshold)
        return _settled_choices(predict, self.members, rows, self.readout, threshold)


def row_of(given: object, number: int) -> dict[str, Any]:
    """A row as it was given. Raises `DataError` where it has no columns."""
    if not isinstance(given, Mapping):
        remedy = 'Give the columns that the data of the run has, such as {"text": "…"}.'
        raise DataError(f"row {number}", given, "is no mapping of columns to values", remedy)
    return dict(given)


def _settled_choices(
    predict: Callable[[Sequence[Row], Sequence[Member]], Floats], members: Sequence[Member], rows: Sequence[Row],
    readout: Readout, threshold: Threshold | None,
) -> list[Answer | NumberAnswer]:
    """Members predict `ROUND` at a time; rows that are settled by the read-out's margin are answered and leave."""
    assert readout.margin is not None
    of_all, answers = replace(readout, margin=None), dict[int, Answer | NumberAnswer]()
    left = np.arange(len(rows))
    outputs: Floats = np.empty((0, len(rows), 0))
    while len(left):
        made = min(len(outputs) + ROUND, len(members))
        found = predict([rows[n] for n in left.tolist()], members[len(outputs) : made])
        outputs = np.concatenate([outputs[..., : found.shape[-1]], found]) if len(outputs) else found
        done = settled(outputs, len(members) - made, readout.margin)
        own = left[done].tolist()
        answers |= zip(own, _choices(outputs[:, done], [rows[n] for n in own], of_all, threshold), strict=True)
        left, outputs = left[~done], outputs[:, ~done]
    return [answers[n] for n in range(len(rows))]


def _choices(
    outputs: Floats, rows: Sequence[Row], readout: Readout, threshold: Threshold | None
) -> list[Answer | NumberAnswer]:
    """Of log-probabilities (M, N, C)."""
    scaled = readout.of(outputs)
    found, between = np.exp(scaled), spread(np.exp(outputs), readout.weights)
    unsure, apart = entropy(scaled), mutual_information(outputs, readout.weights)
    answered: list[bool | None] = [None] * len(rows)
    if threshold is not None:
        answered = (top_probability(readout.averaged(outputs)) >= threshold.confidence).tolist()
    answers: list[Answer | NumberAnswer] = []
    for n, row in enumerate(rows):
        count, best = len(row.choices), int(found[n].argmax())
        probabilities, apart_each = tuple(found[n, :count].tolist()), tuple(between[n, :count].tolist())
        choice, members = row.choices[best].strip(), tuple(map(tuple, np.exp(outputs[:, n, :count]).tolist()))
        answers.append(Answer(
            row.id, choice, best, probabilities, float(unsure[n]), float(apart[n]), apart_each, len(outputs),
            answered[n], members,
        ))
    return answers


def _numbers(outputs: Floats, rows: Sequence[Row], readout: Readout) -> list[Answer | NumberAnswer]:
    """Of values (M, N, 1)."""
    mean, between = readout.averaged(outputs)[:, 0], spread(outputs, readout.weights)[:, 0]
    return [NumberAnswer(row.id, float(mean[n]), float(between[n])) for n, row in enumerate(rows)]


def as_dict(answer: Answer | NumberAnswer) -> dict[str, Any]:
    """Plain values for JSON; of the members, what they are together."""
    return {name: value for name, value in asdict(answer).items() if value is not None and name != "members"}
