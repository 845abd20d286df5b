"""Which models llama.cpp reads as we do, what it calls their tensors, and how it orders rows of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
from torch import Tensor

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp makes of a transformers `model_type`."""

    kind: gguf.MODEL_ARCH
    pairs: bool
    """It rotates rows 2i and 2i+1 of a head together, where transformers rotates i and i + D/2: rows of q and k are
    stored in another order (`paired_rows`)."""


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}
"""`model_type` -> architecture: those that the tests compare with llama.cpp itself."""
_PAIRED = (".self_attn.q_proj", ".self_attn.k_proj")


@dataclass(frozen=True)
class Shape:
    """What a model's configuration says of names and rows."""

    architecture: Architecture
    layers: int
    heads: int
    key_heads: int
    names: gguf.TensorNameMap

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers configuration.

        Raises:
            ConfigError: a model that llama.cpp does not read, or reads as another one.
        """
        architecture = ARCHITECTURES.get(config.model_type)
        rope = getattr(config, "rope_parameters", None) or {}
        sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        fault = (
            f"the model is a {config.model_type}" if architecture is None
            else f"its positions are scaled ({rope['rope_type']})" if rope.get("rope_type", "default") != "default"
            else f"its attention reaches {sliding} tokens back" if sliding
            else None
        )
        if fault is not None or architecture is None:
            known = ", ".join(ARCHITECTURES)
            raise ConfigError(
                "export.forms", "gguf", f"{fault}: files for llama.cpp are written for {known} with full attention",
                "Leave gguf out; convert_lora_to_gguf.py of llama.cpp reads the folder adapter/.",
            )
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(architecture, layers, heads, key_heads, gguf.get_tensor_name_map(architecture.kind, layers))

    def stored_name(self, name: str) -> str:
        """llama.cpp's name of a transformers tensor, `….weight` or `….bias`.

        Raises:
            ConfigError: it has none.
        """
        found = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(
                "export.forms", "gguf", f"llama.cpp's {self.architecture.kind.name.lower()} has no place for {name}",
                "Leave gguf out, or train without it.",
            )
        return found

    def stored_rows(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor whose rows are outputs of the module `name` (weight, bias or B), its rows in llama.cpp's order."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if not self.architecture.pairs or not module.endswith(_PAIRED):
            return tensor
        return paired_rows(tensor, self.heads if module.endswith("q_proj") else self.key_heads)


def paired_rows(tensor: Tensor, heads: int) -> Tensor:
    """Rows (i, i + D/2) of every head become rows (2i, 2i + 1); D rows per head, further dimensions stay."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def model_hyperparameters(writer: gguf.GGUFWriter, config: Any, vocabulary: int) -> None:
    """Everything but tensors and tokenizer."""
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
