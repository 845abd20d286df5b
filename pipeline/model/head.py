"""The causal model in two halves, so that logits are computed for supervised positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

HEAD_ROWS = 256
"""Hidden states turned into logits at a time (memory: rows × vocabulary)."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block; a model that is in it already costs nothing."""
    if not model.training:
        yield
        return
    model.eval()
    try:
        yield
    finally:
        model.train()


def positions_of(model: nn.Module) -> int | None:
    """Tokens of the longest text that a causal model has positions for; None where its configuration does not say."""
    config: Any = model.config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack below the output head."""
    return getattr(model, model.base_model_prefix)  # type: ignore[arg-type]


def hidden_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Cache | None = None
) -> Tensor:
    """(B, T) token ids -> (B, T, D) last hidden states. Without a mask, packed examples are told by their positions.

    Args:
        cache: what precedes these tokens, and where their own keys and values go (see `pipeline.model.shared_keys`).
    """
    return decoder_of(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=cache is not None,
        past_key_values=cache,
    ).last_hidden_state


def states_at(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, places: Tensor,
    cache: Cache | None = None,
) -> Tensor:
    """Last hidden states at `places` (B, S) only: (B, S, D). Arguments as `hidden_states`.

    The last feed-forward network, which sees a position at a time, is computed there alone where that is worth it.
    """
    network = last_feed_forward(model) if 2 * places.shape[1] <= input_ids.shape[1] else None
    if network is None:
        return at(hidden_states(model, input_ids, attention_mask, position_ids, cache), places)
    with _computed_at(network, places):
        return at(hidden_states(model, input_ids, attention_mask, position_ids, cache), places)


def last_feed_forward(model: nn.Module) -> nn.Module | None:
    """The feed-forward network of the last layer, where the family has its layers and that in the usual places."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    stacks = [
        module for module in decoder_of(model).children() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return getattr(stacks[0][-1], "mlp", None) if len(stacks) == 1 else None


@contextmanager
def _computed_at(network: nn.Module, places: Tensor) -> Iterator[None]:
    """Within the block `network` maps (B, T, D) to (B, T, D) at `places` (B, S); what it says elsewhere is 0."""

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (at(args[0], places), *args[1:])

    def scatter(module: nn.Module, args: tuple[Any, ...], found: Tensor) -> Tensor:
        whole = found.new_zeros(*shapes.pop()[:2], found.shape[-1])
        return whole.scatter_(1, _index(places, found.shape[-1]), found)

    shapes: list[torch.Size] = []
    handles = [network.register_forward_pre_hook(gather), network.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def at(values: Tensor, places: Tensor) -> Tensor:
    """(B, T, D) at (B, S) -> (B, S, D)."""
    return values.gather(1, _index(places, values.shape[-1]))


def _index(places: Tensor, width: int) -> Tensor:
    return places.unsqueeze(-1).expand(-1, -1, width)


def log_probs_at(head: Callable[[Tensor], Tensor], states: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """log p(target) where it is predicted from: (M, n) for n targets, from the states (M, P, D) of P places.

    Args:
        source: (n,) place of each target, rising.
        target: (n,) token ids.
    """
    members, places = states.shape[:2]
    found, step = [], max(1, HEAD_ROWS // members)
    for begin in range(0, places, step):
        logits = head(states[:, begin : begin + step].flatten(0, 1))
        log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        inside = (source >= begin) & (source < begin + step)
        found.append(log_probs.view(members, -1, logits.shape[-1])[:, source[inside] - begin, target[inside]])
    return torch.cat(found, dim=1)


def head_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Function (n, D) hidden states -> (n, V) logits, with the model family's own scaling and soft-cap."""
    projection = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits = projection(hidden)
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def check_halves(model: nn.Module, device: torch.device) -> None:
    """One token through the whole and through the halves: refuse a family whose head does something else.

    Raises:
        ConfigError: the logits differ.
    """
    ids = torch.tensor([[1, 2]], device=device)
    ones, positions = torch.ones_like(ids), torch.tensor([[0, 1]], device=device)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=ones, position_ids=positions, use_cache=False).logits.float()
        halves = head_of(model)(hidden_states(model, ids, ones, positions)).float()
    if not torch.allclose(whole, halves, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
        raise ConfigError(
            "model.path", type(model).__name__, "computes its logits in a way this version does not know",
            "Please report the model family.",
        )


def check_packing(model: nn.Module, attention: str) -> None:
    """Two examples in one row and in rows of their own: refuse a model whose packed examples see each other.

    Raises:
        ConfigError: the hidden states differ, with the family and the attention implementation.
    """
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ConfigError("train.packing", True, "a classifier reads one text per row", "Set train.packing=false.")
    device = next(model.parameters()).device
    first, other, second = (torch.tensor([ids]) for ids in ([5, 6, 7, 8, 9], [8, 9, 6, 5, 7], [7, 5, 9, 6]))
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]

    def behind(tokens: Tensor) -> Tensor:
        ids = torch.cat([tokens, second], dim=1)
        return hidden_states(model, ids.to(device), None, positions.to(device))[:, 5:].float()

    with torch.no_grad():
        alone = hidden_states(model, second.to(device), None, torch.arange(4)[None].to(device)).float()
        packed, beside_another = behind(first), behind(other)
    size = float(alone.abs().max())
    if not torch.allclose(packed, alone, rtol=0.0, atol=3e-2 * size) or not torch.allclose(
        packed, beside_another, rtol=0.0, atol=1e-5 * size
    ):
        raise ConfigError(
            "train.packing", True, f"{type(model).__name__} with model.attention={attention} does not keep the examples"
            " of a packed row apart", "Set train.packing=false, or another model.attention.",
        )
