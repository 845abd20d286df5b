"""What validation chooses among the read-outs of one adapter: mean-field, or an ensemble of mask draws and its size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.report.inputs import ReportInputs
from pipeline.report.scoring import BEFORE, CURVE_SCORE, ScoredSystem, score_system, size_curve
from pipeline.report.systems import curve_sizes, indices, mask_system, method_name, table_sizes
from pipeline.scores.ensemble import choose_cheapest
from pipeline.scores.selection import selection_name

RULE = "cheapest read-out whose validation {} is within one paired standard error of the best one's"


def ensemble_entry(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> dict[str, Any] | None:
    """NLL (or squared error) by number of mask draws, and the read-out that validation chooses; None without draws.

    Candidates are the mean-field adapter and ensembles of 1, 2, 4, … draws; their cost is their passes.
    """
    draws = indices(inputs.members, "mask_draw")
    if not draws:
        return None
    known = {one.system.key: one for one in scored}
    systems = [mask_system(method_name(inputs.config.adapter), draws, size) for size in curve_sizes(len(draws))]
    by_size = [known.get(system.key) or score_system(inputs, system) for system in systems]
    offered = [one for one in by_size if one.system.passes in (1, *table_sizes(len(draws)))]
    candidates = [*([known["mean_field"]] if "mean_field" in known else []), *offered]
    split, by = inputs.splits["validation"], inputs.config.select.by
    losses = [split.loss(one.predictions["validation", BEFORE], by) for one in candidates]
    passes = [one.system.passes for one in candidates]
    chosen = candidates[choose_cheapest(passes, losses, split.rows, split.units)].system
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
        "chosen_size": 0 if chosen.key == "mean_field" else chosen.passes,
        "rule": RULE.format(selection_name(by, inputs.kind)),
        "stopped": inputs.config.ensemble.stop_when_flat and len(draws) < inputs.config.ensemble.size,
    }


def _curve_entry(
    inputs: ReportInputs, scored: Sequence[ScoredSystem], split: str, scaling: str
) -> dict[str, list[float]]:
    curve, score = size_curve(inputs, scored, split, scaling), CURVE_SCORE[inputs.kind]
    return {score: curve.mean.tolist(), f"{score}_spread": curve.spread.tolist()}
