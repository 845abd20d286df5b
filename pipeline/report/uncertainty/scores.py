"""What systems know of their own errors: entropy and its parts, risk by coverage, and the rows to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.report.inputs import ReportInputs
from pipeline.report.scoring import BEFORE, ScoredSystem, resample_statistics
from pipeline.report.systems import System
from pipeline.scores.bootstrap import Floats, Ints, RowMean, Statistic
from pipeline.scores.classification import row_correct
from pipeline.scores.disagreement import entropy, mutual_information
from pipeline.scores.seeds import Runs, within_bounds
from pipeline.scores.uncertainty import Auroc, RiskCoverageArea, doubt_of_choice, risk_coverage

Entries = dict[str, Any]

ROWS_SHOWN = 10
"""Of each list of rows, at most."""
_CURVE_POINTS = 100
"""Of each risk-coverage curve, at most."""
_BOUNDED = {"aurc": 1.0, "e_aurc": 1.0, "auroc_confidence": 1.0, "auroc_entropy": 1.0, "auroc_mutual_information": 1.0}
"""Score -> the most that it can be; the others have no bound, and none can be below 0."""


def uncertainty_entries(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> dict[str, Entries | None]:
    """System -> its numbers on the test rows before scaling, with intervals; None where rows have no choices.

    A number is None where it is not defined (nothing to find among rows that are all right, or all wrong).
    """
    if inputs.kind != "choice":
        return dict.fromkeys((one.system.key for one in scored), None)
    named: dict[tuple[str, str, str], tuple[System, tuple[Statistic, ...]]] = {}
    for one in scored:
        by_run = [_statistics(inputs, one, run) for run in one.system.runs]
        named |= {(one.system.key, BEFORE, score): (one.system, tuple(run[score] for run in by_run))
                  for score in by_run[0]}
    found: dict[str, Entries] = {one.system.key: {} for one in scored}
    for (key, _, score), runs in resample_statistics(inputs, "test", named).items():
        found[key][score] = _interval(score, runs)
    return dict(found)


def risk_coverage_entries(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> dict[str, Entries]:
    """System -> its curve on the test rows, before scaling: of the first of several candidates."""
    labels, found = inputs.splits["test"].labels, {}
    for one in scored if inputs.kind == "choice" else ():
        log_probs = one.predictions["test", BEFORE][0]
        coverage, risk = risk_coverage(doubt_of_choice(log_probs), 1.0 - row_correct(log_probs, labels))
        kept = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), _CURVE_POINTS)).round().astype(int))
        found[one.system.key] = {"coverage": coverage[kept].tolist(), "risk": risk[kept].tolist()}
    return found


def rows_entry(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> Entries | None:
    """The test rows to look at: those that members know most different things about, and the surest wrong answers.

    Of the system of the most members that count alike, which have something to disagree about; among single ones of
    the run's own adapter (of a comparison, of the last). Before scaling, and of the first of several candidates. Rows by their ids:
    texts are in the page alone.
    """
    if inputs.kind != "choice":
        return None
    alike = [one for one in scored if one.system.weights is None and one.system.margin is None]
    most = max(one.system.passes for one in alike)
    shown = next((one for one in alike if one.system.passes == most > 1), None) or \
        next((one for one in alike if one.system.key == "mean_field"), alike[-1])
    split, candidate = inputs.splits["test"], list(shown.system.candidates[0])
    members, log_probs = split.outputs[candidate].astype(np.float64), shown.predictions["test", BEFORE][0]
    apart, wrong = mutual_information(members), row_correct(log_probs, split.labels) < 0.5
    confidence = np.exp(log_probs.max(axis=-1))
    told = np.flatnonzero(apart > 0.0)
    lists: dict[str, Ints] = {
        "disagreement": told[np.argsort(-apart[told], kind="stable")],
        "confidently_wrong": np.flatnonzero(wrong)[np.argsort(-confidence[wrong], kind="stable")],
    }
    return {"system": shown.system.key, "name": shown.system.name} | {
        name: [_row_entry(inputs, int(place), log_probs, members, float(apart[place])) for place in places[:ROWS_SHOWN]]
        for name, places in lists.items()
    }


def _row_entry(inputs: ReportInputs, place: int, log_probs: Floats, members: Floats, apart: float) -> Entries:
    row, predicted = inputs.test_rows[place], int(log_probs[place].argmax())
    own = members[:, place]
    return {
        "id": row.id,
        "right": int(inputs.splits["test"].labels[place]),
        "predicted": predicted,
        "probabilities": np.exp(log_probs[place])[: len(row.choices)].tolist(),
        "mutual_information": apart,
        "members": {"chosen": own.argmax(axis=-1).tolist(), "probability": np.exp(own[:, predicted]).tolist()},
    }


def _statistics(inputs: ReportInputs, one: ScoredSystem, run: list[int]) -> dict[str, Statistic]:
    """Of the candidates of one training run. What members say apart is that of several."""
    split = inputs.splits["test"]
    log_probs = one.predictions["test", BEFORE][run]
    wrong, unsure, doubt = 1.0 - row_correct(log_probs, split.labels), entropy(log_probs), doubt_of_choice(log_probs)
    found: dict[str, Statistic] = {
        "entropy": RowMean(unsure),
        "aurc": RiskCoverageArea(doubt, wrong, "aurc"),
        "e_aurc": RiskCoverageArea(doubt, wrong, "e_aurc"),
        "auroc_confidence": Auroc(doubt, wrong),
        "auroc_entropy": Auroc(unsure, wrong),
    }
    if one.system.passes > 1 and one.system.margin is None:  # else other rows have other members
        members, weights = [split.outputs[list(one.system.candidates[number])] for number in run], one.system.weights
        apart = np.stack([mutual_information(outputs, weights) for outputs in members])
        alone = [np.average(entropy(outputs), axis=0, weights=weights) for outputs in members]
        found["expected_entropy"] = RowMean(np.stack(alone))
        found["mutual_information"] = RowMean(apart)
        found["auroc_mutual_information"] = Auroc(apart, wrong)
    return found


def _interval(score: str, runs: Runs) -> Entries | None:
    """Over the resamples in which it is defined; None where it is not defined of the rows as they are."""
    defined = np.isfinite(runs.resamples).all(axis=0)
    if not np.isfinite(runs.points).all() or not defined.any():
        return None
    found = Runs(runs.points, runs.resamples[:, defined], runs.units, runs.seeds)
    return asdict(within_bounds(found.interval(), 0.0, _BOUNDED.get(score, np.inf)))
