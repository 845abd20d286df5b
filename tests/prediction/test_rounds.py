"""Mask draws in rounds, against all of them at once; and where they stop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.prediction.rounds import Lineup, draws_stop, predict_in_rounds
from pipeline.run_folder.members import PredictedMember
from pipeline.run_folder.predictions import (
    ChoicePredictions,
    CompletionPredictions,
    Predictions,
    RegressionPredictions,
)
from pipeline.scores.choices import ChoiceLikelihoods

N, SIZE = 60, 12
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 2, N)
ROWS = {
    "choice": [Row(f"{n}", f"text {n}", ("a", "b"), int(LABELS[n])) for n in range(N)],
    "regression": [Row(f"{n}", f"text {n}", score=float(LABELS[n])) for n in range(N)],
    "completion": [Row(f"{n}", f"text {n}", completion="x") for n in range(N)],
}
IDS = tuple(row.id for row in ROWS["choice"])


def lineup(draws: int) -> Lineup:
    """Base, mean-field, its draws, plain."""
    members = [Member(None), Member(0), *(Member(0, draw) for draw in range(draws)), Member(1)]
    described = [PredictedMember("base", "base"), PredictedMember("own", "mean_field")]
    described += [PredictedMember(f"draw {draw}", "mask_draw", draw=draw) for draw in range(draws)]
    return Lineup(members, [*described, PredictedMember("plain", "plain")], {})


LINEUPS = [lineup(draws) for draws in (4, 8, 12)]


class Model:
    """What members say, each in its own way: draws of later rounds are better by `gain`, or no better."""

    def __init__(self, kind: str, gain: float) -> None:
        self.kind, self.asked = kind, list[list[Member]]()
        right = np.where(LABELS[:, None] == np.arange(2), 1.0, -1.0)
        self.said = {
            member: right * (0.2 + gain * ((member.draw or 0) // 4)) + 0.01 * RANDOM.normal(size=(N, 2))
            for member in lineup(SIZE).members
        }

    def predict(self, members: list[Member]) -> Predictions:
        self.asked.append(members)
        said = np.stack([self.said[member] for member in members])
        if self.kind == "regression":
            return RegressionPredictions(IDS, 0.5 + said[..., 1] / 4)
        if self.kind == "completion":
            return CompletionPredictions(IDS, -np.exp(-np.abs(said)).reshape(len(members), -1), np.arange(N + 1) * 2)
        lengths = np.ones((N, 2), dtype=np.int64)
        return ChoicePredictions.of_texts(IDS, ChoiceLikelihoods(said, lengths, lengths), "sum")


def arrays(predictions: Predictions) -> dict[str, Any]:
    return {name: array.tolist() for name, array in predictions.arrays().items()}


@pytest.mark.parametrize("kind", ["choice", "completion", "regression"])
def test_rounds_say_what_all_at_once_say(kind: str) -> None:
    model = Model(kind, gain=0.3)
    found, predictions = predict_in_rounds(LINEUPS, model.predict, ROWS[kind], "probability")
    draws = [[Member(0, draw) for draw in range(begin, begin + 4)] for begin in (4, 8)]
    assert model.asked == [LINEUPS[0].members, *draws] and found is LINEUPS[-1]
    assert arrays(predictions) == arrays(model.predict(found.members))


def test_draws_that_agree_stop_after_the_second_round() -> None:
    model = Model("choice", gain=0.0)
    found, predictions = predict_in_rounds(LINEUPS, model.predict, ROWS["choice"], "probability")
    assert found is LINEUPS[1] and predictions.members == len(found.members) and len(model.asked) == 2
    assert draws_stop(LINEUPS, 2, predictions, ROWS["choice"], "probability")


def test_no_gain_is_measured_before_the_second_round_and_none_needed_after_the_last() -> None:
    model = Model("choice", gain=0.0)
    assert not draws_stop(LINEUPS, 1, model.predict(LINEUPS[0].members), ROWS["choice"], "probability")
    assert draws_stop(LINEUPS[:1], 1, model.predict(LINEUPS[0].members), ROWS["choice"], "probability")
    noisy = Model("choice", gain=0.3)
    assert draws_stop(LINEUPS, 3, noisy.predict(LINEUPS[2].members), ROWS["choice"], "probability")
    assert not draws_stop(LINEUPS, 2, noisy.predict(LINEUPS[1].members), ROWS["choice"], "probability")
