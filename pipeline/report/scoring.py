"""Systems -> predictions -> statistics, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pipeline.report.inputs import ReportInputs
from pipeline.report.systems import System, ensemble_space, predicted
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores import temperature
from pipeline.scores.bootstrap import Floats, Ints, Refitted, RowMean, Statistic, bootstrap, row_weights
from pipeline.scores.calibration import CalibrationError, PluginCalibrationError
from pipeline.scores.classification import ROW_SCORES, BinaryScore, row_nll
from pipeline.scores.disagreement import rater_scores
from pipeline.scores.ensemble import EnsembleCurve
from pipeline.scores.regression import Correlation, RootMeanSquare, row_squared_error
from pipeline.scores.seeds import Runs

BEFORE, AFTER = "before", "after"
"""Temperature scaling."""
BOOTSTRAP_SEED = 0
CALIBRATION_RESAMPLES = 32
"""Temperatures fitted to resampled calibration rows, which the resamples of a scaled score take in turn."""
UNSCALED_SCORES = ("accuracy", "matthews", "f1")
"""Scores of the top choice, which temperature scaling does not change."""
CURVE_SCORE = {"choice": "nll", "completion": "nll", "regression": "mse"}
"""Kind of rows -> the mean over rows that is shown by size of an ensemble."""

Resamples = Mapping[tuple[str, str, str], Runs]
"""(system key, scaling, score) -> its runs, all on the same resamples of one split's rows."""


@dataclass(frozen=True)
class ScoredSystem:
    """A system's predictions on the validation and test splits, and their scores."""

    inputs: ReportInputs
    system: System
    calibration: Floats
    """(Q, L, C), each candidate's predictions of the calibration split."""
    temperatures: Floats | None
    """(Q,), one per candidate, fitted on its own calibration predictions; None where rows are not choices."""
    predictions: Mapping[tuple[str, str], Floats]
    """(split, scaling) -> (Q, L, C)."""

    def scalings(self, split: str) -> list[str]:
        """before, and after where there is a temperature."""
        return [scaling for name, scaling in self.predictions if name == split]

    @cached_property
    def statistics(self) -> Mapping[tuple[str, str], Mapping[str, tuple[Statistic, ...]]]:
        """(split, scaling) -> score -> a statistic for each training run (`System.runs`)."""
        found: dict[tuple[str, str], dict[str, tuple[Statistic, ...]]] = {}
        for name, scaling in self.predictions:
            by_run = [self._of_run(name, scaling, run) for run in self.system.runs]
            found[name, scaling] = {score: tuple(run[score] for run in by_run) for score in by_run[0]}
            if scaling == AFTER:  # the order of the choices is kept; rounding must not make new ties
                kept = found[name, BEFORE]
                found[name, scaling] |= {score: kept[score] for score in UNSCALED_SCORES if score in kept}
        return found

    @cached_property
    def temperature_ends(self) -> Floats:
        """(Q, 2) ends of the 95 % intervals of the temperatures."""
        return np.array([temperature.posterior_interval(*fit) for fit in self._fits()])

    @cached_property
    def carried(self) -> bool:
        """Whether the calibration rows carry the temperature of every candidate."""
        return all(temperature.is_carried(*fit) for fit in self._fits())

    def _fits(self) -> Iterator[tuple[Floats, Ints, float, Ints | None]]:
        rows = self.inputs.splits["calibration"]
        fitted = [] if self.temperatures is None else self.temperatures.tolist()
        for predictions, value in zip(self.calibration, fitted, strict=True):
            yield predictions, rows.labels, value, rows.units

    def _of_run(self, name: str, scaling: str, run: list[int]) -> dict[str, Statistic]:
        """Statistics of one run. After scaling, resample s takes a temperature fitted to resample s mod R of the
        calibration rows, the same rows for every system."""
        inputs, split = self.inputs, self.inputs.splits[name]
        fitted = _statistics(inputs, split, self.predictions[name, scaling][run])
        if scaling == BEFORE:
            return fitted
        rows, taken = inputs.splits["calibration"], [run[j % len(run)] for j in range(CALIBRATION_RESAMPLES)]
        weights = np.concatenate(list(row_weights(rows.rows, CALIBRATION_RESAMPLES, BOOTSTRAP_SEED + 1, rows.units)))
        temperatures = temperature.fit_temperatures(self.calibration[taken], rows.labels, weights, rows.units)
        before = self.predictions[name, BEFORE][taken]
        refitted = _statistics(inputs, split, temperature.apply_temperature(before, temperatures))
        return {score: Refitted(fitted[score], refitted[score]) for score in fitted}


def score_system(inputs: ReportInputs, system: System) -> ScoredSystem:
    """Average first, then scale by the temperature fitted to the averaged calibration predictions."""
    space = ensemble_space(inputs)
    calibration, temperatures = predicted(system, inputs.splits["calibration"], space), None
    if inputs.kind == "choice":
        rows = inputs.splits["calibration"]
        temperatures = temperature.fit_temperatures(calibration, rows.labels, units=rows.units)
    predictions: dict[tuple[str, str], Floats] = {}
    for name in ("validation", "test"):
        predictions[name, BEFORE] = predicted(system, inputs.splits[name], space, crossed=name == "validation")
        if temperatures is not None:
            predictions[name, AFTER] = temperature.apply_temperature(predictions[name, BEFORE], temperatures)
    return ScoredSystem(inputs, system, calibration, temperatures, predictions)


def on_rows(one: ScoredSystem, rows: LabelledSplit) -> ScoredSystem:
    """The same system, under the same temperatures, with other rows in the place of the test split."""
    predictions = {("test", BEFORE): predicted(one.system, rows, ensemble_space(one.inputs))}
    if one.temperatures is not None:
        predictions["test", AFTER] = temperature.apply_temperature(predictions["test", BEFORE], one.temperatures)
    inputs = replace(one.inputs, splits={**one.inputs.splits, "test": rows})
    return replace(one, inputs=inputs, predictions=predictions)


def resample(inputs: ReportInputs, scored: Sequence[ScoredSystem], split: str) -> Resamples:
    """Every score of every system on the same resamples of a split's units: differences of them are paired."""
    return resample_statistics(inputs, split, {
        (one.system.key, scaling, score): (one.system, runs)
        for one in scored
        for scaling in one.scalings(split)
        for score, runs in one.statistics[split, scaling].items()
    })


def resample_statistics(
    inputs: ReportInputs, split: str, statistics: Mapping[tuple[str, str, str], tuple[System, tuple[Statistic, ...]]]
) -> Resamples:
    """Each system's statistics, one per training run, on the same resamples of a split's units."""
    flat = [statistic for _, runs in statistics.values() for statistic in runs]
    samples, rows = inputs.config.evaluate.bootstrap_samples, inputs.splits[split]
    table = iter(bootstrap(flat, rows.rows, samples, BOOTSTRAP_SEED, rows.units).T)
    return {
        where: Runs(
            np.array([statistic.point() for statistic in runs]), np.stack([next(table) for _ in runs]),
            rows.unit_count, system.seeds,
        )
        for where, (system, runs) in statistics.items()
    }  # fmt: skip


def size_curve(inputs: ReportInputs, scored: Sequence[ScoredSystem], split: str, scaling: str) -> EnsembleCurve:
    """`CURVE_SCORE` by number of members, of systems that differ in nothing else.

    A row of completion data weighs as much as its tokens, so that the mean over rows is the mean per token.
    """
    rows = inputs.splits[split]
    means = [rows.row_mean(_cell_losses(inputs, rows, one.predictions[split, scaling])) for one in scored]
    values = [mean.values if mean.sizes is None else mean.values / mean.sizes.mean() for mean in means]
    return EnsembleCurve.of([one.system.passes for one in scored], values)


def _cell_losses(inputs: ReportInputs, split: LabelledSplit, predictions: Floats) -> Floats:
    """(Q, L)."""
    if inputs.kind == "regression":
        return row_squared_error(predictions, split.labels)
    return -predictions[..., 0] if inputs.kind == "completion" else row_nll(predictions, split.labels)


def _statistics(inputs: ReportInputs, split: LabelledSplit, predictions: Floats) -> dict[str, Statistic]:
    if inputs.kind == "regression":
        squares, values = row_squared_error(predictions, split.labels), predictions[..., 0]
        return {
            "pearson": Correlation(values, split.labels, "pearson"),
            "spearman": Correlation(values, split.labels, "spearman"),
            "rmse": RootMeanSquare(squares),
            "mse": RowMean(squares),
        }
    if inputs.kind == "completion":
        return {"nll": split.row_mean(-predictions[..., 0])}
    scores: dict[str, Statistic] = {name: RowMean(f(predictions, split.labels)) for name, f in ROW_SCORES.items()}
    if predictions.shape[-1] == 2:
        scores |= {kind: BinaryScore.of(predictions, split.labels, kind) for kind in ("matthews", "f1")}
    bins, asked = inputs.config.evaluate.ece_bins, (predictions, split.labels)
    scores["ece"] = CalibrationError.of(*asked, bins, split.units)
    if predictions.shape[-1] > 2:
        scores["ece_classwise"] = CalibrationError.classwise(*asked, bins, split.units)
        scores["ece_classwise_plugin"] = PluginCalibrationError.classwise(*asked)
    scores |= {"ece_plugin": PluginCalibrationError.of(*asked), "ece_adaptive": PluginCalibrationError.adaptive(*asked)}
    return scores if split.raters is None else scores | rater_scores(predictions, split.raters)
