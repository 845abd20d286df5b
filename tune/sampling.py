"""Which point of the space a trial tries: a pure function of the seed, its index and what is known.

No sampler state survives between calls, so a restarted search proposes what an uninterrupted one
would have proposed from the same results.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tune.dimensions import Dimension, Options, Space, Values, point_key

STARTUP = 10
"""Results needed before the Parzen estimator knows more than an even spread of points (Optuna's default)."""
CANDIDATES = 50
"""Random designs of which the most even one is taken."""
ATTEMPTS = 64
"""Draws before a point that is not taken is looked for in order."""


@dataclass(frozen=True)
class Observation:
    """What one ended trial showed."""

    values: Values
    nll: float
    step: int
    complete: bool
    """False where the trial was stopped early: its NLL is that of `step`."""


def suggest(
    space: Space, seed: int, index: int, trials: int, known: Sequence[Observation], taken: Collection[str] = ()
) -> Values:
    """The point of trial `index` of `trials`; never one of `taken` (texts of `point_key`).

    The first trials are a Latin hypercube, so that few points still cover every dimension, which as many
    independent draws do not. From `STARTUP` results on, Optuna's tree-structured Parzen estimator proposes.

    Raises:
        ValueError: every point of a finite space is taken.
    """
    grid = space.grid()
    fixed = grid[index % len(grid)]
    free = {key: d for key, d in space.dimensions.items() if key not in fixed}
    for attempt in range(ATTEMPTS):
        if len(known) >= STARTUP and free:
            drawn = _estimated(free, f"{seed}/{index}/{attempt}", known)
        else:
            drawn = _spread(free, f"{seed}/{attempt}", index, trials)
        values = {key: {**fixed, **drawn}[key] for key in space.dimensions}
        if point_key(values) not in taken:
            return values
    if space.count() is not None:
        for values in space.points():
            if point_key(values) not in taken:
                return values
    raise ValueError("every point of the space is taken")


def latin_hypercube(points: int, dimensions: int, source: random.Random) -> list[list[float]]:
    """(points, dimensions) in [0, 1): in every dimension one point in each of `points` equal cells.

    Of `CANDIDATES` random ones, that whose two closest points are farthest apart (maximin).
    """
    designs = []
    for _ in range(CANDIDATES):
        columns = [source.sample(range(points), points) for _ in range(dimensions)]
        designs.append([[(column[i] + source.random()) / points for column in columns] for i in range(points)])
    return max(designs, key=lambda d: min((math.dist(p, q) for p, q in itertools.combinations(d, 2)), default=0.0))


def _spread(free: dict[str, Dimension], seed: str, index: int, trials: int) -> Values:
    block, place = divmod(index, min(trials, STARTUP))
    design = latin_hypercube(min(trials, STARTUP), len(free), random.Random(f"{seed}/{block}"))
    return {key: dimension.at(u) for (key, dimension), u in zip(free.items(), design[place], strict=True)}


def _estimated(free: dict[str, Dimension], seed: str, known: Sequence[Observation]) -> Values:
    import optuna  # half a second that only large searches pay

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=random.Random(seed).getrandbits(32), n_startup_trials=1)
    study = optuna.create_study(direction="minimize", sampler=sampler)
    distributions = {key: _distribution(dimension) for key, dimension in free.items()}
    for seen in known:
        state = optuna.trial.TrialState.COMPLETE if seen.complete else optuna.trial.TrialState.PRUNED
        study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=seen.nll if seen.complete else None,
                params={key: _to_parameter(dimension, seen.values[key]) for key, dimension in free.items()},
                distributions=distributions,
                intermediate_values={seen.step: seen.nll},
            )
        )
    parameters = study.ask(distributions).params
    return {key: _from_parameter(dimension, parameters[key]) for key, dimension in free.items()}


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Options):
        return CategoricalDistribution(tuple(range(len(dimension.values))))
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _to_parameter(dimension: Dimension, value: Any) -> Any:
    # Optuna's categories must be plain scalars; ours may be lists, so they go by position.
    return dimension.values.index(value) if isinstance(dimension, Options) else value


def _from_parameter(dimension: Dimension, parameter: Any) -> Any:
    return dimension.values[parameter] if isinstance(dimension, Options) else dimension.tidy(parameter)
