"""Load the frozen base: quantized, in training mode for good, with its tokenizer. Only importer of bitsandbytes."""

from __future__ import annotations

import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config.sections import ModelConfig
from pipeline.errors import ConfigError
from pipeline.model.embedded import is_embedded, prepare_embedded_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class BaseIdentity:
    """What the adapter was trained against, recorded with every artefact."""

    path: str
    resolved: str
    revision: str | None
    quantization: str
    double_quantization: bool
    compute_dtype: str
    quantized_modules: int
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class BaseModel:
    """A loaded base."""

    model: nn.Module
    tokenizer: Any
    identity: BaseIdentity


def resolve_model_path(config: ModelConfig) -> str:
    """A local folder or hub name; the embedded default is prepared in the cache first.

    Raises:
        ConfigError: a path that looks local and is not there.
    """
    if is_embedded(config.path):
        return str(prepare_embedded_model(config.path))
    return config.path


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where an accelerator has it, float16 on older ones, float32 on CPU (measured faster there)."""
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def load_base(config: ModelConfig, device: torch.device) -> BaseModel:
    """Model and tokenizer, frozen, every quantized layer pinned to training mode.

    Raises:
        ConfigError: the folder or hub name cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    resolved = resolve_model_path(config)
    dtype = compute_dtype(config, device)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, **common)
        model = AutoModelForCausalLM.from_pretrained(
            resolved, dtype=dtype, attn_implementation=config.attention, device_map={"": device},
            quantization_config=quantization_config(config, dtype), **common,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "model.path", config.path, f"cannot be loaded ({first})", "Give a model folder or a hub name you can reach."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # rows are masked by position, never by token id
    model.requires_grad_(False)
    model.config.use_cache = False
    quantized = pin_training_mode(model)
    identity = BaseIdentity(
        path=config.path, resolved=resolved, revision=config.revision, quantization=config.quantization,
        double_quantization=config.double_quantization, compute_dtype=str(dtype).removeprefix("torch."),
        quantized_modules=quantized, parameters=model.num_parameters(),
    )
    return BaseModel(model, tokenizer, identity)


def quantization_config(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The transformers quantization configuration, or None."""
    from transformers import BitsAndBytesConfig

    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=config.double_quantization,
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return None


def pin_training_mode(model: nn.Module) -> int:
    """Keep every bitsandbytes layer, adapted or not, in training mode; returns how many there are.

    An eval-mode forward repacks 4-bit weights on CPUs with AVX512-BF16, after which training forwards silently
    pass no gradient to their input.
    """
    count = 0
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            module.train(True)
            module.train = types.MethodType(_stay_in_training_mode, module)  # type: ignore[method-assign]
            count += 1
    return count


def folder_identity(resolved: str) -> str | None:
    """The local folder's name, None for a hub name."""
    path = Path(resolved)
    return path.name if path.is_dir() else None


def _stay_in_training_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
