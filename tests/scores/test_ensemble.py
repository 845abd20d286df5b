"""Averages and subsets against plain probability arithmetic; choices on data whose answer is known."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import gmean

from pipeline.scores import ensemble
from pipeline.scores.bootstrap import RowMean
from pipeline.scores.classification import nll, row_correct, row_nll
from pipeline.scores.ensemble import average, choose_adapters, choose_cheapest, ensemble_curve, subsets


def predictions(members, rows=40, choices=3, seed=0, scale=2.0):
    return log_softmax(np.random.default_rng(seed).normal(scale=scale, size=(members, rows, choices)), axis=-1)


def test_probability_average_is_the_mean_of_probabilities():
    logs = predictions(5)
    assert np.exp(average(logs)) == pytest.approx(np.exp(logs).mean(axis=0))


def test_logit_average_is_the_normalised_geometric_mean():
    logs = predictions(5)
    geometric = gmean(np.exp(logs), axis=0)
    assert np.exp(average(logs, "logit")) == pytest.approx(geometric / geometric.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_averages_are_stable_for_tiny_probabilities_and_missing_choices(space):
    logs = np.array([[[0.0, -900.0, -np.inf]], [[0.0, -901.0, -np.inf]]])
    result = average(logs, space)[0]
    assert np.isneginf(result[2]) and -901.0 <= result[1] <= -900.0 and result[0] == pytest.approx(0.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), members=st.integers(1, 6), space=st.sampled_from(["probability", "logit"]))
def test_an_ensemble_of_one_is_its_member_and_order_does_not_matter(seed, members, space):
    logs = predictions(members, seed=seed)
    order = np.random.default_rng(seed).permutation(members)
    assert average(logs[:1], space) == pytest.approx(logs[0])
    assert average(logs[order], space) == pytest.approx(average(logs, space))


def test_the_mixture_is_never_worse_than_its_members_on_average():
    logs, labels = predictions(6, rows=200), np.random.default_rng(1).integers(3, size=200)
    assert nll(average(logs), labels) <= nll(logs, labels).mean()


@pytest.mark.parametrize(("members", "size"), [(8, 1), (8, 4), (8, 8), (40, 3), (64, 32)])
def test_subsets_are_distinct_sorted_and_start_with_the_prefix(members, size):
    found = subsets(members, size, limit=20, seed=3)
    assert found.shape == (min(20, math.comb(members, size)), size)
    assert len({tuple(s) for s in found.tolist()}) == len(found)
    assert (np.diff(found, axis=1) > 0).all() and found.min() >= 0 and found.max() < members
    assert found[0].tolist() == list(range(size))
    assert np.array_equal(found, subsets(members, size, limit=20, seed=3))


def test_few_subsets_are_all_of_them():
    assert {tuple(s) for s in subsets(5, 3, limit=10).tolist()} == set(itertools.combinations(range(5), 3))


def test_sampled_subsets_use_every_member_equally():
    counts = np.bincount(subsets(20, 5, limit=2000, seed=0).ravel(), minlength=20)
    assert counts.mean() == 500 and np.abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


@pytest.mark.parametrize("size", [0, 9])
def test_a_size_without_subsets_is_refused(size):
    with pytest.raises(ValueError, match="must be in"):
        subsets(8, size)


@pytest.mark.parametrize("score", [row_nll, row_correct])
def test_curve_is_the_mean_over_all_subsets(score):
    logs, labels = predictions(4), np.random.default_rng(2).integers(3, size=40)
    curve = ensemble_curve(logs, labels, [1, 3, 4], score)
    for position, size in enumerate([1, 3, 4]):
        every = [score(average(logs[list(s)]), labels).mean() for s in itertools.combinations(range(4), size)]
        assert curve.mean[position] == pytest.approx(np.mean(every))
        assert curve.spread[position] == pytest.approx(np.std(every, ddof=1) if len(every) > 1 else 0.0)
    assert curve.row_values.mean(axis=1) == pytest.approx(curve.mean)


def test_the_cheapest_within_one_standard_error_of_the_best_is_chosen():
    random = np.random.default_rng(0)
    base = random.normal(size=400)
    noise = random.normal(size=400)
    noise = (noise - noise.mean()) / noise.std()  # exact mean 0 and sd 1: standard error 0.05

    def choose(gaps, costs=(1, 2, 4, 8)):
        rows = [base + gap + (noise if gap else 0.0) for gap in gaps]
        return choose_cheapest(costs, [RowMean(row[None]) for row in rows], 400)

    assert choose([0.2, 0.06, 0.04, 0.0]) == 2
    assert choose([0.2, 0.04, 0.06, 0.0]) == 1
    assert choose([0.2, 0.2, 0.2, 0.0]) == 3
    assert choose([0.0, 0.2, 0.2, 0.2]) == 0
    assert choose([0.04, 0.03, 0.2, 0.0], costs=(1, 1, 2, 4)) == 1, "of equal cost the better one"


def test_the_standard_error_of_a_choice_is_that_of_units():
    """100 documents of 10 equal rows: the gap is 2 standard errors over rows, 0.6 over documents."""
    random = np.random.default_rng(1)
    noise = random.normal(size=100)
    units = np.repeat(np.arange(100), 10)
    difference = ((noise - noise.mean()) / noise.std() + 0.063)[units]
    losses = [RowMean(difference[None]), RowMean(np.zeros((1, 1000)))]
    assert choose_cheapest([1, 8], losses, 1000) == 1
    assert choose_cheapest([1, 8], losses, 1000, units) == 0


def test_size_grows_when_members_are_noisy_and_not_when_they_agree():
    random = np.random.default_rng(3)
    truth = random.normal(scale=2.0, size=(800, 2))
    labels = (random.random(800) < np.exp(log_softmax(truth, axis=1))[:, 1]).astype(int)
    noisy = log_softmax(truth + random.normal(scale=3.0, size=(16, 800, 2)), axis=-1)
    equal = np.repeat(log_softmax(truth, axis=-1)[None], 16, axis=0)

    def choose(members):
        rows = ensemble_curve(members, labels, [1, 2, 4, 8, 16]).row_values
        return choose_cheapest([1, 2, 4, 8, 16], [RowMean(row[None]) for row in rows], 800)

    assert choose(noisy) >= 2 and choose(equal) == 0


def test_greedy_selection_equals_exhaustive_search_step_by_step():
    logs, labels = list(predictions(5, rows=60)), np.random.default_rng(5).integers(3, size=60)
    order: list[int] = []
    for _ in range(5):
        losses = {k: float(nll(average(np.stack([logs[i] for i in [*order, k]])), labels))
                  for k in range(5) if k not in order}
        order.append(min(losses, key=losses.get))
    path = [float(nll(average(np.stack([logs[i] for i in order[: n + 1]])), labels)) for n in range(5)]
    chosen = choose_adapters(logs, 5, lambda one: nll(one, labels))
    assert chosen == tuple(order) and path[0] == min(float(nll(one, labels)) for one in logs)
    assert choose_adapters(logs, 2, lambda one: nll(one, labels)) == tuple(order[:2])


def test_greedy_selection_starts_from_the_best_and_leaves_bad_adapters_out():
    random = np.random.default_rng(6)
    labels = random.integers(2, size=500)
    right = 2.0 * np.eye(2)[labels]
    good = [log_softmax(right + random.normal(scale=1.5, size=(500, 2)), axis=-1) for _ in range(2)]
    bad = log_softmax(-3.0 * right, axis=-1)
    order = choose_adapters([bad, *good], 3, lambda one: nll(one, labels))
    best = 1 + int(np.argmin([nll(one, labels) for one in good]))
    assert order[0] == best and order[2] == 0
    stack = np.stack([bad, *good])[list(order)]
    losses = [RowMean(row_nll(average(stack[:size]), labels)[None]) for size in (1, 2, 3)]
    assert choose_cheapest([1, 2, 3], losses, 500) == 1, "two of them: the third is left out"


def test_subset_limit_is_the_default():
    assert len(subsets(12, 6)) == ensemble.SUBSET_LIMIT
