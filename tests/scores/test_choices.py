"""Scores of choices from log-likelihoods and lengths, against sums written out and the rules of the public harness."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.scores.choices import ChoiceLikelihoods, ChoiceScore

TEXTS = [["no", "nothing", "no one knows"], ["yes", "perhaps"]]


def likelihoods() -> ChoiceLikelihoods:
    """Two members, two rows, of which the second lacks a choice."""
    found = np.log(np.random.default_rng(0).random((2, 2, 3))) * 5
    found[:, 1, 2] = -np.inf
    tokens = np.array([[1, 2, 4], [2, 1, 0]])
    characters = np.array([[2, 7, 12], [3, 7, 0]])
    return ChoiceLikelihoods(found, tokens, characters)


@pytest.mark.parametrize("rule", ["sum", "per_token", "per_character"])
def test_scores_are_normalised_after_the_rule(rule: ChoiceScore) -> None:
    given = likelihoods()
    found = given.log_probs(rule)
    assert found.dtype == np.float32 and found.shape == (2, 2, 3) and np.isneginf(found[:, 1, 2]).all()
    for m in range(2):
        for n, texts in enumerate(TEXTS):
            length = {
                "sum": [1] * 3, "per_token": given.tokens[n].tolist(), "per_character": [len(text) for text in texts],
            }[rule]
            scores = [given.log_likelihoods[m, n, c] / length[c] for c in range(len(texts))]
            total = math.log(sum(math.exp(score) for score in scores))
            assert found[m, n, : len(texts)] == pytest.approx([score - total for score in scores], abs=1e-6)
            # lm-evaluation-harness: acc = argmax(lls), acc_norm = argmax(lls / completion_len)
            if rule != "per_token":
                lls = given.log_likelihoods[m, n, : len(texts)]
                lengths = np.array([float(len(text)) for text in texts])
                assert found[m, n].argmax() == np.argmax(lls if rule == "sum" else lls / lengths)


def test_the_rules_differ() -> None:
    given = ChoiceLikelihoods(np.array([[[-2.0, -3.0, -6.5]]]), np.array([[1, 2, 3]]), np.array([[2, 4, 20]]))
    rules: tuple[ChoiceScore, ...] = ("sum", "per_token", "per_character")
    assert [int(given.log_probs(rule).argmax()) for rule in rules] == [0, 1, 2]


def test_unlikely_texts_do_not_underflow() -> None:
    given = ChoiceLikelihoods(np.array([[[-9000.0, -9001.0]]]), np.array([[900, 900]]), np.array([[9, 9]]))
    assert np.exp(given.log_probs("sum"))[0, 0] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)], abs=1e-6)
