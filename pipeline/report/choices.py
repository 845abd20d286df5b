"""What validation chooses among the read-outs of one adapter: mean-field, an ensemble of mask draws and its size, or
weighted members; and what drawing until a row is settled saves, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.report.inputs import ReportInputs
from pipeline.report.scoring import (
    AFTER,
    BEFORE,
    BOOTSTRAP_SEED,
    CURVE_SCORE,
    ScoredSystem,
    score_system,
    size_curve,
)
from pipeline.report.systems import System, curve_sizes, indices, mask_system, method_name, table_sizes
from pipeline.report.weighted import adaptive_systems
from pipeline.scores.bootstrap import RowMean, bootstrap_interval, paired_difference_interval
from pipeline.scores.classification import row_nll
from pipeline.scores.ensemble import choose_cheapest
from pipeline.scores.selection import selection_name

WEIGHTED = ("greedy", "fitted")
"""Keys of the systems whose members are the run's own, and do not count alike."""
RULE = "cheapest read-out whose validation {} is within one paired standard error of the best one's"


def ensemble_entry(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> dict[str, Any] | None:
    """NLL (or squared error) by number of mask draws, and the read-out that validation chooses; None without draws.

    Candidates are the mean-field adapter, ensembles of 1, 2, 4, … draws and, where all members are to predict every
    row, weighted members, judged by weights that have not seen the row. Their cost is their passes; of equally many,
    weights are the dearer.
    """
    draws = indices(inputs.members, "mask_draw")
    if not draws:
        return None
    known = {one.system.key: one for one in scored}
    systems = [mask_system(method_name(inputs.config.adapter), draws, size) for size in curve_sizes(len(draws))]
    by_size = [known.get(system.key) or score_system(inputs, system) for system in systems]
    offered = [one for one in by_size if one.system.passes in (1, *table_sizes(len(draws)))]
    weighted = [known[key] for key in WEIGHTED if key in known and inputs.config.ensemble.adaptive is None]
    candidates = [*([known["mean_field"]] if "mean_field" in known else []), *offered, *weighted]
    split, by = inputs.splits["validation"], inputs.config.select.by
    losses = [split.loss(one.predictions["validation", BEFORE], by) for one in candidates]
    costs = [one.system.passes + (0.0 if one.system.weights is None else 0.5) for one in candidates]
    chosen = candidates[choose_cheapest(costs, losses, split.rows, split.units)].system
    members = [inputs.members[index].draw for index in chosen.candidates[0] if index in chosen.used]
    score = CURVE_SCORE[inputs.kind]
    return {
        "score": score,
        "sizes": [system.passes for system in systems],
        "validation": {s: _curve_entry(inputs, by_size, "validation", s) for s in by_size[0].scalings("validation")},
        "test": {s: _curve_entry(inputs, by_size, "test", s) for s in by_size[0].scalings("test")},
        "candidates": [
            {"key": one.system.key, "name": one.system.short_name, "passes": one.system.passes, "loss": loss.point()}
            for one, loss in zip(candidates, losses, strict=True)
        ],
        "chosen": chosen.key,
        "chosen_name": chosen.short_name,
        "chosen_size": sum(draw is not None for draw in members),
        "members": members,
        "weights": None if chosen.weights is None else [share for share in chosen.weights if share > 0.0],
        "adaptive": [_adaptive_entry(inputs, one) for one in adaptive_systems(inputs, table_sizes(len(draws)))],
        "rule": RULE.format(selection_name(by, inputs.kind)),
        "stopped": inputs.config.ensemble.stop_when_flat and len(draws) < inputs.config.ensemble.size,
    }


def _adaptive_entry(inputs: ReportInputs, system: System) -> dict[str, Any]:
    """What drawing until a row is settled saves on the test rows, and costs against all of its draws."""
    split, size = inputs.splits["test"], system.passes
    full = mask_system("", list(system.candidates[0]), size)
    one, whole = score_system(inputs, system), score_system(inputs, full)
    answers = [each.predictions["test", BEFORE][0].argmax(axis=-1) for each in (one, whole)]
    resamples = (split.rows, inputs.config.evaluate.bootstrap_samples, BOOTSTRAP_SEED, split.units)

    def loss(each: ScoredSystem, scaling: str) -> RowMean:
        return RowMean(row_nll(each.predictions["test", scaling], split.labels))

    changed = RowMean((answers[0] != answers[1]).astype(np.float64)[None])
    return {
        "size": size, "margin": system.margin, "passes": system.mean_passes,
        "changed": asdict(bootstrap_interval(changed, *resamples)),
        "nll": {
            scaling: asdict(paired_difference_interval(loss(one, scaling), loss(whole, scaling), *resamples))
            for scaling in (BEFORE, AFTER)
        },
    }


def _curve_entry(
    inputs: ReportInputs, scored: Sequence[ScoredSystem], split: str, scaling: str
) -> dict[str, list[float]]:
    curve, score = size_curve(inputs, scored, split, scaling), CURVE_SCORE[inputs.kind]
    return {score: curve.mean.tolist(), f"{score}_spread": curve.spread.tolist()}
