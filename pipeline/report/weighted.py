"""Systems whose members do not count alike: greedy selection, fitted weights, as many members as a row needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.report.inputs import ReportInputs
from pipeline.report.systems import System, ensemble_space, indices, method_name, predicted, table_sizes
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores.adaptive import ROUND, choose_margin, passes_needed
from pipeline.scores.bootstrap import Floats
from pipeline.scores.classification import row_nll
from pipeline.scores.ensemble import Space, average, choose_cheapest
from pipeline.scores.regression import row_squared_error
from pipeline.scores.weights import fit_weights, greedy_counts, without_small

USUAL_SHARE = 0.05
"""Of rows whose answer may change, where `ensemble.adaptive` names none."""

Learn = Callable[[Floats, NDArray[Any]], Floats]
"""Outputs (M, L, C) of members and right answers (L,) -> their weights (M,)."""


def weighted_systems(inputs: ReportInputs) -> list[System]:
    """Weights of the run's own adapter and its draws, and of these with the searched adapters, where some of them are
    taken; none without several members.

    Greedy selection takes as many members as all draws are, at most, and so few as `choose_cheapest` finds enough.
    """
    members, space, name = inputs.members, ensemble_space(inputs), method_name(inputs.config.adapter)
    draws, searched = indices(members, "mask_draw"), indices(members, "searched")
    own = [*indices(members, "mean_field")[:1], *draws]
    systems = []
    if len(own) > 1:
        greedy = System("greedy", f"{name}, greedy selection", "a greedy selection of {} member{}", (tuple(own),))
        systems.append(_cheapest_greedy(inputs, greedy, len(draws)))
        if space == "probability":
            fitted = System("fitted", f"{name}, fitted weights", "{} member{} under fitted weights", (tuple(own),))
            systems.append(_weighted(fitted, inputs.splits["validation"], _fitted))
    if searched and len(own) + len(searched) > 1:
        pool = ((*own, *searched),)
        short_name = "a greedy selection of {} member{}, searched adapters among those offered"
        greedy = System("greedy_searched", "Greedy selection, with searched", short_name, pool)
        found = _cheapest_greedy(inputs, greedy, len(draws) or len(pool[0]))
        systems += [found] if {*found.used} & {*searched} else []
    return [replace(one, short_name=one.short_name.format(one.passes, "s" * (one.passes > 1))) for one in systems]


def adaptive_systems(inputs: ReportInputs, sizes: Sequence[int]) -> list[System]:
    """Of each of some numbers of draws as many as a row needs; none where answers are not choices by probabilities.

    The margin is chosen on calibration rows, one of each unit, which have chosen neither draws nor their number.
    """
    draws, name = indices(inputs.members, "mask_draw"), method_name(inputs.config.adapter)
    if inputs.kind != "choice" or ensemble_space(inputs) != "probability":
        return []
    share = USUAL_SHARE if inputs.config.ensemble.adaptive is None else inputs.config.ensemble.adaptive
    rows, test = inputs.splits["calibration"], inputs.splits["test"].outputs
    systems = []
    for size in (size for size in sizes if size > ROUND):
        own = draws[:size]
        margin = choose_margin(rows.outputs[own][:, rows.first_of_units], share)
        passes = float(passes_needed(test[own], margin).mean())
        short_name = f"up to {size} masks, as a row needs"
        systems.append(System(
            "adaptive", f"{name}, adaptive size", short_name, (tuple(own),), margin=margin, mean_passes=passes
        ))
    return systems


def _cheapest_greedy(inputs: ReportInputs, pool: System, most: int) -> System:
    """Greedy selection from a pool of as few members as are enough, by losses of rows that it has not seen."""
    split, space = inputs.splits["validation"], ensemble_space(inputs)
    systems = [
        _weighted(pool, split, lambda outputs, right, cap=cap: _greedy(outputs, right, space, cap))  # type: ignore[misc]
        for cap in sorted({1, most, *table_sizes(most)})
    ]
    losses = [split.loss(predicted(one, split, space, crossed=True), inputs.config.select.by) for one in systems]
    return systems[choose_cheapest([one.passes for one in systems], losses, split.rows, split.units)]


def _weighted(pool: System, split: LabelledSplit, learn: Learn) -> System:
    """The members of a pool under the weights that are learnt from a split, and from each half of it."""
    outputs, halves = split.outputs[list(pool.candidates[0])], split.halves()
    weights = tuple(learn(outputs, split.labels).tolist())
    if not all(half.any() for half in halves):
        return replace(pool, weights=weights)
    of_even, of_odd = (tuple(learn(outputs[:, half], split.labels[half]).tolist()) for half in halves)
    return replace(pool, weights=weights, crossed=(of_odd, of_even))


def _greedy(outputs: Floats, right: NDArray[Any], space: Space, most: int) -> Floats:
    """Of a mixture nothing but the probabilities of the right answers decides: the other choices are left out."""
    if space == "probability":
        outputs, right = -row_nll(outputs, right)[..., None], np.zeros(len(right), dtype=np.int64)

    def loss(weights: Floats) -> float:
        mean = average(outputs, space, weights.tolist())
        return float((row_squared_error if space == "value" else row_nll)(mean, right).mean())

    counts = greedy_counts(len(outputs), most, loss)
    return counts / counts.sum()


def _fitted(outputs: Floats, right: NDArray[Any]) -> Floats:
    return without_small(fit_weights(-row_nll(outputs, right)))
