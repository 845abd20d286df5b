"""Mask draws in rounds: as many as validation rows gain from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.run_folder.labelled import join_labels
from pipeline.run_folder.members import PredictedMember
from pipeline.run_folder.predictions import Predictions
from pipeline.scores.ensemble import Space, average, choose_cheapest

ROUND = 4
"""Mask draws of a round."""


@dataclass(frozen=True)
class Lineup:
    """Who predicts."""

    members: list[Member]
    described: list[PredictedMember]
    made_from: dict[str, Any]
    """Of their predictions."""

    @property
    def draws(self) -> list[int]:
        """Places of the run's own mask draws, one after another."""
        return [place for place, member in enumerate(self.described) if member.group == "mask_draw"]


def predict_in_rounds(
    lineups: Sequence[Lineup], predict: Callable[[list[Member]], Predictions], rows: Sequence[Row], space: Space
) -> tuple[Lineup, Predictions]:
    """The lineup at which the draws stop, and its predictions of the validation rows.

    Args:
        lineups: the same members with more and more draws; only those that are new are predicted.
        predict: what some members say about `rows`.
        space: `ensemble.average`.
    """
    predictions = predict(lineups[0].members)
    for made in range(1, len(lineups)):
        if draws_stop(lineups, made, predictions, rows, space):
            return lineups[made - 1], predictions
        before, after = lineups[made - 1 : made + 1]
        place, more = before.draws[-1] + 1, len(after.members) - len(before.members)
        predictions = predictions.inserted(place, predict(after.members[place : place + more]))
    return lineups[-1], predictions


def draws_stop(
    lineups: Sequence[Lineup], made: int, predictions: Predictions, rows: Sequence[Row], space: Space
) -> bool:
    """Whether the first `made` lineups are enough: they are all, or the last round has gained too little.

    Compared is the validation NLL (of numbers: the squared error) of the ensemble of all draws with that of the draws
    before the last round. A gain of one paired standard error or less is too little.

    Args:
        predictions: of lineup `made - 1`, on the validation rows.

    Raises:
        RunFolderError: the predictions are of other rows, or lack a right answer.
    """
    if made == len(lineups):
        return True
    if made == 1:
        return False
    split = join_labels(predictions, rows, "validation predictions")
    draws, sizes = lineups[made - 1].draws, [len(one.draws) for one in lineups[made - 2 : made]]
    averaged = [average(split.outputs[draws[:size]], split.averaging_space(space)) for size in sizes]
    losses = [split.loss(outputs[None], "nll") for outputs in averaged]
    return choose_cheapest(sizes, losses, split.rows, split.units) == 0
