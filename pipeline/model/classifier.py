"""Models with a classification head: which modules are trained whole, and how long a text may be."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from pipeline.errors import ConfigError

Heads = dict[str, frozenset[str]]
"""Name of a module that is trained whole -> its parameters (names within it) that the checkpoint does not hold."""

HEAD_SUFFIXES = ("classifier", "score")
"""Modules whose names end so are trained whole: PEFT's rule for SEQ_CLS (it also gives RoBERTa's dense + out_proj)."""
BEHIND_THE_STACK = ("pooler", "head", *HEAD_SUFFIXES)
"""Path segments of modules between the encoder's last layer and the logits."""
UNQUANTIZED = ("classifier", "score", "head", r".*pooler")
"""Patterns of modules that bitsandbytes leaves alone (llm_int8_skip_modules, which holds for 4 bits, too): a quantized
module cannot be trained whole, and which modules are new is known only after loading."""


def find_heads(model: nn.Module, absent: Collection[str], path: str) -> Heads:
    """The modules to train whole: PEFT's, and whatever else behind the stack the checkpoint lacks.

    A BERT that was saved without its pooler, or DeBERTa's pooler, starts from random numbers: frozen, no other tool
    could load the same model again.

    Args:
        absent: names of parameters that the checkpoint lacks, or has in another shape.
        path: `model.path`, for the error.

    Raises:
        ConfigError: the checkpoint lacks weights of the stack itself.
    """
    names: list[str] = []
    for name, _ in model.named_modules():
        if name.endswith(HEAD_SUFFIXES) and not _is_within(name, names):
            names.append(name)
    lacking = []
    for parameter in sorted(absent):
        segments = parameter.split(".")
        behind = [i for i, segment in enumerate(segments) if segment in BEHIND_THE_STACK]
        if _is_within(parameter, names):
            continue
        if not behind:
            lacking.append(parameter)
            continue
        names.append(".".join(segments[: behind[0] + 1]))
    if lacking:
        raise ConfigError(
            "model.path", path, f"lacks weights of the model ({', '.join(lacking[:3])}{', …' * (len(lacking) > 3)})",
            "Give the whole checkpoint of an encoder.",
        )
    return {name: _within(name, absent) for name in names}


def head_outputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> Tensor:
    """(B, T) token ids -> (B, C) outputs of the head. Segments are given to the model where there are any."""
    segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    return model(input_ids=input_ids, attention_mask=attention_mask, **segments).logits


def head_outputs_and_hidden(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`head_outputs` (B, C), and the last hidden states (B, T, D) below the head."""
    segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
    outputs = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **segments)
    return outputs.logits, outputs.hidden_states[-1]


def position_limit(model: nn.Module) -> int | None:
    """Tokens of the longest text where positions are learned (RoBERTa counts from behind its pad id), else None."""
    limits = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
    ]
    return min(limits, default=None)


def _is_within(name: str, modules: Collection[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _within(module: str, parameters: Collection[str]) -> frozenset[str]:
    prefix = f"{module}."
    return frozenset(name.removeprefix(prefix) for name in parameters if name.startswith(prefix))
