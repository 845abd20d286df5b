"""Attention and FFN sites again, from the equations alone: integer hashes in loops, dense float64, nothing fused.

Nothing here imports the package. Masks are functions of (seed, layer key, branch, example, positions, head); see
`pipeline/adapters/masks.py` for what they are meant to be.

    DropKey         w = softmax of the logits that are visible and kept
    DropAttention   w = softmax of the visible logits; kept weights ÷ NoGrad(their sum)      (arXiv 2403.00812)

A query that is left with no key attends to all it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.reference import lowbias32, reference_key

LIMIT = 2**32


@dataclass(frozen=True)
class Keyed:
    """What the masks of one row of one layer are keyed by, and what kind they are."""

    seed: int
    layer_key: int
    branch: int
    examples: Sequence[int]
    """Example of every token."""
    positions: Sequence[int]
    rate: float
    pattern: str
    span_length: int = 4

    def drops(self, bits: int) -> bool:
        signed = bits - LIMIT if bits >= LIMIT // 2 else bits
        return signed < round(self.rate * LIMIT) - LIMIT // 2

    def line(self, token: int) -> int:
        """Hash of the example that a token belongs to."""
        key, example = reference_key(self.seed, self.layer_key), self.examples[token]
        row = lowbias32((example % LIMIT) ^ (key % LIMIT))
        row = lowbias32(row ^ ((example >> 32) * 0x85EBCA6B % LIMIT) ^ (key >> 32))
        return lowbias32((row + self.branch * 0xC2B2AE35) % LIMIT)

    def token(self, token: int) -> int:
        return on_line(self.line(token), self.positions[token])

    def head(self, token: int, head: int) -> int:
        return lowbias32(self.token(token) ^ lowbias32((head * 0x9E3779B1 + 0x3C6EF3) % LIMIT))

    def block(self, line: int, token: int) -> int:
        """Index of the block of `span_length` positions that a token lies in, given the line's offset."""
        offset = (lowbias32((line + 0x2545F4) % LIMIT) & 0x7FFFFFFF) % self.span_length
        return (self.positions[token] + offset) // self.span_length

    def pairs(self, heads: int) -> Tensor:
        """bool (H, T, T): the (query, key) pairs that are dropped."""
        tokens = range(len(self.positions))
        return torch.tensor([[[self._pair(head, q, k) for k in tokens] for q in tokens] for head in range(heads)])

    def _pair(self, head: int, query: int, key: int) -> bool:
        if self.pattern == "column":
            return self.drops(self.head(key, head))
        line = self.head(query, head)
        place = self.block(line, key) if self.pattern == "span" else self.positions[key]
        return self.drops(on_line(line, place))

    def hidden(self, features: int) -> Tensor:
        """bool (T, F): the entries of the hidden vectors that are dropped."""
        tokens = range(len(self.positions))
        return torch.tensor([[self._hidden(token, feature) for feature in range(features)] for token in tokens])

    def _hidden(self, token: int, feature: int) -> bool:
        line = self.line(token)
        if self.pattern == "span":
            return self.drops(on_line(line, self.block(line, token)))
        source = self.token(token) if self.pattern == "element" else line
        return self.drops(lowbias32(source ^ lowbias32((feature * 0x9E3779B1 + 0x51ED27) % LIMIT)))


def on_line(line: int, position: int) -> int:
    """Hash of a place on a line."""
    return lowbias32(line ^ lowbias32((position * 0x27D4EB2F + 0x165667) % LIMIT))


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor,
    logits: Tensor | None = None, weights: Tensor | None = None, stop_gradient: bool = True,
) -> Tensor:
    """(B, H, T, D) attention in float64, query by query; queries that see nothing give 0.

    Args:
        k, v: (B, G, T, D); G divides H.
        visible: bool (B, H, T, T).
        logits, weights: bool (B, H, T, T), what DropKey and what DropAttention drops.
        stop_gradient: whether the normalizer of DropAttention is a constant.
    """
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys, values = k[b, h // groups], v[b, h // groups]
                seen = visible[b, h, t].nonzero().flatten().tolist()
                if logits is not None:
                    seen = kept(seen, logits[b, h, t])
                if not seen:
                    rows.append(torch.zeros_like(values[0]))
                    continue
                w = torch.softmax(scale * keys[seen] @ q[b, h, t], 0)
                if weights is not None:
                    left = kept(seen, weights[b, h, t])
                    w = torch.stack([w[seen.index(j)] for j in left])
                    w = w / (w.sum().detach() if stop_gradient else w.sum())
                    seen = left
                rows.append(w @ values[seen])
    return torch.stack(rows).view(*q.shape[:-1], v.shape[-1])


def kept(seen: list[int], dropped: Tensor) -> list[int]:
    """Keys that are not dropped; all of them where nothing would be left."""
    left = [j for j in seen if not bool(dropped[j])]
    return left or seen
