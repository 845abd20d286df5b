"""Sequences of many requests in one decode of all members: they join it and leave it between two of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.prediction.decode import Decoder, Decoding

Prompt = tuple[str, tuple[int, ...]]
"""(what masks are keyed by where they depend on the row, token ids)."""


class SharedDecode:
    """B sequences at any time, each told by its place among them."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._names: list[str] = []
        self._state: Decoding | None = None

    def begin(self, prompts: Sequence[Prompt]) -> Tensor:
        """Take sequences up behind those there are: (B', V) log-probabilities of their next tokens."""
        fresh, before = self._read(prompts), self._state
        self._state = fresh if before is None else self._joined(before, fresh, prompts)
        self._names += [name for name, _ in prompts]
        return fresh.log_probs.cpu()

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One token for each sequence: (B, V) log-probabilities of what follows."""
        assert self._state is not None, "sequences begin before they go on"
        return self._state.step(torch.tensor(tokens)).cpu()

    def keep(self, places: Sequence[int]) -> None:
        """Forget all sequences but those at `places`, and the padding that only the others needed."""
        self._names = [self._names[place] for place in places]
        if self._state is None or not places:
            self._state = None
            return
        self._state.select(places)
        _trim(self._state)

    def _read(self, prompts: Sequence[Prompt]) -> Decoding:
        return self._decoder.prefill([Encoded(name, ids, (IGNORE_INDEX,) * len(ids)) for name, ids in prompts])

    def _joined(self, before: Decoding, fresh: Decoding, prompts: Sequence[Prompt]) -> Decoding:
        """One state of both; where keys cannot be put side by side (a sliding window's), all is read again."""
        if not all(_is_plain(state.cache) for state in (before, fresh)):
            known = [
                (name, tuple(ids[mask.bool()].tolist()))
                for name, ids, mask in zip(self._names, before.ids, before.mask, strict=True)
            ]
            return self._read([*known, *prompts])
        longest = max(before.ids.shape[1], fresh.ids.shape[1])

        def stacked(one: Tensor, other: Tensor) -> Tensor:
            """(B, T), (B', T') -> (B + B', longest), padded on the left."""
            return torch.cat([pad(part, (longest - part.shape[1], 0)) for part in (one, other)])

        before.ids, before.mask, before.positions = (
            stacked(getattr(before, name), getattr(fresh, name)) for name in ("ids", "mask", "positions")
        )
        before.examples = torch.cat([before.examples, fresh.examples])
        before.log_probs = torch.cat([before.log_probs, fresh.log_probs])
        if before.cache is not None and fresh.cache is not None:
            for layer, other in zip(before.cache.layers, fresh.cache.layers, strict=True):
                for name in ("keys", "values"):
                    parts = (getattr(layer, name), getattr(other, name))
                    setattr(layer, name, _side_by_side(parts, before.masks.size, longest))
        return before


def _is_plain(cache: Cache | None) -> bool:
    """Whether every layer keeps all keys, one behind the other; where nothing is kept, that is true, too."""
    return cache is None or all(type(layer) is DynamicLayer for layer in cache.layers)


def _side_by_side(parts: Sequence[Tensor], members: int, length: int) -> Tensor:
    """(M·B, G, T, D) and (M·B', G, T', D) -> (M·(B + B'), G, length, D), member-major, padded on the left."""
    padded = [pad(part, (0, 0, length - part.shape[-2], 0)) for part in parts]
    return torch.cat([part.view(members, -1, *part.shape[1:]) for part in padded], dim=1).flatten(0, 1)


def _trim(state: Decoding) -> None:
    """Cut the columns that are padding in every row."""
    first = int(state.mask.any(dim=0).int().argmax())
    if not first or not _is_plain(state.cache):
        return
    state.ids, state.mask, state.positions = (one[:, first:] for one in (state.ids, state.mask, state.positions))
    for layer in state.cache.layers if state.cache is not None else ():
        layer.keys, layer.values = layer.keys[..., first:, :], layer.values[..., first:, :]
