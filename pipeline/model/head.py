"""The causal model in two halves, so that logits are computed for supervised positions only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack below the output head."""
    return getattr(model, model.base_model_prefix)  # type: ignore[arg-type]


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
    """(B, T) token ids -> (B, T, D) last hidden states. Without a mask, packed examples are told by their positions."""
    return decoder_of(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


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
