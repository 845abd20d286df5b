"""What a serving engine loads: its loader's rules, for our files, and which of them a folder breaks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline.adapters.peft_format import StoredAdapter
from pipeline.errors import ConfigError, RunFolderError
from pipeline.export.order import Exported, Loaded, Order
from pipeline.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from pipeline.model.load import BaseIdentity

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
"""`model_type` of the models whose code in the engines' releases below has been read: their linear layers are these."""
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB])\.weight")
_DIFFERENT = (
    "modules_to_save", "use_dora", "use_rslora", "lora_bias", "layer_replication", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "rank_pattern", "alpha_pattern", "target_parameters",
)
"""Entries of adapter_config.json that change what an adapter computes; each engine's releases refuse or ignore some."""


@dataclass(frozen=True)
class Engine:
    """An engine and the release whose loader was read."""

    name: str
    """Of the form in export.forms, and of its folder."""
    title: str
    version: str
    ranks: tuple[int, ...]
    """Ranks that an adapter is padded to, ascending."""
    stacked: tuple[tuple[str, str], ...]
    """(q, v): where one of the two is adapted in a layer, the loader needs the other."""
    command: Callable[[str, int, Sequence[str], BaseIdentity], str]
    """(base, rank, folders, what the base is) -> the line that serves them."""
    run: Callable[[Loaded, Path, Sequence[Exported]], list[dict[str, Any]] | None] | None = None
    """(loaded, export/, folders) -> what was measured of each in the engine itself; None where it is not here."""


def refuse(engine: Engine, order: Order, model_type: str, stored: StoredAdapter) -> None:
    """Refuse what the engine would refuse or, worse, serve as something else.

    Raises:
        ConfigError: names the reason and the way out.
    """
    fault, remedy = None, f"Leave {engine.name} out of export.forms."
    if order.model_kind != "causal" or stored.head.modules:
        fault = f"{engine.title} takes no modules that are trained whole (modules_to_save), as a classifier has them"
    elif model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        fault = f"which layers of a {model_type} {engine.title} adapts has not been checked, only of {known}"
        remedy += " The folder adapter/ is plain PEFT, and may load."
    elif odd := sorted(name for name in stored.matrices if name.rpartition(".")[2] not in MODULES):
        fault = f"{odd[0]} is adapted, whose update {engine.title} leaves out of some scores or refuses"
        remedy += " Or train with adapter.target_modules=all-linear, which leaves the head alone."
    elif (largest := largest_rank(stored)) > engine.ranks[-1]:
        fault = f"the adapter has rank {largest}, and {engine.title} takes {engine.ranks[-1]} at most"
        remedy += " Or train with a lower adapter.rank."
    elif alone := _alone(engine, stored.matrices):
        fault = f"{engine.title} stacks {alone[1]} and {alone[2]}, and only one of them is adapted in {alone[0]}"
        remedy += " Or train with both in adapter.target_modules."
    if fault is not None:
        raise ConfigError("export.forms", engine.name, fault, remedy)


def faults(engine: Engine, folder: Path) -> list[str]:
    """The engine's rules that a folder breaks; empty: it loads. Reads the files as they are, whoever wrote them."""
    try:
        config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
            shapes = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (RunFolderError, SafetensorError, OSError) as error:
        return [str(error)]
    rank, found = config.get("r"), []
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        found.append("it is no LoRA without biases")
    if not isinstance(config.get("target_modules"), list):
        found.append("target_modules is no list")
    found += [f"{key} is set" for key in _DIFFERENT if config.get(key)]
    if rank not in engine.ranks:
        found.append(f"rank {rank} is none of {', '.join(map(str, engine.ranks))}")
    parts: dict[str, set[str]] = defaultdict(set)
    for key, shape in sorted(shapes.items()):
        match = _KEY.fullmatch(key)
        if match is None or match["module"].rpartition(".")[2] not in MODULES:
            found.append(f"{key} is no matrix of a layer that it adapts")
            continue
        parts[match["module"]].add(match["part"])
        if len(shape) != 2 or shape[0 if match["part"] == "lora_A" else 1] != rank:
            found.append(f"{key} has shape {shape} at rank {rank}")
    found += [f"{module} lacks a matrix" for module, there in parts.items() if len(there) < 2]
    if not parts:
        found.append("it adapts nothing")
    if alone := _alone(engine, parts):
        found.append(f"{alone[0]} has only one of {alone[1]} and {alone[2]}")
    return found


def _alone(engine: Engine, modules: Collection[str]) -> tuple[str, str, str] | None:
    """(layer, this, that): a layer in which one of two modules is adapted that the engine stacks."""
    for this, that in engine.stacked:
        for module in sorted(modules):
            layer, _, leaf = module.rpartition(".")
            other = {this: that, that: this}.get(leaf)
            if other is not None and f"{layer}.{other}" not in modules:
                return layer, this, that
    return None


def largest_rank(stored: StoredAdapter) -> int:
    """Of its layers."""
    return max(len(A) for A, *_ in stored.matrices.values())


def base_argument(loaded: Loaded) -> str:
    """The base in a command: its hub name with its commit, or BASE for a folder."""
    return "BASE" if loaded.content["files"] else str(loaded.content["name"])


def notes(engine: Engine, loaded: Loaded, names: Sequence[str]) -> list[str]:
    """First lines of a command file: what BASE is, for which values scores hold, what to do with several adapters."""
    lines = [
        f"# For {engine.title}, by the rules of version {engine.version}. Run in this folder.",
        f"# Base: {loaded.content['name']}. {loaded.content['get']}",
    ]
    if loaded.identity.quantization != "none":
        lines += [
            f"# Scores and temperature hold for this base quantized to {loaded.identity.quantization}. Over its 16-bit",
            "# weights the engine says other probabilities: quantize at load, or fit the temperature again.",
        ]
    if len(names) > 1:
        lines += [
            f"# An ensemble is one request per draw ({names[1]}, …), their probabilities averaged by the client, then",
            "# divided by the temperature of reading.json: engines average no adapters.",
        ]
    return lines
