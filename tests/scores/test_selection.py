"""By what validation chooses: what each loss orders by, and what a cross-fitted temperature takes out of a choice."""

import numpy as np
import pytest
from helpers.simulated import calibrated
from scipy.special import log_softmax
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.config.evaluate import SELECTABLE, check_selection
from pipeline.errors import ConfigError
from pipeline.scores.classification import nll
from pipeline.scores.selection import SELECTION_NAMES, choice_loss, cross_scaled, regression_loss, selection_name
from pipeline.scores.temperature import fit_temperature


@pytest.fixture
def random():
    return np.random.default_rng(0)


def test_losses_are_the_scores_turned_round(random):
    log_probs, labels = calibrated(200, 2, random, 2.0)
    chosen = log_probs.argmax(axis=1)
    expected = {
        "accuracy": 1.0 - accuracy_score(labels, chosen), "matthews": -matthews_corrcoef(labels, chosen),
        "f1": -f1_score(labels, chosen), "nll": float(nll(log_probs, labels)),
    }
    for by, value in expected.items():
        assert choice_loss(by, log_probs[None], labels, None).point() == pytest.approx(value)
    values, scores = random.normal(size=(50, 1)), random.normal(size=50)
    assert regression_loss("pearson", values[None], scores).point() == pytest.approx(-pearsonr(values[:, 0], scores)[0])
    assert regression_loss("nll_scaled", values[None], scores).point() == pytest.approx(
        np.mean((values[:, 0] - scores) ** 2)
    )


def test_each_half_is_scaled_by_the_temperature_of_the_other(random):
    log_probs, labels = calibrated(80, 3, random, 3.0)
    units = np.repeat(np.arange(40), 2)
    first = units % 2 == 0
    scaled = cross_scaled(log_probs[None], labels, units)[0]
    other = fit_temperature(log_probs[~first], labels[~first])
    assert scaled[first] == pytest.approx(log_softmax(log_probs[first] / other, axis=1))
    assert cross_scaled(log_probs[None, :1], labels[:1])[0] == pytest.approx(log_probs[:1]), "nothing to scale by"


def test_what_is_merely_too_sharp_is_not_taken_for_worse(random):
    """The better predictor, twice too sharp, against a worse one that is calibrated."""
    logits = random.normal(scale=1.5, size=600)
    labels = (random.random(600) < 1.0 / (1.0 + np.exp(-logits))).astype(int)
    better = log_softmax(np.stack([np.zeros(600), 3.0 * logits], axis=1), axis=1)
    worse = log_softmax(np.stack([np.zeros(600), 0.7 * logits + 0.6 * random.normal(size=600)], axis=1), axis=1)
    losses = {by: [choice_loss(by, one[None], labels, None).point() for one in (better, worse)]
              for by in ("nll", "nll_scaled")}
    assert losses["nll"][0] > losses["nll"][1] and losses["nll_scaled"][0] < losses["nll_scaled"][1]


@pytest.mark.parametrize(("by", "kind", "choices"), [
    ("accuracy", "completion", 1), ("pearson", "choice", 2), ("nll", "regression", 1), ("f1", "choice", 3),
    ("matthews", "choice", 2), ("accuracy", "choice", 4),
])
def test_what_rows_do_not_have_is_refused_with_what_they_have(by, kind, choices):
    if (by, kind) in (("nll", "regression"), ("matthews", "choice"), ("accuracy", "choice")):
        check_selection(by, kind, choices)
        return
    with pytest.raises(ConfigError, match=r"select\.by = .*is no score of .* Set select\.by to one of nll_scaled"):
        check_selection(by, kind, choices)


def test_every_way_has_a_name():
    assert set(SELECTION_NAMES) == {by for ways in SELECTABLE.values() for by in ways}


def test_only_choices_have_a_temperature_to_choose_under():
    names = [selection_name("nll_scaled", kind) for kind in ("choice", "completion", "regression")]
    assert names == ["NLL under a cross-fitted temperature", "NLL", "mean squared error"]
    assert selection_name("pearson", "regression") == "Pearson's correlation"
