"""Activation masks as stateless, counter-based functions: nothing is stored, nothing has a state.

An entry is kept or dropped by a 32-bit hash of (seed, step, branch, layer, example, token position, feature).
So padding side, packing, batch order, number of processes, accumulation and recomputation do not change it.
All arithmetic is int32 with wrap-around, the same on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.adapters.members import RowKeys
from pipeline.randomness import key64

_TWO_31 = 2147483648


def element_mask(keys: RowKeys, rows: slice, layer_key: int, features: int, rate: float) -> Tensor:
    """Rescaled element mask (B, T, features): 0 with probability `rate`, else 1/(1-rate).

    Args:
        keys: identity of the rows of the whole pass.
        rows: the rows wanted.
        layer_key: 64-bit key of (layer, site).
    """
    token_BT = token_hash(keys, rows, layer_key)
    feature = torch.arange(features, dtype=torch.int32, device=token_BT.device)
    bits = mix32(token_BT.unsqueeze(-1) ^ mix32(feature * _signed(0x9E3779B1) + 0x51ED27))
    return (bits >= threshold(rate)).to(torch.float32) / (1.0 - rate)


def token_hash(keys: RowKeys, rows: slice, layer_key: int) -> Tensor:
    """(B, T) int32 hash of everything but the feature."""
    key = key64(keys.seed, layer_key)  # both halves count: no two (step, layer) pairs of a run share masks
    branch, example = keys.branch[rows].to(torch.int32), keys.example[rows]
    low, high = (example & 0xFFFFFFFF), (example >> 32) & 0xFFFFFFFF
    row = mix32(_to_int32(low) ^ _signed(key))
    row = mix32(row ^ _to_int32(high) * _signed(0x85EBCA6B) ^ _signed(key >> 32))
    row = mix32(row + branch * _signed(0xC2B2AE35))
    position = keys.position[rows].to(torch.int32)
    return mix32(row.unsqueeze(-1) ^ mix32(position * _signed(0x27D4EB2F) + 0x165667))


def threshold(rate: float) -> int:
    """The int32 below which a hash means "drop": P(hash < threshold) = rate for a uniform hash."""
    return min(max(round(rate * 2.0**32) - _TWO_31, -_TWO_31), _TWO_31 - 1)


def mix32(x: Tensor) -> Tensor:
    """A full-avalanche permutation of int32 (murmur3's finalizer with the constants of C. Wellons' lowbias32)."""
    x = (x ^ _shift(x, 16)) * _signed(0x7FEB352D)
    x = (x ^ _shift(x, 15)) * _signed(0x846CA68B)
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic on signed integers."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= _TWO_31 else value


def _to_int32(x: Tensor) -> Tensor:
    """Low 32 bits of an int64 tensor as int32, with wrap-around."""
    return torch.where(x >= _TWO_31, x - 2**32, x).to(torch.int32)
