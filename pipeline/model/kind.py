"""Causal model or classifier: decided from the model's configuration alone, before any weight is read. No torch."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError, StrictDataclassError

from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError
from pipeline.files import MOST_JSON_BYTES, read_bytes
from pipeline.hub import check_model_at_hand
from pipeline.model.embedded import EMBEDDED_MODELS, check_embedded_name, embedded_folder, is_embedded

Kind = Literal["causal", "classifier"]
MODEL_FAULTS = (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError)
"""What transformers raises of a model's files that are missing, damaged or contradict themselves."""

ENCODER_TYPES = frozenset({
    "albert", "bert", "big_bird", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert",
    "electra", "ernie", "esm", "eurobert", "fnet", "funnel", "ibert", "jina_embeddings_v3", "longformer", "luke",
    "megatron-bert", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod", "yoso",
})  # fmt: skip
"""`model_type` of families whose tokens attend to both sides: some can be loaded as causal models, to no use."""
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
_MLP = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "hidden_dim")
"""What families call a hidden state's size, and that of what lies inside their MLP."""


def model_kind(config: ModelConfig) -> Kind:
    """`model.kind`, of an installed package's task what it builds on; `auto` is a classifier for encoders and for
    whatever was saved with a classification head.

    Raises:
        ConfigError: the configuration cannot be read, or an encoder is asked for as a causal model.
    """
    known = local_kind(config)
    return known if known is not None else _kind_of(config, _hub_description(config))


def local_kind(config: ModelConfig) -> Kind | None:
    """The same without transformers and without network: None for a hub name whose kind is not given.

    Raises:
        ConfigError: as `model_kind`.
    """
    if is_embedded(config.path):
        return _kind_of(config, {"model_type": EMBEDDED_MODELS[check_embedded_name(config.path)].family})
    description = _read_description(config.path, Path(config.path).expanduser() / "config.json")
    if description is not None:
        return _kind_of(config, description)
    return "classifier" if config.kind.partition(":")[0] == "classifier" else None


def base_sizes(config: ModelConfig) -> tuple[int, int] | None:
    """(hidden size, size of the MLP) from a config.json at hand, the hub's cache included; None where there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if is_embedded(config.path):
        folder = embedded_folder(config.path)
        file = None if folder is None else folder / "config.json"
    else:
        file = Path(config.path).expanduser() / "config.json"
        if not file.is_file():
            from huggingface_hub import try_to_load_from_cache

            with contextlib.suppress(HFValidationError):
                cached = try_to_load_from_cache(config.path, "config.json", revision=config.revision)
                file = Path(cached) if isinstance(cached, str) else file
    description = _read_description(config.path, file) if file is not None else None
    if description is None:
        return None
    nested = description.get("text_config")
    inner = nested if isinstance(nested, dict) else description
    hidden = _first_size(inner, _HIDDEN)
    return None if hidden is None else (hidden, _first_size(inner, _MLP) or 4 * hidden)


def _first_size(description: dict[str, Any], names: tuple[str, ...]) -> int | None:
    sizes = (description.get(name) for name in names)
    return next((size for size in sizes if type(size) is int and 0 < size < 2**31), None)


def _read_description(path: str, file: Path) -> dict[str, Any] | None:
    """What config.json says of the model; None where there is none."""
    if not file.is_file():
        return None
    try:
        description = json.loads(read_bytes(file, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError("model.path", path, f"has a config.json that cannot be read ({error})") from error
    if not isinstance(description, dict):
        raise ConfigError("model.path", path, "has a config.json that holds no mapping")
    return description


def _kind_of(config: ModelConfig, description: dict[str, Any]) -> Kind:
    family = description.get("model_type")
    encoder = str(family) in ENCODER_TYPES and not description.get("is_decoder")
    asked = config.kind.partition(":")[0]
    if asked == "causal" and encoder:
        raise ConfigError(
            "model.kind", config.kind, f"{config.path} is an encoder ({family}): its tokens attend to both sides",
            "Set model.kind=auto, or give a causal language model.",
        )
    if asked in ("causal", "classifier"):
        return "causal" if asked == "causal" else "classifier"
    saved = description.get("architectures") or []
    return "classifier" if encoder or "ForSequenceClassification" in str(saved) else "causal"


def _hub_description(config: ModelConfig) -> dict[str, Any]:
    from transformers import AutoConfig

    check_model_at_hand(config.path, config.revision)
    try:
        found = AutoConfig.from_pretrained(
            config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except MODEL_FAULTS as error:
        refuse_untrusted(config.path, error)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            "model.path", config.path, f"cannot be loaded ({first})", "Give a model folder or a hub name you can reach."
        ) from error
    return dict(found.to_dict())


def refuse_untrusted(path: str, error: Exception) -> None:
    """Raises `ConfigError` where transformers asks whether code that comes with the model may run."""
    if "trust_remote_code=True" in str(error):
        raise ConfigError(
            "model.trust_remote_code", False, f"{path} comes with code of its own, which runs only where you say so",
            "Read that code, then give model.trust_remote_code=true on the command line or in your own --config file;"
            " it is never taken from a run folder.",
        ) from error
