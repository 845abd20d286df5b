"""Keys and values of tokens that several rows have in common at their beginning: computed once, read by all of them.

A pass keeps those of its own tokens; the rows of the next one say which of its rows each of them continues.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from pipeline.model.head import at, evaluating, hidden_states, states_at

_STRIDE = 7919
"""Between the tokens that are tried, all over the vocabulary: its first ones are special, and what a model makes of a
row of these is mostly rounding."""
_ROUNDING = 0.06
"""Of bfloat16 and float16, relative, through 30 layers: 0.02 to 0.03 was seen of the same arithmetic in passes of other
shapes, 0.12 to 0.26 where positions were wrong by one."""
Part = tuple[Tensor, Tensor, Tensor]
"""Keys and values (rows, G, T, D) of an earlier pass, and which of its rows each row of this pass continues."""


class SharedLayer(DynamicLayer):
    """One layer's: those of earlier passes are looked up row by row when the layer needs them, never for all layers."""

    def __init__(self, parts: tuple[Part, ...] = (), keep: bool = True) -> None:
        super().__init__()
        self.parts, self.keep = parts, keep

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values that the rows of this pass see."""
        if self.keep:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        if not self.parts:
            return key_states, value_states
        keys = [part[0].index_select(0, part[2]) for part in self.parts]
        values = [part[1].index_select(0, part[2]) for part in self.parts]
        return torch.cat([*keys, key_states], dim=-2), torch.cat([*values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        """Tokens before those of this pass."""
        return sum(part[0].shape[-2] for part in self.parts)


def first_pass() -> Cache:
    """Of a pass that no other precedes, and that others will continue."""
    return Cache(layer_class_to_replicate=SharedLayer)


def continued(before: Cache, rows: Tensor, keep: bool) -> Cache:
    """Of a pass whose row r continues row `rows[r]` of the pass `before`; `keep` if others will continue it in turn."""
    layers: list[Any] = []
    for layer in before.layers:
        earlier = tuple((keys, values, index[rows]) for keys, values, index in layer.parts)
        layers.append(SharedLayer((*earlier, (layer.keys, layer.values, rows)), keep))
    return Cache(layers=layers)


def may_share(model: nn.Module) -> bool:
    """Whether a causal model says the same of sequences that share keys and values: seen on a few tokens.

    Compared are whole sequences, padded on the left under a mask, with the same in three passes: their common
    beginning, what follows it, padded on the right, and what follows that; all of it but the first without the last
    feed-forward network at places that nobody reads.
    """
    if not _keeps_all_keys(model):
        return False
    device, embeddings = next(model.parameters()).device, model.get_input_embeddings()  # type: ignore[operator]
    a, b, c, d, e, f, g, h, i = (_STRIDE * n % embeddings.num_embeddings for n in range(1, 10))
    ids = torch.tensor([[a, b, c, d, e, f, h, i], [0, 0, 0, a, b, c, g, i]], device=device)
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5], device=device)
    rows, positions = torch.arange(2, device=device), torch.arange(8, device=device)

    def shared() -> tuple[Tensor, Tensor]:
        beginning = first_pass()
        hidden_states(model, ids[:1, :3], None, positions[None, :3], beginning)
        following = continued(beginning, rows * 0, keep=True)
        own, end = torch.tensor([[d, e, f], [g, 0, 0]], device=device), torch.tensor([[2], [0]], device=device)
        last = states_at(model, own, None, positions[3:6].expand(2, -1), end, following)
        seen = torch.tensor([[1] * 8, [1] * 4 + [0] * 2 + [1] * 2], device=device)
        own, end = torch.tensor([[h, i], [i, 0]], device=device), torch.tensor([[1], [0]], device=device)
        places = torch.tensor([[6, 7], [4, 5]], device=device)
        return last, states_at(model, own, seen, places, end, continued(following, rows, keep=False))

    try:
        with torch.no_grad(), evaluating(model):  # checkpointing in training does without a cache
            whole = hidden_states(model, ids, mask, (mask.cumsum(1) - 1).clamp(min=0)).float()
            last, end = (found.float() for found in shared())
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        return False  # code of its own, to which a cache is something else
    wanted = at(whole, torch.tensor([[5, 7], [6, 7]], device=device))
    apart = float((torch.cat([last, end], dim=1) - wanted).norm() / wanted.norm())
    return apart < (1e-3 if model.dtype in (torch.float32, torch.float64) else _ROUNDING)


def _keeps_all_keys(model: nn.Module) -> bool:
    """Whether every layer attends to all that precedes: no sliding window, no recurrent state."""
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
