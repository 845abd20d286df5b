"""The other data sets of a run (`evaluate.also`): their predictions, joined with what is known of their rows."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import RunConfig
from pipeline.config.evaluate import ALSO
from pipeline.data.shapes.also import load_also
from pipeline.data.splits import Splits
from pipeline.errors import RunFolderError
from pipeline.run_folder.chain import Origin, require_predictions
from pipeline.run_folder.labelled import LabelledSplit, join_labels
from pipeline.run_folder.members import PredictedMember
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import EVALUATE_AGAIN, read_predictions


@dataclass(frozen=True)
class AlsoSplit:
    """One of the sets, ready to be scored."""

    path: str
    rows: LabelledSplit
    """Without labels, those that it has mean nothing."""
    labels: bool
    shown: int
    """Rows left out because the run's own splits have their question."""


def read_also(
    paths: RunPaths, config: RunConfig, own: Splits, members: list[PredictedMember]
) -> dict[str, AlsoSplit]:
    """The split of each set's predictions -> what it holds.

    Raises:
        RunFolderError: predictions are missing, or of other members or other rows.
    """
    found = {}
    for split, one in load_also(config.evaluate.also, config.data, own).items():
        predictions = read_predictions(paths.predictions, split)
        origin, where = Origin(config.training_sha256(), one.fingerprint), str(paths.predictions / f"{split}.npz")
        require_predictions(paths, split, predictions, origin, members)
        if predictions.members != len(members):
            what = f"holds {predictions.members} members, members.json names {len(members)}"
            raise RunFolderError(where, None, what, EVALUATE_AGAIN)
        scored = predictions.scored_by(config.data.choice_score)
        path = config.evaluate.also[split.removeprefix(ALSO)].path
        found[split] = AlsoSplit(path, join_labels(scored, one.rows, where), one.labels, one.shown)
    return found
