"""What members disagree about, against sums written out."""

from __future__ import annotations

import math

import numpy as np

from pipeline.scores.disagreement import entropy, mutual_information, spread


def test_entropy_and_mutual_information_against_sums_written_out() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(3), size=(4, 5))
    probabilities[:, 2] = [0.25, 0.75, 0.0]  # a choice that the row does not have
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities)

    def of(distribution: np.ndarray) -> float:
        return -sum(p * math.log(p) for p in distribution if p > 0)

    for row in range(5):
        mixed = probabilities[:, row].mean(axis=0)
        apart = sum(of(member) for member in probabilities[:, row]) / 4
        assert abs(mutual_information(logs)[row] - (of(mixed) - apart)) < 1e-12
        assert abs(entropy(logs)[1, row] - of(probabilities[1, row])) < 1e-12


def test_members_that_agree_share_no_information_and_those_that_are_sure_of_others_share_all() -> None:
    unsure = np.log(np.full((6, 1, 2), 0.5))
    assert mutual_information(unsure)[0] == 0.0 and abs(entropy(unsure)[0, 0] - math.log(2)) < 1e-12
    with np.errstate(divide="ignore"):
        opposed = np.log(np.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
    assert abs(mutual_information(opposed)[0] - math.log(2)) < 1e-12
    np.testing.assert_allclose(spread(np.exp(opposed)), [[0.5, 0.5]])
    assert spread(np.exp(unsure[:1])).max() == 0.0
