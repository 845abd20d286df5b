"""Scores and temperature of the weights that are served, where they are not those that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.adapters.attach import attach
from pipeline.adapters.members import Member
from pipeline.config.load import with_values
from pipeline.data.rows import Row
from pipeline.export.order import Loaded, Served
from pipeline.prediction.task import open_task
from pipeline.run_folder.labelled import LabelledSplit, join_labels
from pipeline.run_folder.readout import fitted_temperature
from pipeline.scores import temperature
from pipeline.scores.bootstrap import Floats
from pipeline.scores.calibration import ece
from pipeline.scores.classification import accuracy, nll
from pipeline.scores.regression import Correlation
from pipeline.terminal import say


def served_by(loaded: Loaded, folder: Path) -> Served:
    """Calibration and test rows predicted by a whole model, as the run predicts its own.

    Args:
        folder: a checkpoint of transformers.
    """
    config = with_values(loaded.config, {
        "model.path": str(folder), "model.revision": None, "model.quantization": "none", "model.hold": "auto",
        "model.compute_dtype": loaded.task.base.identity.compute_dtype,
    }).trusting(loaded.trusted)
    task = open_task(config, loaded.splits, loaded.adapters.device)
    # A fresh adapter that no member has, because passes go along the member axis. The head is the checkpoint's.
    idle = replace(loaded.plain.spec, sites=())
    adapters = attach(task.base.model, [idle], sorted(loaded.plain.matrices), config.train.seed)
    say(f"{folder.name}: scores and temperature again, of {len(loaded.splits.test)} test rows")

    def predicted(name: str) -> LabelledSplit:
        rows: Sequence[Row] = getattr(loaded.splits, name)
        predictions = task.predict(adapters, rows, [Member(None)])
        return join_labels(predictions, rows, f"{folder.name}, {name}")

    calibration, test = predicted("calibration"), predicted("test")
    space, bins = test.averaging_space(config.ensemble.average), config.evaluate.ece_bins
    first = loaded.splits.test[0]
    outputs = task.predict(adapters, [first], [Member(None)]).outputs.astype(np.float64)
    before = scores_of(test, test.outputs[0], bins)
    if test.kind != "choice":
        reason = f"{test.kind} rows have no choices to scale over"
        return Served({"average": space, "temperature": None, "reason": reason}, {"before": before}, outputs)
    fitted = fitted_temperature(calibration, calibration.outputs[0])
    scaled = scores_of(test, temperature.apply_temperature(test.outputs[0], fitted["value"]), bins)
    return Served({"average": space, "temperature": fitted}, {"before": before, "after": scaled}, outputs)


def scores_of(split: LabelledSplit, outputs: Floats, bins: int) -> dict[str, float]:
    """Score -> value of one prediction (L, C)."""
    if split.kind == "regression":
        return {
            "pearson": float(Correlation(outputs[None, :, 0], split.labels, "pearson").point()),
            "rmse": float(np.sqrt(np.square(outputs[:, 0] - split.labels).mean())),
        }
    found = {"nll": float(nll(outputs, split.labels))}
    if split.kind == "choice":
        found["accuracy"] = float(accuracy(outputs, split.labels))
        found["ece"] = ece(outputs, split.labels, bins, split.units)
    return found


def reported_scores(result: Mapping[str, Any], key: str) -> dict[str, dict[str, float]]:
    """before and after (the temperature) -> score -> value of a system of result.json, on test rows; empty if none."""
    system = next((one for one in result.get("systems", ()) if one["key"] == key), None)
    if system is None:
        return {}
    return {
        scaling: {name: entry["value"] for name, entry in scores.items()} for scaling, scores in system["test"].items()
    }
