"""Everything the report reads, checked and joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.data.rows import Row
from pipeline.data.splits import EVALUATED_SPLITS, load_splits
from pipeline.errors import RunFolderError
from pipeline.files import read_json, sha256_file
from pipeline.report.also.rows import AlsoSplit, read_also
from pipeline.report.teacher import with_teacher
from pipeline.run_folder.chain import (
    Origin,
    predictions_from,
    require_members,
    require_predictions,
    require_same_adapter,
)
from pipeline.run_folder.comparison import Training, read_comparison
from pipeline.run_folder.generated import JoinedTexts, read_joined, texts_path
from pipeline.run_folder.labelled import LabelledSplit, join_labels
from pipeline.run_folder.members import PredictedMember, read_members
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import RunPaths, load_saved
from pipeline.run_folder.predictions import EVALUATE_AGAIN, Kind, Predictions, read_predictions
from pipeline.run_folder.related import Related, read_related, read_search


@dataclass(frozen=True)
class TrainingCurve:
    """What metrics.jsonl says: step -> value."""

    loss: dict[int, float]
    """Training loss, nats per supervised token."""
    validation_nll: dict[int, float]
    """Validation NLL, nats."""
    seconds: float | None = None
    """In optimizer steps: validation, checkpoints and loading apart. None where it was not logged."""


@dataclass(frozen=True)
class ReportInputs:
    """One run, ready to be scored."""

    paths: RunPaths
    config: RunConfig
    config_text: str
    made_from: dict[str, Any]
    """Origin; hashes of the run's adapter, of the settings of the reading, and of the predictions files."""
    environment: dict[str, Any]
    kind: Kind
    members: list[PredictedMember]
    splits: dict[str, LabelledSplit]
    test_rows: list[Row]
    """In the order of the test split's predictions."""
    curves: dict[str, TrainingCurve]
    """Of the run and of plain LoRA, by their groups; of a comparison, by the names of its trainings."""
    trainings: list[Training] | None
    """What was compared, where the folder is a comparison."""
    search: dict[str, Any] | None
    also: Mapping[str, AlsoSplit] = field(default_factory=dict)
    """The other data sets that the members predicted (`evaluate.also`), by the splits of their predictions."""
    texts: JoinedTexts | None = None
    """What was written for the test rows (`evaluate.generate`)."""


def read_inputs(run_dir: Path) -> ReportInputs:
    """Read and join everything. Raises `RunFolderError`, naming the file and the way out."""
    paths = RunPaths(run_dir)
    if not paths.config.is_file():
        raise RunFolderError(str(paths.config), None, "does not exist", "Give --run-dir a folder made by a run.")
    config = load_saved(paths.config)
    members = read_members(paths.predictions)
    require_members(paths, members, config.ensemble)
    labelled = load_splits(config.data)
    origin = Origin(config.training_sha256(), labelled.fingerprint)
    predictions = {
        split: _read_split(paths, split, origin, members).scored_by(config.data.choice_score)
        for split in EVALUATED_SPLITS
    }
    own = next((m.adapter_sha256 for m in members if m.group == "mean_field"), None)
    if own is not None:
        require_same_adapter(paths, own, "predictions/", "Evaluate again, or put that one back.")
    also = read_also(paths, config, labelled, members)
    texts = read_joined(paths.predictions, config, labelled.test, predictions_from(origin, members), members)
    written = {} if texts is None else {"texts": sha256_file(texts_path(paths.predictions, "test"))}
    related, trainings = read_related(paths), read_comparison(paths)
    _require_same_trainings(paths, trainings or [], members)
    joined = {
        split: join_labels(found, getattr(labelled, split), str(paths.predictions / f"{split}.npz"))
        for split, found in predictions.items()
    }
    members, joined = with_teacher(paths, members, joined, {split: one.row_ids for split, one in predictions.items()})
    by_id = {row.id: row for row in labelled.test}
    return ReportInputs(
        paths=paths,
        config=config,
        config_text=paths.config.read_text(encoding="utf-8"),
        made_from=origin.as_dict()
        | {"adapter_sha256": own, "settings_sha256": config.reading_sha256(), **written}
        | {"predictions": {split: sha256_file(paths.predictions / f"{split}.npz") for split in (*predictions, *also)}},
        environment=read_json(paths.environment) if paths.environment.is_file() else {},
        kind=_common_kind(paths, predictions),
        members=members,
        splits=joined,
        test_rows=[by_id[row_id] for row_id in predictions["test"].row_ids],
        curves=_read_curves(paths, related, trainings),
        trainings=trainings,
        search=None if related.search is None else read_search(related.search, related.search_identity),
        also=also,
        texts=texts,
    )


def read_training(metrics: Path) -> TrainingCurve:
    """The curves in a metrics.jsonl; a step logged again after a resume counts once. Empty where there is none."""
    loss: dict[int, float] = {}
    validation: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for row in read_metrics(metrics, train=["loss"], validation=["nll"]):
        if row["kind"] == "train":
            loss[row["step"]] = float(row["loss"])
            if isinstance(row.get("seconds"), int | float):
                seconds[row["step"]] = float(row["seconds"])
        elif row["kind"] == "validation":
            validation[row["step"]] = float(row["nll"])
    total = sum(seconds.values()) if seconds else None
    return TrainingCurve(dict(sorted(loss.items())), dict(sorted(validation.items())), total)


def _read_split(paths: RunPaths, split: str, origin: Origin, members: list[PredictedMember]) -> Predictions:
    predictions = read_predictions(paths.predictions, split)
    require_predictions(paths, split, predictions, origin, members)
    if predictions.members != len(members):
        what = f"holds {predictions.members} members, members.json names {len(members)}"
        raise RunFolderError(str(paths.predictions / f"{split}.npz"), None, what, "Evaluate again.")
    return predictions


def _require_same_trainings(paths: RunPaths, trainings: list[Training], members: list[PredictedMember]) -> None:
    """Raises `RunFolderError` where a training of a comparison has another adapter than the one that predicted."""
    predicted = {member.name: member.adapter_sha256 for member in members if member.group == "compared"}
    for one in trainings:
        if (one.chosen or one.name in predicted) and predicted.get(one.name) != one.adapter_sha256:
            what = f"names another adapter of {one.name} than the one that predicted"
            raise RunFolderError(str(paths.comparison), None, what, "Compare again.")


def _common_kind(paths: RunPaths, predictions: dict[str, Predictions]) -> Kind:
    kinds = {found.kind for found in predictions.values()}
    if len(kinds) > 1:
        raise RunFolderError(str(paths.predictions), None, f"mixes {' and '.join(sorted(kinds))} data", EVALUATE_AGAIN)
    return kinds.pop()


def _read_curves(
    paths: RunPaths, related: Related, trainings: list[Training] | None
) -> dict[str, TrainingCurve]:
    """The curves that have points."""
    if trainings is None:
        runs = {"mean_field": paths.root} | ({} if related.plain is None else {"plain": related.plain})
    else:
        runs = {one.name: paths.root / one.run for one in trainings}
    curves = {name: read_training(RunPaths(folder).metrics) for name, folder in runs.items()}
    return {name: curve for name, curve in curves.items() if curve.loss}
