"""Adapters on disk: always ordinary PEFT adapters. PEFT's own names appear here and in `peft_adalora` alone.

An adapter is written in the `inverse` convention: with rescale `none`, alpha is multiplied by the mean-field
factor, which gives the same model (and stock PEFT then computes its mean-field read-out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.adapters.heads import HeadState
from pipeline.adapters.linear import LoRALinear
from pipeline.adapters.peft_adalora import peft_adalora, plain_lora, with_peft_schedule
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import WEIGHT_POSITIONS, Consistency, Site
from pipeline.errors import ConfigError, RunFolderError
from pipeline.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    manifest_faults,
    read_json,
    sha256_file,
    write_json,
)

METHOD_FILE = "loradrop.json"
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<name>lora_[ABE])(?:\.weight)?")

NO_HEAD = HeadState()

NAMES = {"LORA": ("lora_A", "lora_B"), "ADALORA": ("lora_A", "lora_B", "lora_E")}
"""PEFT's name of a kind -> its tensors of one layer."""

Matrices = dict[str, tuple[Tensor, ...]]
"""layer name -> (A (R, I), B (O, R)), of AdaLoRA (A, B, E (R,)); fp32 on the CPU."""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from disk."""

    spec: AdapterSpec
    matrices: Matrices
    sha256: str
    base: str | None
    head: HeadState = NO_HEAD
    """What a classifier's adapter trained whole; empty for a causal model's."""


def adapter_matrices(
    layers: Mapping[str, LoRALinear], adapter: int, value_of: Callable[[nn.Parameter], Tensor] = Tensor.detach
) -> Matrices:
    """The matrices of one adapter. `value_of` gathers a parameter where it is sharded (then a collective)."""
    matrices: Matrices = {}
    for name, layer in layers.items():
        for bucket in layer.buckets:
            if adapter in bucket.slot:
                values = [value_of(getattr(bucket, part))[bucket.slot[adapter]] for part in bucket.names]
                matrices[name] = tuple(value.to("cpu", torch.float32).clone() for value in values)
    return matrices


def write_adapter(
    folder: Path,
    matrices: Matrices,
    spec: AdapterSpec,
    layer_count: int,
    base: str,
    suffixes: Mapping[str, int],
    head: HeadState = NO_HEAD,
) -> None:
    """Write a PEFT LoRA or AdaLoRA adapter: adapter_model.safetensors, adapter_config.json, loradrop.json.

    Args:
        layer_count: transformer layers of the model, to resolve sites that cover a part of them.
        base: name or path of the base model, as PEFT's base_model_name_or_path.
        suffixes: last name part -> how many linears of the model end in it, to shorten target_modules.
        head: modules trained whole; with them the adapter is a classifier's (SEQ_CLS, modules_to_save).
    """
    from peft import LoraConfig

    stored = in_inverse_convention(spec, list(matrices), layer_count)
    common = {
        "lora_alpha": stored.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _shorten(list(matrices), suffixes),
        "inference_mode": True,
        "base_model_name_or_path": base,
        "task_type": "SEQ_CLS" if head.modules else "CAUSAL_LM",
        "modules_to_save": list(head.modules) or None,
    }
    tensors: dict[str, Tensor] = {}
    if stored.schedule is not None:
        config, tensors = peft_adalora(stored, stored.schedule, matrices, _PREFIX, common)
    else:
        config = LoraConfig(
            r=stored.rank,
            use_rslora=stored.rslora,
            rank_pattern=dict(stored.rank_pattern),
            alpha_pattern=dict(stored.alpha_pattern),
            **common,  # type: ignore[arg-type]
        )
        for name, (A, B) in matrices.items():
            tensors[f"{_PREFIX}{name}.lora_A.weight"] = A.contiguous()
            tensors[f"{_PREFIX}{name}.lora_B.weight"] = B.contiguous()
    config.save_pretrained(str(folder))
    tensors.update({f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in head.tensors.items()})
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    sites = [site.model_dump(mode="json") for site in stored.sites]
    write_json(folder / METHOD_FILE, {"sites": sites, "consistency": stored.consistency.model_dump(mode="json")})


def read_adapter(folder: Path) -> StoredAdapter:
    """Read any PEFT LoRA or AdaLoRA adapter; sites come from loradrop.json where there is one.

    Raises:
        RunFolderError: missing or broken files, others than its manifest names (where it has one), a kind of adapter
            that is no plain LoRA, or matrices that are empty (a sharded save that was not gathered).
    """
    if (folder / MANIFEST).exists() and (faults := manifest_faults(folder)):
        raise RunFolderError(str(folder), None, f"is damaged ({'; '.join(faults)})", "Put the whole folder back.")
    try:
        return _read_adapter(folder)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"holds no adapter that can be read ({error!r})"
        raise RunFolderError(str(folder), None, fault, "Save the adapter again with PEFT.") from error


def _read_adapter(folder: Path) -> StoredAdapter:
    config = read_json(folder / ADAPTER_CONFIG, "Give the folder of a PEFT adapter.")
    _refuse_other_kinds(folder, config)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise RunFolderError(str(weights), None, "does not exist", "Save the adapter as safetensors.")
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    modules = tuple(config.get("modules_to_save") or ())
    names = NAMES[config["peft_type"]]
    for key, tensor in load_file(weights).items():
        match = _KEY.fullmatch(key)
        name = key.removeprefix(_PREFIX)
        if match is None and tensor.numel() and any(module in name for module in modules):
            whole[name] = tensor.to(torch.float32)
            continue
        is_matrix = match is not None and match["name"] in names and tensor.dim() == 2
        if match is None or not is_matrix or (tensor.numel() == 0 and "lora_E" not in names):
            remedy = "Only LoRA and AdaLoRA adapters are read."
            raise RunFolderError(str(weights), key, f"is no matrix of a {config['peft_type']} adapter", remedy)
        value = tensor.flatten() if match["name"] == "lora_E" else tensor
        found.setdefault(match["layer"], {})[match["name"]] = value.to(torch.float32)
    complete = {layer: parts for layer, parts in found.items() if len(parts) == len(names)}
    if len(complete) != len(found) or not found:
        raise RunFolderError(str(weights), None, f"lacks {' or '.join(names)} of some layer", "Save the adapter again.")
    matrices: Matrices = {layer: tuple(parts[name] for name in names) for layer, parts in complete.items()}
    base = config.get("base_model_name_or_path")
    head = HeadState(modules if whole else (), whole)
    return StoredAdapter(_spec_of(folder, config, matrices), matrices, sha256_file(weights), base, head)


def load_matrices(layers: Mapping[str, LoRALinear], adapter: int, matrices: Matrices, field: str) -> None:
    """Copy stored matrices into an attached adapter.

    Raises:
        ConfigError: a layer is missing on either side, or a shape differs.
    """
    expected = {name for name, layer in layers.items() if any(adapter in bucket.slot for bucket in layer.buckets)}
    if expected != set(matrices):
        odd = sorted(expected ^ set(matrices))[:3]
        raise ConfigError(
            field,
            None,
            f"adapts other layers than the model ({', '.join(odd)}, …)",
            "Use its own base model and target_modules.",
        )
    for name, tensors in matrices.items():
        bucket = next(b for b in layers[name].buckets if adapter in b.slot)
        own = [getattr(bucket, part)[bucket.slot[adapter]] for part in bucket.names]
        theirs, ours = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in own]
        if theirs != ours:
            raise ConfigError(
                field,
                None,
                f"has {' and '.join(map(str, theirs))} at {name}, not {' and '.join(map(str, ours))}",
                "Set adapter.rank to the checkpoint's, and use its base model.",
            )
        with torch.no_grad():
            for value, tensor in zip(own, tensors, strict=True):
                value.copy_(tensor)


def as_plain_lora(stored: StoredAdapter) -> StoredAdapter:
    """The LoRA that an adapter is at inference: itself, or AdaLoRA's triplets as one padded rank (`plain_lora`)."""
    if stored.spec.kind == "lora":
        return stored
    spec, matrices = plain_lora(stored.spec, stored.matrices)
    return replace(stored, spec=spec, matrices=matrices)


def in_inverse_convention(spec: AdapterSpec, layers: list[str], layer_count: int) -> AdapterSpec:
    """The same model with rescale `inverse`: alpha × Π(1-rate) wherever a weight site had none."""
    factors = {name: spec.mean_field_factor(name, layer_count) for name in layers}
    if all(factor == 1.0 for factor in factors.values()):
        return spec
    sites = tuple(
        site.model_copy(update={"compensation": "inverse"})
        if site.compensation == "none" and site.position in WEIGHT_POSITIONS
        else site
        for site in spec.sites
    )
    alphas = {name: spec.alpha_of(name) * factors[name] for name in layers}
    if len(set(alphas.values())) == 1:
        return replace(spec, sites=sites, alpha=next(iter(alphas.values())), alpha_pattern={})
    return replace(spec, sites=sites, alpha_pattern={f"^{re.escape(name)}": alpha for name, alpha in alphas.items()})


def masked_matrices(matrices: Matrices, masks: Mapping[str, Mapping[str, Tensor]], member: int) -> Matrices:
    """The adapter without masks that one mask draw is: A diag(a), diag(b) B diag(r)."""
    masked: Matrices = {}
    for name, (A, B, *rest) in matrices.items():
        layer = {position: mask[member].cpu() for position, mask in masks.get(name, {}).items()}
        A = A * layer["lora_A"] if "lora_A" in layer else A
        B = B * layer["lora_B"].unsqueeze(1) if "lora_B" in layer else B
        B = B * layer["lora_rank"][: B.shape[1]] if "lora_rank" in layer else B
        masked[name] = (A, B, *rest)
    return masked


def _spec_of(folder: Path, config: Mapping[str, Any], matrices: Matrices) -> AdapterSpec:
    method = read_json(folder / METHOD_FILE) if (folder / METHOD_FILE).exists() else {"sites": []}
    spec = AdapterSpec(
        alpha=float(config["lora_alpha"]),
        sites=tuple(Site.model_validate(site) for site in method["sites"]),
        consistency=Consistency.model_validate(method.get("consistency", {})),
        layers=frozenset(matrices),
    )
    if config["peft_type"] == "ADALORA":
        return with_peft_schedule(spec, config, matrices)
    return replace(
        spec,
        rank=int(config["r"]),
        rslora=bool(config.get("use_rslora", False)),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
    )


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    where = str(folder / ADAPTER_CONFIG)
    if config.get("peft_type") not in NAMES:
        remedy = "Convert it to LoRA first."
        raise RunFolderError(where, config.get("peft_type"), "is neither a LoRA nor an AdaLoRA adapter", remedy)
    whole = () if config.get("task_type") == "SEQ_CLS" else ("modules_to_save",)
    for key in ("use_dora", *whole, "layer_replication", "use_qalora", "lora_bias"):
        if config.get(key):
            remedy = "Only plain LoRA adapters are read."
            raise RunFolderError(f"{where}: {key}", config[key], "is not plain LoRA", remedy)
    if str(config.get("init_lora_weights", True)).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
        raise RunFolderError(
            f"{where}: init_lora_weights",
            config["init_lora_weights"],
            "changes the base model",
            "Save the residual base and give it as model.path, or convert the adapter to plain LoRA with PEFT.",
        )


def _shorten(names: list[str], suffixes: Mapping[str, int]) -> list[str]:
    """Suffixes where they select exactly these layers, full names otherwise."""
    counts: dict[str, int] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        counts[leaf] = counts.get(leaf, 0) + 1
    if all(suffixes.get(leaf) == count for leaf, count in counts.items()):
        return sorted(counts)
    return sorted(names)
