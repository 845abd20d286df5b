"""All numbers of a report: the content of result.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.report.inputs import ReportInputs
from pipeline.report.scoring import (
    BEFORE,
    BOOTSTRAP_SEED,
    SELECTING_SCORE,
    Resamples,
    ScoredSystem,
    resample,
    score_system,
    size_curve,
)
from pipeline.report.sentences import REFERENCES, write_reading
from pipeline.report.systems import (
    build_systems,
    curve_sizes,
    ensemble_space,
    indices,
    mask_system,
    method_name,
    table_sizes,
)
from pipeline.scores import temperature
from pipeline.scores.bootstrap import LEVEL, Floats, percentile_interval
from pipeline.scores.classification import bin_count, plugin_ece
from pipeline.scores.ensemble import SUBSET_LIMIT, choose_size

COMPARED_SCORES = ("nll", "accuracy", "pearson", "spearman", "rmse")
ECE_ESTIMATOR = "debiased root mean square gap of the top choice over equal-mass bins (arXiv 1909.10155)"
SIZE_RULE = "smallest size whose validation {}, unscaled, is within one standard error of the best size's"


def build_result(inputs: ReportInputs) -> tuple[dict[str, Any], list[ScoredSystem]]:
    """Score every system: the content of result.json, and what plots need besides."""
    scored = [score_system(inputs, system) for system in build_systems(inputs)]
    singles = [one for one in scored if one.system.key in (*REFERENCES, "mean_field")]
    own = {"ensemble": _ensemble_entry(inputs, scored), "left_out": _left_out(inputs)}
    result = {**score_entries(inputs, scored, singles), **own}
    return {**result, "reading": write_reading(result)}, scored


def score_entries(
    inputs: ReportInputs, scored: Sequence[ScoredSystem], singles: Sequence[ScoredSystem]
) -> dict[str, Any]:
    """What is scored and how, every system's scores, and paired differences; those of `singles` on validation, too."""
    config = inputs.config
    test, validation = resample(inputs, scored, "test"), resample(inputs, singles, "validation")
    return {
        "label": config.label,
        "config_sha256": config.sha256(),
        "made_from": inputs.made_from,
        "method": method_name(config.adapter),
        "train_seed": config.train.seed,
        "kind": inputs.kind,
        "rows": {name: split.rows for name, split in inputs.splits.items()},
        "evaluate_seconds": {name: split.seconds for name, split in inputs.splits.items()},
        "average": ensemble_space(inputs),
        "ece": {"estimator": ECE_ESTIMATOR, "bins": bin_count(inputs.splits["test"].rows, config.evaluate.ece_bins)},
        "bootstrap": {"samples": config.evaluate.bootstrap_samples, "seed": BOOTSTRAP_SEED, "level": LEVEL},
        "subset_limit": SUBSET_LIMIT,
        "systems": [_system_entry(inputs, one, test) for one in scored],
        "comparisons": [*_comparisons(scored, test, "test"), *_comparisons(singles, validation, "validation")],
    }


def _system_entry(inputs: ReportInputs, one: ScoredSystem, resamples: Resamples) -> dict[str, Any]:
    used = sorted({index for candidate in one.system.candidates for index in candidate})
    return {
        "key": one.system.key,
        "name": one.system.name,
        "short_name": one.system.short_name,
        "passes": one.system.passes,
        "subsets": len(one.system.candidates),
        "members": [inputs.members[index].name for index in used],
        "temperature": None if one.temperatures is None else _temperature_entry(one.temperatures),
        "validation": {
            scaling: {score: statistic.point() for score, statistic in one.statistics["validation", scaling].items()}
            for scaling in one.scalings("validation")
        },
        "test": {scaling: _test_entry(inputs, one, scaling, resamples) for scaling in one.scalings("test")},
    }


def _temperature_entry(temperatures: Floats) -> dict[str, Any]:
    return {
        "mean": float(temperatures.mean()),
        "min": float(temperatures.min()),
        "max": float(temperatures.max()),
        "at_bound": any(temperature.at_bound(value) for value in temperatures.tolist()),
    }


def _test_entry(inputs: ReportInputs, one: ScoredSystem, scaling: str, resamples: Resamples) -> dict[str, Any]:
    entries: dict[str, Any] = {
        score: asdict(percentile_interval(statistic.point(), resamples[one.system.key, scaling, score]))
        for score, statistic in one.statistics["test", scaling].items()
    }
    if inputs.kind == "completion":
        entries["perplexity"] = {end: float(np.exp(value)) for end, value in entries["nll"].items()}
    elif inputs.kind == "choice":
        predictions, labels = one.predictions["test", scaling], inputs.splits["test"].labels
        entries["ece_plugin"] = float(plugin_ece(predictions, labels, inputs.config.evaluate.ece_bins).mean())
    return entries


def _comparisons(scored: Sequence[ScoredSystem], resamples: Resamples, split: str) -> Iterator[dict[str, Any]]:
    """Paired differences: every system less each reference that is not listed after it."""
    for position, reference in enumerate(scored):
        if reference.system.key not in REFERENCES:
            continue
        for one in scored[position + 1 :]:
            for scaling in one.scalings(split):
                yield from (
                    _comparison(one, reference, resamples, (split, scaling, score))
                    for score in COMPARED_SCORES
                    if score in one.statistics[split, scaling]
                )


def _comparison(
    one: ScoredSystem, reference: ScoredSystem, resamples: Resamples, where: tuple[str, str, str]
) -> dict[str, Any]:
    split, scaling, score = where
    value = one.statistics[split, scaling][score].point() - reference.statistics[split, scaling][score].point()
    paired = resamples[one.system.key, scaling, score] - resamples[reference.system.key, scaling, score]
    interval = percentile_interval(value, paired)
    return {
        "split": split, "scaling": scaling, "score": score,
        "system": one.system.key, "versus": reference.system.key,
        "difference": interval.value, "low": interval.low, "high": interval.high,
        "excludes_zero": interval.excludes_zero,
    }


def _ensemble_entry(inputs: ReportInputs, scored: Sequence[ScoredSystem]) -> dict[str, Any] | None:
    """NLL (or squared error) by number of mask draws, and the size that validation chooses."""
    draws = indices(inputs.members, "mask_draw")
    if not draws:
        return None
    known = {one.system.key: one for one in scored}
    systems = [mask_system(method_name(inputs.config.adapter), draws, size) for size in curve_sizes(len(draws))]
    by_size = [known.get(system.key) or score_system(inputs, system) for system in systems]
    candidates = [1, *table_sizes(len(draws))]
    score = SELECTING_SCORE[inputs.kind]
    offered = [one for one in by_size if one.system.passes in candidates]
    chosen = choose_size(size_curve(offered, "validation", BEFORE, score))
    return {
        "score": score,
        "sizes": [system.passes for system in systems],
        "validation": {s: _curve_entry(by_size, "validation", s, score) for s in by_size[0].scalings("validation")},
        "test": {s: _curve_entry(by_size, "test", s, score) for s in by_size[0].scalings("test")},
        "candidates": candidates,
        "chosen_size": chosen,
        "rule": SIZE_RULE.format(score.upper()),
    }


def _curve_entry(scored: Sequence[ScoredSystem], split: str, scaling: str, score: str) -> dict[str, list[float]]:
    curve = size_curve(scored, split, scaling, score)
    return {score: curve.mean.tolist(), f"{score}_spread": curve.spread.tolist()}


def _left_out(inputs: ReportInputs) -> list[str]:
    """What this report cannot show, and why, in sentences."""
    groups = {member.group for member in inputs.members}
    reasons = {
        "The base model was not predicted: comparisons with it are left out.": "base" not in groups,
        "No plain LoRA run was predicted: comparisons with it are left out.": "plain" not in groups,
        "No mask draws were predicted: mask ensembles are left out.": "mask_draw" not in groups,
        "No searched adapters were predicted: their ensemble is left out.": "searched" not in groups,
        "Only the probabilities of the reference answers' tokens are cached: accuracy, Brier score, ECE and "
        "temperature scaling do not apply.": inputs.kind == "completion",
        "A predicted number has no probabilities: accuracy, NLL, Brier score, ECE and temperature scaling do not "
        "apply.": inputs.kind == "regression",
        "This run has no training metrics: its training curve is left out.": "mean_field" not in inputs.curves,
        "The plain LoRA run has no training metrics here: its training curve is left out.":
            "plain" in groups and "plain" not in inputs.curves,
        "No search belongs to this run: its plot is left out.": inputs.search is None,
    }
    return [sentence for sentence, applies in reasons.items() if applies]
