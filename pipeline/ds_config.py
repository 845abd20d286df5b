"""DeepSpeed JSON files: found by name, "auto" filled by the run, contradictions refused. No torch in here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

DS_CONFIG_FOLDERS = (
    Path(__file__).resolve().parent.parent / "ds_configs",  # a checkout
    Path(__file__).resolve().parent / "ds_configs",  # an installed wheel
)


def find_ds_config(name: str) -> Path:
    """A DeepSpeed JSON by path, or by name in ds_configs/."""
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        return path
    for folder in DS_CONFIG_FOLDERS:
        if (named := folder / f"{name}.json").is_file():
            return named
    known = sorted(p.stem for folder in DS_CONFIG_FOLDERS for p in folder.glob("*.json"))
    raise ConfigError(
        "train.deepspeed", name, "is neither a file nor in ds_configs/", f"There are: {', '.join(known)}."
    )


def fill_ds_config(source: dict[str, Any], decided: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace every "auto" by what the run decides.

    Args:
        source: parsed JSON.
        decided: dotted key -> value, e.g. `train_batch_size`, `zero_optimization.stage`.

    Raises:
        ConfigError: a literal that contradicts the run, a value nobody decides left at "auto", a scheduler or
            optimizer block, or a bf16/fp16 block below ZeRO-3 (it would cast the fp32 adapters).
    """
    for block, remedy in (("scheduler", "train.schedule"), ("optimizer", "train.learning_rate")):
        if block in source:
            raise ConfigError(f"{where}: {block}", None, "is the run's own business", f"Remove it and set {remedy}.")
    filled = json.loads(json.dumps(source))
    for key, node, leaf in _leaves(filled):
        if node[leaf] == "auto":
            if key not in decided:
                raise ConfigError(f"{where}: {key}", "auto", "is not decided by the run", "Give it a value.")
            node[leaf] = decided[key]
        elif key in decided and node[leaf] != decided[key]:
            raise ConfigError(
                f"{where}: {key}", node[leaf], f"contradicts the run, which has {decided[key]}", 'Set it to "auto".'
            )
    for block in ("bf16", "fp16"):
        if filled.get(block, {}).get("enabled") and filled.get("zero_optimization", {}).get("stage", 0) < 3:
            raise ConfigError(
                f"{where}: {block}.enabled",
                True,
                "would cast the fp32 adapters and accumulate in 16 bits",
                "Remove the block; model.compute_dtype sets the precision of the base.",
            )
    return filled


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    for leaf, value in list(tree.items()):
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{leaf}.")
        else:
            yield f"{prefix}{leaf}", tree, leaf
