"""Systems -> predictions -> statistics, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.inputs import ReportInputs
from pipeline.report.systems import System, ensemble_space
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores import temperature
from pipeline.scores.bootstrap import Floats, RowMean, Statistic, bootstrap
from pipeline.scores.classification import ROW_SCORES, BinaryScore, CalibrationError
from pipeline.scores.ensemble import EnsembleCurve, Space, average
from pipeline.scores.regression import Correlation, RootMeanSquare, row_squared_error

BEFORE, AFTER = "before", "after"
"""Temperature scaling."""
BOOTSTRAP_SEED = 0
UNSCALED_SCORES = ("accuracy", "matthews", "f1")
"""Scores of the top choice, which temperature scaling does not change."""
SELECTING_SCORE = {"choice": "nll", "completion": "nll", "regression": "mse"}
"""Kind of rows -> the mean over rows by which validation chooses the size of an ensemble."""

Resamples = Mapping[tuple[str, str, str], Floats]
"""(system key, scaling, score) -> (S,), all on the same resamples of one split's rows."""


@dataclass(frozen=True)
class ScoredSystem:
    """A system's predictions on the validation and test splits, and their scores."""

    system: System
    temperatures: Floats | None
    """(Q,), one per candidate, fitted on its own calibration predictions; None where rows are not choices."""
    predictions: Mapping[tuple[str, str], Floats]
    """(split, scaling) -> (Q, L, C)."""
    statistics: Mapping[tuple[str, str], Mapping[str, Statistic]]
    """(split, scaling) -> score -> statistic."""

    def scalings(self, split: str) -> list[str]:
        """before, and after where there is a temperature."""
        return [scaling for name, scaling in self.statistics if name == split]


def score_system(inputs: ReportInputs, system: System) -> ScoredSystem:
    """Average first, then scale by the temperature fitted to the averaged calibration predictions."""
    space = ensemble_space(inputs)
    temperatures = None
    if inputs.kind == "choice":
        calibration = inputs.splits["calibration"]
        temperatures = temperature.fit_temperatures(_predict(calibration, system, space), calibration.labels)
    predictions: dict[tuple[str, str], Floats] = {}
    statistics: dict[tuple[str, str], dict[str, Statistic]] = {}
    for name in ("validation", "test"):
        before = predictions[name, BEFORE] = _predict(inputs.splits[name], system, space)
        statistics[name, BEFORE] = _statistics(inputs, inputs.splits[name], before)
        if temperatures is not None:
            after = predictions[name, AFTER] = temperature.apply_temperature(before, temperatures)
            # Scaling keeps the order of the choices; rounding must not make new ties.
            kept = {score: one for score, one in statistics[name, BEFORE].items() if score in UNSCALED_SCORES}
            statistics[name, AFTER] = _statistics(inputs, inputs.splits[name], after) | kept
    return ScoredSystem(system, temperatures, predictions, statistics)


def resample(inputs: ReportInputs, scored: Sequence[ScoredSystem], split: str) -> Resamples:
    """Every score of every system on the same resamples of a split's questions: differences of them are paired."""
    statistics = {
        (one.system.key, scaling, score): statistic
        for one in scored
        for scaling in one.scalings(split)
        for score, statistic in one.statistics[split, scaling].items()
    }
    samples = inputs.config.evaluate.bootstrap_samples
    rows, units = inputs.splits[split].rows, inputs.splits[split].units
    table = bootstrap(list(statistics.values()), rows, samples, BOOTSTRAP_SEED, units)
    return dict(zip(statistics, table.T, strict=True))


def size_curve(scored: Sequence[ScoredSystem], split: str, scaling: str, score: str) -> EnsembleCurve:
    """A mean over rows (NLL, squared error) by number of members, of systems that differ in nothing else.

    A row of completion data weighs as much as its tokens, so that the mean over rows is the mean per token.
    """
    statistics = [one.statistics[split, scaling][score] for one in scored]
    values = [s.values if s.sizes is None else s.values / s.sizes.mean() for s in statistics if isinstance(s, RowMean)]
    return EnsembleCurve.of([one.system.passes for one in scored], values)


def _predict(split: LabelledSplit, system: System, space: Space) -> Floats:
    """(Q, L, C), one average per candidate."""
    return np.stack([average(split.outputs[list(candidate)], space) for candidate in system.candidates])


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
    return {**scores, "ece": CalibrationError.of(predictions, split.labels, inputs.config.evaluate.ece_bins)}
