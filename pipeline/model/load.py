"""Load the frozen base: quantized, in training mode for good, with its tokenizer."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError
from pipeline.hub import check_model_at_hand
from pipeline.model.classifier import UNQUANTIZED, Heads, find_heads
from pipeline.model.embedded import is_embedded, prepare_embedded_model
from pipeline.model.held import held_bytes, hold_dequantized, is_held_dequantized, local_processes
from pipeline.model.kind import MODEL_FAULTS, refuse_untrusted
from pipeline.model.quantized import cached_folder, load_or_quantize

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
    classes: int | None = None
    """Outputs of the head (1: a number is predicted); None for a causal model."""
    unquantized: tuple[str, ...] = ()
    """What a stock tool gives as llm_int8_skip_modules to load the same base."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass
class BaseModel:
    """A loaded base."""

    model: nn.Module
    tokenizer: Any
    identity: BaseIdentity
    heads: Heads = field(default_factory=dict)
    """Modules that are trained whole beside the adapter; none in a causal model."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Precision of matrix products."""
        return DTYPES[self.identity.compute_dtype]


def resolve_model_path(config: ModelConfig) -> str:
    """A local folder or hub name; the embedded default is prepared in the cache first.

    Raises:
        ConfigError: a path that looks local and is not there.
        SetupError: a hub name that the cache does not hold while the hub is out of reach.
    """
    if is_embedded(config.path):
        return str(prepare_embedded_model(config.path))
    check_model_at_hand(config.path, config.revision)
    return config.path


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where an accelerator has it, float16 on older ones, float32 on CPU.

    For a run on CPUs the command has put a measured choice in its place (`pipeline.plan.compute_dtype`).
    """
    if config.compute_dtype != "auto":
        return DTYPES[config.compute_dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer alone; end-of-text pads where there is no pad token: rows are masked by position, never by id.

    Raises:
        ConfigError: the folder or hub name cannot be loaded.
    """
    from transformers import AutoTokenizer

    resolved = resolve_model_path(config)
    with _transformers_errors(config.path):
        tokenizer = AutoTokenizer.from_pretrained(
            resolved, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    config: ModelConfig, device: torch.device, classes: int | None = None, sharded: bool = False
) -> BaseModel:
    """Model and tokenizer, frozen, without dropout of its own, every quantized layer pinned to training mode.

    Args:
        classes: outputs of a classification head, 1 for a number; None loads a causal language model.
        sharded: for ZeRO-3. 4-bit weights lie in tensors of the compute dtype, as its flat buffers need it, and are
            let go of between the forward and the backward pass.

    Raises:
        ConfigError: the folder or hub name cannot be loaded, or lacks weights.
    """
    resolved = resolve_model_path(config)
    dtype = compute_dtype(config, device)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    unquantized = () if classes is None else UNQUANTIZED
    weights: dict[str, Any] = {
        "dtype": dtype, "attn_implementation": config.attention, "device_map": {"": device},
        "quantization_config": quantization_config(config, dtype, unquantized, dtype if sharded else None),
    }
    tokenizer = load_tokenizer(config)
    kept = None if sharded or classes is not None else cached_folder(config, resolved, dtype, device)
    with _transformers_errors(config.path):
        if kept is None:
            model, absent = _load_weights(resolved, classes, {**weights, **common})
        else:
            settings = {name: value for name, value in weights.items() if name != "quantization_config"}
            model, absent = load_or_quantize(
                kept, lambda folder: _load_weights(str(folder), None, settings)[0],
                lambda: _load_weights(resolved, None, {**weights, **common})[0],
            ), set()
    model.requires_grad_(False)
    model.config.use_cache = False
    if classes is not None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders with a head look for the last token before it
    switch_off_dropout(model)
    quantized = pin_training_mode(model)
    parameters = model.num_parameters()
    if sharded and config.quantization == "nf4":
        from pipeline.model.released import release_weights

        release_weights(model)
    elif is_held_dequantized(config, device.type, held_bytes(model, dtype), local_processes()):
        hold_dequantized(model, dtype)
    identity = BaseIdentity(
        path=config.path, resolved=resolved, revision=config.revision, quantization=config.quantization,
        double_quantization=config.double_quantization, compute_dtype=str(dtype).removeprefix("torch."),
        quantized_modules=quantized, parameters=parameters, classes=classes, unquantized=unquantized,
    )
    heads = {} if classes is None else find_heads(model, absent, config.path)
    return BaseModel(model, tokenizer, identity, heads)


def load_skeleton(config: ModelConfig, classes: int | None = None) -> BaseModel:
    """The base's modules on the meta device, not quantized: what an adapter finds there, without reading a weight.

    Raises:
        ConfigError: the model's configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    resolved = resolve_model_path(config)
    common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    with _transformers_errors(config.path), torch.device("meta"):
        description = AutoConfig.from_pretrained(resolved, revision=config.revision, **common)
        loader = AutoModelForCausalLM if classes is None else AutoModelForSequenceClassification
        model = loader.from_config(description, attn_implementation=config.attention, **common)
    identity = BaseIdentity(config.path, resolved, config.revision, "none", False, "none", 0, 0, classes)
    return BaseModel(model, None, identity, {} if classes is None else find_heads(model, (), config.path))


def _load_weights(resolved: str, classes: int | None, settings: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model, and (of a classifier) the names of parameters that the checkpoint lacks or has in another shape."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classes is None:
        return AutoModelForCausalLM.from_pretrained(resolved, **settings), set()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        resolved, num_labels=classes, ignore_mismatched_sizes=True, output_loading_info=True, **settings
    )
    return model, {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}


@contextmanager
def _transformers_errors(path: str) -> Iterator[None]:
    """What transformers raises becomes a `ConfigError`; its progress bars and its report of absent weights are ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except MODEL_FAULTS as error:
        refuse_untrusted(path, error)
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "attn_implementation=" in first:
            raise ConfigError(
                "model.attention", None, f"{path} does not have this implementation", "Set model.attention=eager."
            ) from error
        raise ConfigError(
            "model.path", path, f"cannot be loaded ({first})", "Give a model folder or a hub name you can reach."
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout rate of the base, attention's included, to 0.

    Encoders (and GPT-2) come with rates of 0.1. Their masks would depend on the state of a generator, thus on the
    number of processes and on a resume, and would be a second method beside the one that is configured.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_rates(module)
    if hasattr(model, "config"):
        _zero_rates(model.config)  # some attention code reads its rate there


def _zero_rates(owner: Any) -> None:
    for name, value in vars(owner).items():
        if isinstance(value, float) and "drop" in name:
            setattr(owner, name, 0.0)


def quantization_config(
    config: ModelConfig, dtype: torch.dtype, unquantized: tuple[str, ...] = (), storage: torch.dtype | None = None
) -> Any:
    """The transformers quantization configuration, or None; 4-bit weights lie in tensors of `storage` (uint8)."""
    from transformers import BitsAndBytesConfig

    skip = list(unquantized) or None
    if config.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=config.double_quantization, llm_int8_skip_modules=skip,
            bnb_4bit_quant_storage=storage,
        )
    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skip)
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


def _stay_in_training_mode(module: nn.Module, mode: bool = True) -> nn.Module:
    return module
