"""All numbers of a report: the content of result.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.report.also.scores import also_entries
from pipeline.report.choices import ensemble_entry
from pipeline.report.inputs import ReportInputs
from pipeline.report.remarks import chance, remarks
from pipeline.report.scoring import BEFORE, BOOTSTRAP_SEED, Resamples, ScoredSystem, resample, score_system
from pipeline.report.sentences import REFERENCES, tuning_line, write_reading
from pipeline.report.systems import build_systems, ensemble_space, indices, method_name
from pipeline.report.uncertainty.scores import risk_coverage_entries, rows_entry, uncertainty_entries
from pipeline.report.weighted import adaptive_systems, weighted_systems
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores import temperature
from pipeline.scores.bootstrap import LEVEL
from pipeline.scores.calibration import PLUGIN_BINS, bin_count, sampling_interval
from pipeline.scores.disagreement import entropy
from pipeline.scores.ensemble import SUBSET_LIMIT
from pipeline.scores.seeds import CLAIM_SEEDS, Runs, difference, within_bounds
from pipeline.scores.selection import selection_name

COMPARED_SCORES = ("nll", "accuracy", "brier", "ece", "pearson", "spearman", "rmse")
ECE_ESTIMATOR = "debiased root mean square gap of the top choice over equal-mass bins (arXiv 1909.10155)"
PLUGIN_ESTIMATOR = "mean absolute gap of the top choice over equal-width bins, biased upwards (arXiv 1706.04599)"
PLUGIN_SCORES = ("ece_plugin", "ece_adaptive", "ece_classwise_plugin")
"""Biased upwards: their intervals are `sampling_interval`s."""
_BOUNDS = {
    "accuracy": (0.0, 1.0), "nll": (0.0, np.inf), "brier": (0.0, 2.0), "ece": (0.0, 1.0), "ece_plugin": (0.0, 1.0),
    "ece_classwise": (0.0, 1.0), "matthews": (-1.0, 1.0), "f1": (0.0, 1.0), "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0), "rmse": (0.0, np.inf), "mse": (0.0, np.inf), "ece_adaptive": (0.0, 1.0),
    "ece_classwise_plugin": (0.0, 1.0), "rater_cross_entropy": (0.0, np.inf), "rater_divergence": (0.0, np.log(2.0)),
    "rater_entropy": (-1.0, 1.0),
}  # fmt: skip


def build_result(inputs: ReportInputs) -> tuple[dict[str, Any], list[ScoredSystem]]:
    """Score every system: the content of result.json, and what plots need besides."""
    all_draws = len(indices(inputs.members, "mask_draw"))
    systems = [*build_systems(inputs), *weighted_systems(inputs), *adaptive_systems(inputs, [all_draws])]
    scored = [score_system(inputs, system) for system in systems]
    singles = [one for one in scored if one.system.key in (*REFERENCES, "mean_field")]
    own = {"ensemble": ensemble_entry(inputs, scored), "left_out": left_out(inputs)}
    result = {**score_entries(inputs, scored, singles), **own}
    result |= {"remarks": remarks(inputs, result)}
    reading = [*write_reading(result), tuning_line(inputs.search)]
    return {**result, "reading": [line for line in reading if line]}, scored


def score_entries(
    inputs: ReportInputs, scored: Sequence[ScoredSystem], singles: Sequence[ScoredSystem]
) -> dict[str, Any]:
    """What is scored and how, every system's scores, and paired differences; those of `singles` on validation, too."""
    config, test_split = inputs.config, inputs.splits["test"]
    test, validation = resample(inputs, scored, "test"), resample(inputs, scored, "validation")
    unsure, resamples = uncertainty_entries(inputs, scored), {"validation": validation, "test": test}
    return {
        "label": config.label,
        "config_sha256": config.sha256(),
        "made_from": inputs.made_from,
        "method": method_name(config.adapter),
        "train_seed": config.train.seed,
        "kind": inputs.kind,
        "rows": {name: split.rows for name, split in inputs.splits.items()},
        "units": {name: split.unit_count for name, split in inputs.splits.items()},
        "evaluate_seconds": {name: split.seconds for name, split in inputs.splits.items()},
        "average": ensemble_space(inputs),
        "selected_by": {"key": config.select.by, "name": selection_name(config.select.by, inputs.kind)},
        "ece": {"estimator": ECE_ESTIMATOR, "bins": bin_count(test_split.unit_count, config.evaluate.ece_bins)},
        "ece_plugin": {"estimator": PLUGIN_ESTIMATOR, "bins": PLUGIN_BINS},
        "temperature_prior_sd": temperature.PRIOR_SD,
        "bootstrap": {"samples": config.evaluate.bootstrap_samples, "seed": BOOTSTRAP_SEED, "level": LEVEL},
        "claim_seeds": CLAIM_SEEDS,
        "subset_limit": SUBSET_LIMIT,
        "chance": chance(inputs),
        "raters": _raters_entry(test_split),
        "risk_coverage": risk_coverage_entries(inputs, scored),
        "rows_to_see": rows_entry(inputs, scored),
        "systems": [
            {**_system_entry(inputs, one, resamples), "uncertainty": unsure[one.system.key]} for one in scored
        ],
        "comparisons": [*_comparisons(scored, test, "test"), *_comparisons(singles, validation, "validation")],
        **({"also": also_entries(inputs, scored, test)} if inputs.also else {}),
    }


def _system_entry(inputs: ReportInputs, one: ScoredSystem, resamples: dict[str, Resamples]) -> dict[str, Any]:
    used, passes = one.system.used, one.system.passes if one.system.mean_passes is None else one.system.mean_passes
    own = {inputs.members[index].group for index in used} <= {"mean_field", "mask_draw"}  # of the same training
    curve = inputs.curves.get("mean_field" if own else one.system.curve or "")
    return {
        "key": one.system.key,
        "name": one.system.name,
        "short_name": one.system.short_name,
        "passes": passes if isinstance(passes, int) else round(passes, 1),
        "subsets": len(one.system.candidates),
        "train_seeds": list(one.system.seeds),
        "members": [inputs.members[index].name for index in used],
        "weights": None if one.system.weights is None else [share for share in one.system.weights if share > 0.0],
        "train_seconds": None if curve is None else curve.seconds,
        "evaluate_seconds": inputs.splits["test"].seconds * passes / sum(m.group != "teacher" for m in inputs.members),
        "temperature": _temperature_entry(one),
        "top_choices": _top_choices(inputs, one),
        **{
            split: {scaling: _scores(one, split, scaling, resamples[split]) for scaling in one.scalings(split)}
            for split in ("validation", "test")
        },
    }


def _raters_entry(split: LabelledSplit) -> dict[str, float] | None:
    """What people say of the test rows: the mean entropy of their choices, the least cross-entropy there is."""
    if split.raters is None:
        return None
    with np.errstate(divide="ignore"):
        return {"entropy": float(entropy(np.log(split.raters)).mean())}


def _temperature_entry(one: ScoredSystem) -> dict[str, Any] | None:
    if one.temperatures is None:
        return None
    ends = one.temperature_ends
    return {
        "mean": float(one.temperatures.mean()),
        "min": float(one.temperatures.min()),
        "max": float(one.temperatures.max()),
        "low": float(ends[:, 0].min()),
        "high": float(ends[:, 1].max()),
        "at_bound": any(temperature.at_bound(value) for value in one.temperatures.tolist()),
        "carried": one.carried,
    }


def _top_choices(inputs: ReportInputs, one: ScoredSystem) -> list[float] | None:
    """Share of test rows (and candidates) that each choice is the most probable one of; None without choices."""
    if inputs.kind != "choice":
        return None
    predictions = one.predictions["test", BEFORE]
    counts = np.bincount(predictions.argmax(axis=-1).ravel(), minlength=predictions.shape[-1])
    return [float(share) for share in counts / counts.sum()]


def _scores(one: ScoredSystem, split: str, scaling: str, resamples: Resamples) -> dict[str, Any]:
    scores = one.statistics[split, scaling]
    entries = {score: _score_entry(score, resamples[one.system.key, scaling, score]) for score in scores}
    if list(scores) == ["nll"]:  # completion
        entries["perplexity"] = {end: float(np.exp(entries["nll"][end])) for end in ("value", "low", "high")}
    return entries


def _score_entry(score: str, runs: Runs) -> dict[str, float]:
    biased = score in PLUGIN_SCORES and len(runs.points) == 1
    interval = sampling_interval(runs.mean, runs.resamples[0]) if biased else runs.interval()
    entry = asdict(within_bounds(interval, *_BOUNDS[score]))
    return entry if runs.spread is None else {**entry, "run_sd": runs.spread}


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
    found = difference(
        resamples[one.system.key, scaling, score], resamples[reference.system.key, scaling, score]
    )
    return {
        "split": split, "scaling": scaling, "score": score,
        "system": one.system.key, "versus": reference.system.key,
        "difference": found.interval.value, "low": found.interval.low, "high": found.interval.high,
        "excludes_zero": found.interval.excludes_zero, "seeds": found.seeds, "run_sd": found.spread,
        "claims": found.claims,
    }  # fmt: skip


def left_out(inputs: ReportInputs) -> list[str]:
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
        "Not every test row says how people rated it (label_counts): agreement with raters is left out.":
            any(row.label_counts for row in inputs.test_rows) and inputs.splits["test"].raters is None,
        "No search belongs to this run: its plot is left out.": inputs.search is None,
    }
    return [sentence for sentence, applies in reasons.items() if applies]
