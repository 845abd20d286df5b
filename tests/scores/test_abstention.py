"""The promised risk of answers: kept in a simulation in which the true risk is known, and not by doing without."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from pipeline.scores.abstention import candidates, choose_threshold, least_risk, upper_bounds

RISK, TRIALS, ROWS = 0.1, 600, 800


def population(random: np.random.Generator, rows: int, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, uniform between 0.5 and 1, and whether answers are right: wrong with slope · (1 - confidence)."""
    confidence = random.uniform(0.5, 1.0, rows)
    return confidence, random.uniform(size=rows) >= slope * (1.0 - confidence)


def true_risk(threshold: float, slope: float) -> float:
    """The mean of slope · (1 - c) over c uniform from the threshold to 1."""
    return slope * (1.0 - max(threshold, 0.5)) / 2.0


@pytest.mark.parametrize(("slope", "most"), [(0.3, 1.0), (0.45, 0.89), (0.8, 0.5)])
def test_the_promised_risk_is_kept(slope: float, most: float) -> None:
    """At least 95 of 100 calibrations keep it, within three standard errors; a share `most` could be answered."""
    random = np.random.default_rng(7)
    broken, found = 0, []
    for _ in range(TRIALS):
        thresholds = candidates(population(random, ROWS, slope)[0])
        chosen = choose_threshold(*population(random, ROWS, slope), thresholds, RISK)
        if chosen is not None:
            found.append(chosen.answered)
            broken += true_risk(chosen.confidence, slope) > RISK
    assert broken / TRIALS <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / TRIALS)
    assert len(found) > 0.4 * TRIALS, "a promise that is never made is easily kept"
    assert 0.6 * most < np.mean(found) / ROWS <= most


def test_the_measured_risk_alone_would_break_it() -> None:
    random = np.random.default_rng(7)
    broken = 0
    for _ in range(300):
        confidence, correct = population(random, ROWS, 0.8)
        thresholds = candidates(confidence)
        risks = [(~correct[confidence >= t]).mean() if (confidence >= t).any() else 1.0 for t in thresholds]
        last = max((k for k, risk in enumerate(risks) if risk <= RISK), default=0)
        broken += true_risk(float(thresholds[last]), 0.8) > RISK
    assert broken > 100


def test_the_bounds_are_those_of_the_binomial() -> None:
    answered, wrong = np.array([59, 100, 40, 0, 3]), np.array([0, 4, 40, 0, 3])
    bounds = upper_bounds(answered, wrong, 0.95)
    for n, k, bound in zip(answered[:2], wrong[:2], bounds[:2], strict=True):
        assert abs(binom.cdf(k, n, bound) - 0.05) < 1e-9
    assert bounds[2:].tolist() == [1.0, 1.0, 1.0]


def test_no_threshold_where_nothing_can_be_shown_and_the_least_risk_that_can() -> None:
    random = np.random.default_rng(0)
    confidence, correct = population(random, 40, 0.5)
    thresholds = candidates(population(random, 40, 0.5)[0])
    assert thresholds[-1] == 0.0 and np.all(np.diff(thresholds) < 0)
    assert choose_threshold(confidence, correct, thresholds, 0.01) is None
    least = least_risk(confidence, correct, thresholds)
    assert least is not None and least_risk(confidence, ~correct & False, thresholds) is None
    chosen = choose_threshold(confidence, correct, thresholds, least)
    assert chosen is not None and choose_threshold(confidence, correct, thresholds, least - 0.005) is None
    assert f"at most {least:.1%} of answers" in chosen.guarantee and "of 40)" in chosen.guarantee
    sure = choose_threshold(np.ones(500), np.ones(500, dtype=bool), candidates(np.ones(50)), 0.05)
    assert sure is not None and sure.answered == 500
