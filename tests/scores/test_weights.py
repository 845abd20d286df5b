"""Greedy selection against lists of members taken by brute force; fitted weights against scipy's minimisation."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from pipeline.scores.classification import row_nll
from pipeline.scores.ensemble import average
from pipeline.scores.weights import STEPS, fit_weights, greedy_counts, without_small


def right_answers(members, rows, seed):
    """log p of the right answers: members of different skill, each with an opinion of its own."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=rows)
    skill = random.uniform(0.0, 2.0, size=(members, 1, 1))
    logits = skill * np.eye(3)[labels] + random.normal(scale=1.5, size=(members, rows, 3))
    return -row_nll(log_softmax(logits, axis=-1), labels)


def mixture_nll(right, weights):
    return -np.log(np.asarray(weights) @ np.exp(right)).mean()


@pytest.mark.parametrize("seed", range(5))
def test_fitted_weights_are_those_of_a_convex_minimisation(seed):
    right = right_answers(6, 200, seed)
    found = fit_weights(right)
    bounds, simplex = [(0.0, 1.0)] * 6, {"type": "eq", "fun": lambda weights: weights.sum() - 1.0}
    least = minimize(
        lambda weights: mixture_nll(right, weights), np.full(6, 1 / 6), bounds=bounds, constraints=simplex,
        method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
    )
    assert found.sum() == pytest.approx(1.0) and (found >= 0.0).all()
    assert abs(mixture_nll(right, found) - least.fun) < 2e-6
    assert found == pytest.approx(least.x, abs=5e-3)


def test_members_alike_keep_their_weights_and_a_useless_one_loses_its_own():
    one = right_answers(1, 300, 0)
    assert fit_weights(np.repeat(one, 4, axis=0)) == pytest.approx(0.25)
    found = without_small(fit_weights(np.concatenate([one, one - 3.0])))
    assert found.tolist() == [1.0, 0.0]


def test_small_weights_are_no_pass_worth():
    assert without_small(np.array([0.005, 0.495, 0.5])) == pytest.approx([0.0, 0.495 / 0.995, 0.5 / 0.995])


@pytest.mark.parametrize(("most", "seed"), [(1, 0), (2, 1), (3, 2), (5, 3)])
def test_greedy_selection_takes_what_brute_force_takes_at_each_step(most, seed):
    right = right_answers(5, 80, seed)
    taken: list[int] = []
    while len(taken) < STEPS:
        offered = [k for k in range(5) if k in taken or len(set(taken)) < most]
        losses = [-np.log(np.exp(right[[*taken, k]]).mean(axis=0)).mean() for k in offered]
        before = -np.log(np.exp(right[taken]).mean(axis=0)).mean() if taken else np.inf
        if min(losses) >= before:
            break
        taken.append(offered[int(np.argmin(losses))])
    counts = greedy_counts(5, most, lambda weights: mixture_nll(right, weights))
    assert counts.tolist() == [taken.count(k) for k in range(5)]
    assert np.count_nonzero(counts) <= most


def test_greedy_selection_of_two_steps_is_the_best_pair_that_holds_the_best_member():
    right = right_answers(4, 60, 7)
    pairs = {pair: mixture_nll(right, np.bincount(pair, minlength=4) / 2)
             for pair in itertools.combinations_with_replacement(range(4), 2)}
    best = int(np.argmin([mixture_nll(right, np.eye(4)[k]) for k in range(4)]))
    expected = min((pair for pair in pairs if best in pair), key=pairs.get)
    counts = greedy_counts(4, 4, lambda weights: mixture_nll(right, weights), steps=2)
    wanted = [best] if pairs[expected] >= pairs[best, best] else expected
    assert counts.tolist() == np.bincount(wanted, minlength=4).tolist()


def test_what_is_infinitely_wrong_everywhere_still_has_a_selection():
    assert greedy_counts(3, 2, lambda weights: np.inf).tolist() == [1, 0, 0]


@pytest.mark.parametrize("space", ["probability", "logit", "value"])
def test_weights_count_as_members_taken_so_often(space):
    logs = log_softmax(np.random.default_rng(1).normal(scale=2.0, size=(3, 20, 4)), axis=-1)
    logs = logs[..., :1] if space == "value" else logs
    again = average(logs[[0, 0, 0, 2]], space)
    assert average(logs, space, [0.75, 0.0, 0.25]) == pytest.approx(again)
    logs[1] = np.nan
    assert average(logs, space, [0.75, 0.0, 0.25]) == pytest.approx(again), "a member of weight 0 is not looked at"
    assert np.array_equal(average(logs[:1], space, [1.0]), average(logs[:1], space))
