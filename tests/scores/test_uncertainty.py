"""AUROC and risk by coverage against scikit-learn, torchmetrics, and every order of equal rows written out."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as entropy_of
from scipy.stats import pearsonr
from sklearn.metrics import log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from pipeline.run_folder.labelled import rater_shares
from pipeline.scores.bootstrap import bootstrap_interval, row_weights
from pipeline.scores.calibration import PluginCalibrationError
from pipeline.scores.disagreement import rater_scores, row_cross_entropy, row_divergence
from pipeline.scores.uncertainty import Auroc, RiskCoverageArea, doubt_of_choice, risk_coverage


def cases() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> (doubt, wrong)."""
    random = np.random.default_rng(0)
    doubt, wrong = random.normal(size=60), (random.random(60) < 0.3).astype(float)
    infinite = np.where(random.random(60) < 0.3, np.inf, np.round(doubt))
    return {
        "random": (doubt, wrong), "ties": (np.round(doubt), wrong), "one value": (np.zeros(60), wrong),
        "found": (wrong + 0.1 * random.random(60), wrong), "inverted": (-wrong, wrong),
        "infinite": (infinite, wrong), "minus infinite": (-infinite, wrong), "sorted file": (np.sort(doubt), wrong),
        "one wrong": (doubt, np.eye(60)[3]), "one right": (doubt, 1.0 - np.eye(60)[3]),
        "all right": (doubt, np.zeros(60)), "all wrong": (doubt, np.ones(60)),
        "one row, right": (np.array([0.3]), np.array([0.0])), "one row, wrong": (np.array([0.3]), np.array([1.0])),
    }  # fmt: skip


def area_over_orders(doubt: np.ndarray, wrong: np.ndarray) -> float:
    """AURC, exactly: in each group of equals the expected number of errors among its first j, in fractions."""
    order, errors, taken, total = np.argsort(doubt), Fraction(0), 0, Fraction(0)
    for _, group in itertools.groupby(order.tolist(), key=lambda row: doubt[row]):
        rows = list(group)
        rate = Fraction(int(sum(wrong[row] for row in rows)), len(rows))
        for _ in rows:
            errors, taken = errors + rate, taken + 1
            total += errors / taken
    return float(total / len(doubt))


def area_of(wrong: np.ndarray) -> float:
    """AURC of rows in the order of their doubt."""
    return float(np.mean([wrong[:k].mean() for k in range(1, len(wrong) + 1)]))


@pytest.mark.parametrize("name", cases())
def test_auroc_equals_scikit_learn_and_torchmetrics(name: str) -> None:
    doubt, wrong = cases()[name]
    found = Auroc(doubt[None], wrong[None])
    if wrong.min() == wrong.max():
        assert np.isnan(found.point()) and np.isnan(found.resampled(np.ones((3, len(wrong))))).all()
        return
    finite = np.clip(doubt, -1e6, 1e6)  # they refuse infinite scores
    assert found.point() == pytest.approx(roc_auc_score(wrong, finite))
    ranks = torch.tensor(np.unique(finite, return_inverse=True)[1] / 1000.0)  # in [0, 1], which they take for scores
    assert found.point() == pytest.approx(float(binary_auroc(ranks, torch.tensor(wrong).long())), abs=1e-6)
    (weights,) = row_weights(len(wrong), 20, 1)
    theirs = [roc_auc_score(wrong, finite, sample_weight=one) if 0 < one @ wrong < one.sum() else np.nan
              for one in weights]
    np.testing.assert_allclose(found.resampled(weights), theirs, rtol=1e-9)


@pytest.mark.parametrize("name", cases())
def test_risk_coverage_is_the_mean_over_every_order_of_equal_rows(name: str) -> None:
    doubt, wrong = cases()[name]
    expected, best = area_over_orders(doubt, wrong), area_of(np.sort(wrong))
    area, excess = (RiskCoverageArea(doubt[None], wrong[None], kind) for kind in ("aurc", "e_aurc"))
    assert area.point() == pytest.approx(expected, rel=1e-12)
    assert excess.point() == pytest.approx(expected - best, abs=1e-12) and excess.point() >= 0.0
    coverage, risk = risk_coverage(doubt, wrong)
    assert risk.mean() == pytest.approx(expected) and risk[-1] == pytest.approx(wrong.mean()) and coverage[-1] == 1.0
    shuffled = np.random.default_rng(1).permutation(len(doubt))
    assert RiskCoverageArea(doubt[None, shuffled], wrong[None, shuffled], "aurc").point() == pytest.approx(expected)
    (weights,) = row_weights(len(wrong), 10, 2)
    copies = [np.repeat(np.arange(len(wrong)), one.astype(int)) for one in weights]
    theirs = [area_over_orders(doubt[rows], wrong[rows]) for rows in copies]
    np.testing.assert_allclose(area.resampled(weights), theirs, rtol=1e-9)
    theirs = [all_of - area_of(np.sort(wrong[rows])) for all_of, rows in zip(theirs, copies, strict=True)]
    np.testing.assert_allclose(excess.resampled(weights), theirs, atol=1e-12)


def test_the_mean_over_orders_is_that_of_all_permutations() -> None:
    doubt, wrong = np.array([0.0, 1.0, 1.0, 1.0, 2.0, 2.0]), np.array([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    orders = [order for order in itertools.permutations(range(6)) if (np.diff(doubt[list(order)]) >= 0.0).all()]
    assert len(orders) == 12
    expected = np.mean([area_of(wrong[list(order)]) for order in orders])
    assert RiskCoverageArea(doubt[None], wrong[None], "aurc").point() == pytest.approx(expected)


def test_perfect_order_of_many_rows_has_the_area_of_the_paper_and_no_excess() -> None:
    wrong = np.repeat([0.0, 1.0], [8000, 2000])
    area = RiskCoverageArea(wrong[None], wrong[None], "aurc")
    assert area.point() == pytest.approx(0.2, abs=0.2)  # one group of equals behind another
    sorted_rows = np.arange(10_000.0)
    perfect = RiskCoverageArea(sorted_rows[None], wrong[None], "aurc").point()
    assert perfect == pytest.approx(0.2 + 0.8 * np.log(0.8), abs=1e-4)
    assert RiskCoverageArea(sorted_rows[None], wrong[None], "e_aurc").point() == pytest.approx(0.0, abs=1e-12)


def test_several_predictors_are_averaged_and_each_resample_is_of_one() -> None:
    random = np.random.default_rng(3)
    doubt, wrong = random.normal(size=(3, 40)), (random.random((3, 40)) < 0.4).astype(float)
    wrong[2] = 0.0  # of this one nothing is to be found
    singles = [Auroc(doubt[[q]], wrong[[q]]) for q in range(3)]
    assert Auroc(doubt, wrong).point() == pytest.approx(np.mean([one.point() for one in singles[:2]]))
    (weights,) = row_weights(40, 9, 0)
    found = Auroc(doubt, wrong).resampled(weights)
    np.testing.assert_allclose(found, [singles[s % 3].resampled(weights[[s]])[0] for s in range(9)])
    assert np.isnan(found[2::3]).all()


def test_the_interval_covers_the_area_of_other_samples() -> None:
    random, covered = np.random.default_rng(5), 0
    for _ in range(60):
        wrong = (random.random(300) < 0.3).astype(float)
        doubt = random.normal(size=300) + wrong  # AUROC = Phi(1 / sqrt 2)
        interval = bootstrap_interval(Auroc(doubt[None], wrong[None]), 300, 200)
        covered += interval.low <= 0.7602 <= interval.high
    assert covered >= 51  # 57 expected; P(fewer than 51) < 1e-3


def test_doubt_orders_rows_as_confidence_does_where_probabilities_are_rounded_to_1() -> None:
    log_probs = np.array([[-1e-20, -46.0], [-1e-30, -69.0], [-0.1, -np.inf]])
    assert np.exp(log_probs[0, 0]) == np.exp(log_probs[1, 0]) == 1.0
    assert np.argsort(doubt_of_choice(log_probs)).tolist() == [1, 0, 2]


# --- calibration errors of every class --------------------------------------------------------------------------------


def simplex(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities, labels)."""
    random = np.random.default_rng(7)
    probabilities, labels = random.dirichlet(np.ones(4), size=150), random.integers(4, size=150)
    if name == "a choice that rows lack":
        probabilities[::2, 3], labels[::2] = 0.0, labels[::2] % 3
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    if name == "all right":
        labels = probabilities.argmax(axis=1)
    if name == "one class":
        labels = np.zeros(150, dtype=int)
    if name == "one row":
        probabilities, labels = probabilities[:1], labels[:1]
    if name == "one-hot, half wrong":
        probabilities = np.eye(4)[random.integers(4, size=150)]
        labels = np.where(np.arange(150) % 2, probabilities.argmax(axis=1), (probabilities.argmax(axis=1) + 1) % 4)
    return probabilities, labels


NAMES = ("random", "a choice that rows lack", "all right", "one class", "one row", "one-hot, half wrong")


@pytest.mark.parametrize("name", NAMES)
def test_classwise_ece_equals_torchmetrics_class_by_class(name: str) -> None:
    probabilities, labels = simplex(name)
    with np.errstate(divide="ignore"):
        found = PluginCalibrationError.classwise(np.log(probabilities)[None], labels)
    theirs = [
        float(binary_calibration_error(torch.tensor(probabilities[:, c]), torch.tensor((labels == c).astype(int)), 15))
        for c in range(4)
    ]
    assert found.point() == pytest.approx(np.mean(theirs), abs=1e-6)
    if name == "one-hot, half wrong":
        assert found.point() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_adaptive_ece_is_that_of_rows_sorted_and_cut(name: str) -> None:
    probabilities, labels = simplex(name)
    with np.errstate(divide="ignore"):
        found = PluginCalibrationError.adaptive(np.log(probabilities)[None], labels)
    if name in ("random", "all right", "one class"):  # no ties: 15 bins of 10 rows, each of the same weight
        order = np.argsort(probabilities, axis=0)
        gaps = np.take_along_axis(probabilities - np.eye(4)[labels], order, axis=0)
        assert found.point() == pytest.approx(np.abs(gaps.reshape(15, 10, 4).mean(axis=1)).mean())
    ones, doubled = np.ones((1, len(labels))), np.concatenate([found.gaps] * 2)
    assert found.resampled(ones)[0] == pytest.approx(found.point())
    both = PluginCalibrationError(doubled, np.concatenate([found.bins] * 2))
    assert both.point() == pytest.approx(found.point())
    again = np.argsort(np.random.default_rng(0).random(len(labels)))
    with np.errstate(divide="ignore"):
        other = PluginCalibrationError.adaptive(np.log(probabilities[again])[None], labels[again])
    assert other.point() == pytest.approx(found.point()), "equal probabilities share a bin, in any order"


# --- people -----------------------------------------------------------------------------------------------------------


def test_agreement_with_raters_equals_scipy_and_scikit_learn() -> None:
    random = np.random.default_rng(2)
    predicted, people = random.dirichlet(np.ones(3), size=40), random.dirichlet(np.ones(3), size=40)
    predicted[:5] = [0.3, 0.7, 0.0]
    people[:5], people[5:9] = [0.5, 0.5, 0.0], [0.0, 1.0, 0.0]
    with np.errstate(divide="ignore"):
        logs = np.log(predicted)
    np.testing.assert_allclose(row_divergence(logs, people), jensenshannon(predicted.T, people.T) ** 2, atol=1e-12)
    repeated, choices = np.repeat(predicted, 3, axis=0), np.tile(np.arange(3), 40)
    assert row_cross_entropy(logs, people).mean() * 40 == pytest.approx(
        log_loss(choices, repeated, sample_weight=people.ravel(), normalize=False, labels=[0, 1, 2]))
    expected = pearsonr(entropy_of(predicted, axis=1), entropy_of(people, axis=1)).statistic
    assert rater_scores(logs[None], people)["rater_entropy"].point() == pytest.approx(expected)
    with np.errstate(divide="ignore"):
        assert row_divergence(np.log(people[5:6]), people[5:6])[0] == 0.0
    opposite = np.array([[0.0, -np.inf]])
    assert row_divergence(opposite, np.array([[0.0, 1.0]]))[0] == pytest.approx(np.log(2.0))
    assert row_cross_entropy(opposite, np.array([[1.0, 0.0]]))[0] == 0.0
    assert np.isinf(row_cross_entropy(opposite, np.array([[0.5, 0.5]]))[0])


def test_shares_of_raters_are_there_where_every_row_counts_them() -> None:
    shares = rater_shares([(1.0, 3.0), (2.0, 1.0, 1.0)], 3)
    assert shares is not None
    np.testing.assert_allclose(shares, [[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]])
    assert rater_shares([(1.0, 3.0), ()], 2) is None
