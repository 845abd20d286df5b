"""Which rows are used when: functions of the step alone, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError


def global_batch_indices(rows: int, global_batch: int, step: int, seed: int) -> list[int]:
    """Row indices of one optimizer step: those of `global_batch_places`."""
    return [index for _, index in global_batch_places(rows, global_batch, step, seed)]


def global_batch_places(rows: int, global_batch: int, step: int, seed: int) -> list[tuple[int, int]]:
    """(epoch, row index) of the rows of one optimizer step.

    Rows are drawn from an endless chain of permutations of 0..rows-1, one per epoch, keyed by (seed, epoch);
    step s takes positions s·global_batch to (s+1)·global_batch - 1 of the chain. Every row is thus used
    once before any is used again.

    Args:
        rows: training rows.
        global_batch: examples per optimizer step, over all processes.
        step: 0-based.
        seed: `train.seed`.
    """
    positions = range(step * global_batch, (step + 1) * global_batch)
    places = [divmod(position, rows) for position in positions]
    return [(epoch, int(permutation(rows, seed, epoch)[place])) for epoch, place in places]


def process_share(indices: Sequence[int], process_rank: int, world_size: int) -> list[tuple[int, int]]:
    """(position in the global batch, row index) of one process: contiguous shares of equal size.

    Raises:
        ConfigError: the global batch is no multiple of the number of processes.
    """
    if len(indices) % world_size:
        raise ConfigError(
            "train.global_batch", len(indices), f"must be a multiple of the {world_size} processes",
            f"Set train.global_batch={-(-len(indices) // world_size) * world_size}, or launch.processes.",
        )
    share = len(indices) // world_size
    start = process_rank * share
    return [(position, indices[position]) for position in range(start, start + share)]


def length_sorted_chunks(lengths: Sequence[int], budget_tokens: int, copies: int = 1) -> list[list[int]]:
    """Row indices in chunks of similar length, the longest first (what does not fit fails at once).

    Each chunk satisfies rows · copies · longest length <= `budget_tokens`, or holds a single row.

    Args:
        lengths: tokens of each row.
        budget_tokens: tokens of one forward pass.
        copies: how often each row stands in the pass (members × candidates).
    """
    chunks: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if chunks and (len(chunks[-1]) + 1) * copies * lengths[chunks[-1][0]] <= budget_tokens:
            chunks[-1].append(index)
        else:
            chunks.append([index])
    return chunks


def token_chunks(
    lengths: Sequence[int], budget_tokens: int, tokens_of: Callable[[Sequence[int]], int], classes: int = 1
) -> list[list[int]]:
    """The positions of a global batch in chunks of similar length, of at most `budget_tokens` each.

    The longest of every class (draw) come first, then the second longest of each, and so on: the members of a pass
    then have equally many rows, and no fillers are needed. A single row may exceed the budget.

    Args:
        lengths: tokens of the row at each position.
        tokens_of: tokens of a pass over some positions, as its layout has them.
        classes: a position's class is its remainder by this; S under layout `split`.
    """
    ranked: list[tuple[int, int, int]] = []
    for remainder in range(classes):
        own = sorted(range(remainder, len(lengths), classes), key=lambda position: -lengths[position])
        ranked += [(rank, remainder, position) for rank, position in enumerate(own)]
    chunks: list[list[int]] = []
    for _, _, position in sorted(ranked):
        if chunks:
            wider = [*chunks[-1], position]
            if tokens_of(wider) <= budget_tokens:
                chunks[-1] = wider
                continue
        chunks.append([position])
    return chunks


@lru_cache(maxsize=4)
def permutation(rows: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """0..rows-1 in an order drawn for (seed, epoch).

    Order of the raw Philox stream: unlike `Generator.permutation`, it is the same in every numpy version."""
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(rows)
    return np.argsort(np.asarray(stream), kind="stable")
