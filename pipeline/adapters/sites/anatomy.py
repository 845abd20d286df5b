"""Anatomy of the base models: where their attention and their feed-forward networks are, and what cannot be masked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from pipeline.adapters.spec import AdapterSpec, count_layers, layer_number
from pipeline.config.method import ATTENTION_POSITIONS, WEIGHT_POSITIONS, Site
from pipeline.errors import ConfigError

BACKENDS = ("sdpa", "eager", "loradrop")
"""Attention implementations that attention sites can stand in for (the last: their own, already in place)."""
UNKNOWN_TERMS = {"softcap": "a soft cap on its logits", "s_aux": "attention sinks", "position_bias": "a position bias"}
"""Keyword of transformers' attention interface -> a term of the logits that masked attention does not compute."""
DOWN_PROJECTION = re.compile(
    r"(?:\bmlp\.(?:down_proj|c_proj|fc2|fc_out|dense_4h_to_h|Wo)"  # Llama, Qwen, …; GPT-2; Phi; GPT-J; NeoX; ModernBERT
    r"|(?<!attention\.)\boutput\.dense"  # BERT, RoBERTa, ELECTRA, DeBERTa
    r"|\bffn\.lin2"  # DistilBERT
    r"|\b\d+\.fc2)$"  # OPT
)
"""Names of the linear that leaves the feed-forward network."""


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The self-attention modules of the layers: those that call transformers' attention interface."""
    return {
        name: module
        for name, module in model.named_modules()
        if layer_number(name) is not None
        and isinstance(getattr(module, "is_causal", None), bool)
        and hasattr(module, "config")
    }


def padding_reason(model: nn.Module, attention: str, longest: int) -> str | None:
    """Why training passes of this model must have padded rows; None where rows may lie end to end.

    Args:
        attention: model.attention.
        longest: tokens of the longest row.
    """
    config, modules = getattr(model, "config", None), attention_modules(model)
    if attention != "sdpa":
        return f"model.attention is {attention}"
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        return "a head reads one token of each row"
    if config is None or not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        return "its attention does not go through transformers' attention interface"
    if _problem(model, modules):
        return f"{_problem(model, modules)} self-attention module that is known here"
    if not all(getattr(module, "is_causal", False) for module in modules.values()):
        return "its attention is not causal"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it has cross-attention"
    text = config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return f"its attention has {UNKNOWN_TERMS['softcap']}"
    if any(hasattr(module, "sinks") for module in modules.values()):
        return f"its attention has {UNKNOWN_TERMS['s_aux']}"
    window = getattr(text, "sliding_window", None) or longest
    kinds = set(getattr(text, "layer_types", None) or ["sliding_attention"])  # a window may stand there without kinds
    if others := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(others))}"
    if "sliding_attention" in kinds and window < longest:
        return f"its attention reaches {window} tokens back, less than its longest row"
    return None


def down_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The linears whose input is the hidden representation of a layer's feed-forward network."""
    return {
        name: module for name, module in model.named_modules()
        if layer_number(name) is not None and DOWN_PROJECTION.search(name)
    }


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a causal decoder: its attention modules say so."""
    return any(getattr(module, "is_causal", False) is True for module in attention_modules(model).values())


def check_sites(model: nn.Module, specs: Sequence[AdapterSpec]) -> None:
    """Refuse the activation sites that this model cannot honour, before anything is changed.

    Raises:
        ConfigError: see `check_attention` and `check_feed_forward`.
    """
    for site in (site for spec in specs for site in spec.sites if site.rate > 0):
        if site.position in ATTENTION_POSITIONS:
            check_attention(model, site)
        elif site.position == "ffn_hidden":
            check_feed_forward(model, site)


def check_attention(model: nn.Module, site: Site) -> None:
    """Refuse a model whose attention cannot be masked.

    Raises:
        ConfigError: no attention interface (DeBERTaV3), another implementation than sdpa or eager, terms in the
            logits that are not computed here, an encoder-decoder, or not one self-attention per layer.
    """
    config = getattr(model, "config", None)
    can_set = getattr(type(model), "_can_set_attn_implementation", lambda: False)
    if config is None or not can_set():
        raise refusal(model, site, "its attention does not go through transformers' attention interface")
    if config._attn_implementation not in BACKENDS:
        raise ConfigError(
            "model.attention", config._attn_implementation, f"cannot serve a site on {site.position}",
            "Set model.attention=sdpa: PyTorch's own flash kernels stay in use.",
        )
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    sinks = any(hasattr(module, "sinks") for module in attention_modules(model).values())
    for found, term in ((capped, "softcap"), (sinks, "s_aux")):
        if found:
            raise refusal(model, site, f"its attention has {UNKNOWN_TERMS[term]}")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise refusal(model, site, "it has cross-attention")
    _require_one_per_layer(model, site, attention_modules(model), "self-attention module")


def check_feed_forward(model: nn.Module, site: Site) -> None:
    """Refuse a model whose feed-forward networks are not known, one per layer.

    Raises:
        ConfigError: a layer has none (a mixture of experts, another family), or several.
    """
    _require_one_per_layer(model, site, down_projections(model), "feed-forward network")


def refusal(model: nn.Module, site: Site, reason: str) -> ConfigError:
    """The error that names the site, the model type, the reason, and what works."""
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    others = [*WEIGHT_POSITIONS, "lora_input"]
    if site.position != "ffn_hidden" and not _problem(model, down_projections(model)):
        others.append("ffn_hidden")
    return ConfigError(
        "adapter.method", site.position, f"cannot be honoured by the model type {model_type}: {reason}",
        f"Positions that work there: {', '.join(others)}.",
    )


def _require_one_per_layer(model: nn.Module, site: Site, modules: Mapping[str, nn.Module], what: str) -> None:
    problem = _problem(model, modules)
    if problem:
        raise refusal(model, site, f"{problem} {what} that is known here")


def _problem(model: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """`layer 3 has no` or `layer 3 has more than one`; None where every layer has exactly one."""
    numbers = [layer_number(name) for name in modules]
    if not numbers:
        return "it has no"
    for layer in range(count_layers([name for name, _ in model.named_modules()])):
        if numbers.count(layer) != 1:
            return f"its layer {layer} has {'no' if layer not in numbers else 'more than one'}"
    return None
