"""Stateless randomness: every number is a function of its key, so nothing has to be saved or replayed.

Numbers are made where they are used, by integer arithmetic that wraps around: the same bits on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_HIGHEST_OF_HALVES = 0x8000000080000000
"""With it unsigned halves are in the order of signed ones."""


def key64(*parts: object) -> int:
    """A 64-bit key from any sequence of printable parts (type and order matter)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(keys: Sequence[int], sizes: Sequence[int], device: torch.device | str) -> Tensor:
    """One flat draw: for each key k_j, sizes[j] numbers of 32 random bits, in an even number of places.

    Entry i of key k is half of splitmix64(k + (i // 2) · golden), the low half first: a counter-based generator, so
    each segment depends on its own key alone, never on its neighbours. The segment of an odd size ends with a surplus
    number, which keeps all segments on whole words.

    Returns:
        int32, segment after segment, in the order of the numbers in [0, 1) that they stand for (`uniform`).
    """
    pairs = [(size + 1) // 2 for size in sizes]
    starts = [0, *accumulate(pairs)]
    total = starts.pop()
    first = [signed(key + (1 - start) * _GOLDEN, 64) for key, start in zip(keys, starts, strict=True)]
    first_J, pairs_J = torch.tensor([first, pairs], dtype=torch.int64).to(device)
    counter = torch.arange(total, dtype=torch.int64, device=device)
    state = counter.mul_(signed(_GOLDEN, 64)).add_(torch.repeat_interleave(first_J, pairs_J, output_size=total))
    moved = torch.empty_like(state)
    state = state.bitwise_xor_(shifted(state, 30, moved)).mul_(signed(_MIX_1, 64))
    state = state.bitwise_xor_(shifted(state, 27, moved)).mul_(signed(_MIX_2, 64))
    state = state.bitwise_xor_(shifted(state, 31, moved)).bitwise_xor_(signed(_HIGHEST_OF_HALVES, 64))
    return state.view(torch.int32)  # the low half first: every machine with a torch is little-endian


def uniform(bits: Tensor) -> Tensor:
    """The numbers in [0, 1) that int32 bits stand for, float64 and exact: (bits + 2³¹) / 2³²."""
    return (bits.double() + 2.0**31) * 2.0**-32


def least_bits(probability: float) -> int:
    """The least int32 whose number is `probability` or more."""
    return min(math.ceil(probability * 2.0**32) - 2**31, 2**31 - 1)


def signed(value: int, width: int) -> int:
    """The signed integer with the low `width` bits of `value`."""
    value &= 2**width - 1
    return value - 2**width if value >= 2 ** (width - 1) else value


def shifted(x: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Logical right shift of integers of any width: torch's is arithmetic on signed ones."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (8 * x.element_size() - bits)) - 1)
