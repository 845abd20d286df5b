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
from pipeline.scores.bootstrap import Floats
from pipeline.scores.choices import ChoiceScore
from pipeline.scores.ensemble import Space, average

ACTS_ON = "log-probabilities normalised over the choices of a row: members averaged, divided by it, normalised again"


def exported_readout(
    paths: RunPaths, rows: Iterable[Any], configured: Space, draws: Sequence[int | None], adapter_sha256: str,
    rule: ChoiceScore = "sum", weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """`weights` of these members, `average`, the space in which they can be averaged, and `temperature` with its 95 %
    interval.

    Where there is no temperature, `temperature` is None and `reason` says why.

    Args:
        rows: of the calibration split, with their right answers.
        configured: `ensemble.average`.
        draws: the exported members of the run's own adapter; None is the mean-field one.
        adapter_sha256: of the weights that are exported.
        rule: `data.choice_score`, by which choices are scored.
        weights: of the members, where validation chose some that do not count alike.
    """
    shares = [1.0 / len(draws)] * len(draws) if weights is None else list(weights)
    try:
        predictions = read_predictions(paths.predictions, "calibration").scored_by(rule)
        split = join_labels(predictions, rows, f"{paths.predictions}: calibration")
        members = read_members(paths.predictions)
    except RunFolderError as error:
        said = f"no calibration predictions: {error}"
        return {"weights": shares, "average": configured, "temperature": None, "reason": said}
    places = places_of_draws(members, adapter_sha256)
    space = split.averaging_space(configured)
    known: dict[str, Any] = {"weights": shares, "average": space}
    if split.kind != "choice":
        return {**known, "temperature": None, "reason": f"{split.kind} rows have no choices to scale over"}
    if missing := [draw for draw in draws if draw not in places]:
        said = ", ".join("the mean-field adapter" if draw is None else f"draw {draw}" for draw in missing)
        return {**known, "temperature": None, "reason": f"not predicted: {said}. Evaluate again."}
    averaged = average(split.outputs[[places[draw] for draw in draws]], space, weights)
    return {**known, "temperature": fitted_temperature(split, averaged)}


def fitted_temperature(split: LabelledSplit, averaged: Floats) -> dict[str, Any]:
    """The temperature of an average (N, C) by calibration rows, with its interval and how far it can be trusted."""
    value = temperature.fit_temperature(averaged, split.labels, split.units)
    low, high = temperature.posterior_interval(averaged, split.labels, value, split.units)
    return {
        "value": value, "low": low, "high": high, "acts_on": ACTS_ON,
        "calibration_rows": split.rows, "calibration_units": split.unit_count,
        "carried": temperature.is_carried(averaged, split.labels, value, split.units),
        "at_bound": temperature.at_bound(value),
    }  # fmt: skip
