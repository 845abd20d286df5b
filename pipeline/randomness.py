"""Stateless randomness: every number is a function of its key, so nothing has to be saved or replayed.

Weight masks are drawn here with numpy on the CPU (the same bytes whatever the device); activation
masks are hashed in torch where the activations are, from keys made here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key64(*parts: object) -> int:
    """A 64-bit key from any sequence of printable parts (type and order matter)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
    """One flat draw: for each key k_j, sizes[j] uniforms in [0, 1) with 32-bit resolution.

    Entry i of key k is half of splitmix64(k + (i // 2) · golden): a counter-based generator, so each
    segment depends on its own key alone, never on its neighbours.

    Returns:
        float64 array of sum(sizes) numbers, segment after segment.
    """
    pairs = (np.asarray(sizes, dtype=np.int64) + 1) // 2
    start = np.repeat(np.asarray(keys, dtype=np.uint64), pairs)
    ends = np.cumsum(pairs)
    counter = np.arange(ends[-1] if len(ends) else 0, dtype=np.uint64)
    counter -= np.repeat((ends - pairs).astype(np.uint64), pairs)
    words = _splitmix64(start + counter * _GOLDEN)
    halves = words.astype("<u8", copy=False).view("<u4").astype(np.float64) * 2.0**-32  # low half first, anywhere
    if all(size % 2 == 0 for size in sizes):
        return halves
    keep = np.ones(len(halves), dtype=bool)
    odd = np.asarray(sizes) % 2 == 1
    keep[(2 * ends - 1)[odd]] = False
    return halves[keep]


def _splitmix64(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
