"""How exported members are read out: averaged in which space, scaled by which temperature, fitted to exactly them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.errors import RunFolderError
from pipeline.run_folder.labelled import LabelledSplit, join_labels
from pipeline.run_folder.members import places_of_draws, read_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import read_predictions
from pipeline.scores import temperature
from pipeline.scores.choices import ChoiceScore
from pipeline.scores.ensemble import Space, average

ACTS_ON = "log-probabilities normalised over the choices of a row: members averaged, divided by it, normalised again"


def exported_readout(
    paths: RunPaths, rows: Iterable[Any], configured: Space, draws: Sequence[int | None], adapter_sha256: str,
    rule: ChoiceScore = "sum",
) -> dict[str, Any]:
    """`average`, the space in which these members can be averaged, and `temperature` with its 95 % interval.

    Where there is no temperature, `temperature` is None and `reason` says why.

    Args:
        rows: of the calibration split, with their right answers.
        configured: `ensemble.average`.
        draws: the exported members of the run's own adapter; None is the mean-field one.
        adapter_sha256: of the weights that are exported.
        rule: `data.choice_score`, by which choices are scored.
    """
    try:
        predictions = read_predictions(paths.predictions, "calibration").scored_by(rule)
        split = join_labels(predictions, rows, f"{paths.predictions}: calibration")
        members = read_members(paths.predictions)
    except RunFolderError as error:
        return {"average": configured, "temperature": None, "reason": f"no calibration predictions: {error}"}
    places = places_of_draws(members, adapter_sha256)
    space = split.averaging_space(configured)
    if split.kind != "choice":
        return {"average": space, "temperature": None, "reason": f"{split.kind} rows have no choices to scale over"}
    if missing := [draw for draw in draws if draw not in places]:
        said = ", ".join("the mean-field adapter" if draw is None else f"draw {draw}" for draw in missing)
        return {"average": space, "temperature": None, "reason": f"not predicted: {said}. Evaluate again."}
    return {"average": space, "temperature": _fitted(split, [places[draw] for draw in draws], space)}


def _fitted(split: LabelledSplit, members: Sequence[int], space: Space) -> dict[str, Any]:
    averaged = average(split.outputs[list(members)], space)
    value = temperature.fit_temperature(averaged, split.labels, split.units)
    low, high = temperature.posterior_interval(averaged, split.labels, value, split.units)
    return {
        "value": value, "low": low, "high": high, "acts_on": ACTS_ON,
        "calibration_rows": split.rows, "calibration_units": split.unit_count,
        "carried": temperature.is_carried(averaged, split.labels, value, split.units),
        "at_bound": temperature.at_bound(value),
    }  # fmt: skip
