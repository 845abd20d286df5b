"""DeepSpeed JSON files: found by name, "auto" filled by the run, contradictions refused. No torch in here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.model import ModelConfig
from pipeline.config.plain_yaml import DEEPEST, read_small
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError

DS_CONFIG_FOLDERS = (
    Path(__file__).resolve().parents[2] / "ds_configs",  # a checkout
    Path(__file__).resolve().parents[1] / "ds_configs",  # an installed wheel
)


def find_ds_config(name: str) -> Path:
    """A DeepSpeed JSON by path, or by name in ds_configs/."""
    if name.endswith(".json") and os.path.isfile(name):
        return Path(name)
    for folder in DS_CONFIG_FOLDERS:
        if os.path.isfile(named := folder / f"{name}.json"):
            return named
    known = sorted(p.stem for folder in DS_CONFIG_FOLDERS for p in folder.glob("*.json"))
    raise ConfigError(
        "train.deepspeed", name, "is neither a file nor in ds_configs/", f"There are: {', '.join(known)}."
    )


def read_ds_config(name: str) -> dict[str, Any]:
    """The settings of a DeepSpeed JSON, as they stand in the file.

    Raises:
        ConfigError: no such file, no JSON object, or a block of it that has another form than DeepSpeed's.
    """
    path = find_ds_config(name)
    remedy = "Start from ds_configs/zero2.json."
    try:
        source = json.loads(read_small(path))
        if not isinstance(source, dict):
            raise ValueError("it must be an object")
        if any(key.count(".") >= DEEPEST for key, _, _ in _leaves(source)):
            raise RecursionError
    except RecursionError as error:
        raise ConfigError(str(path), None, f"is nested more than {DEEPEST} deep", remedy) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), None, f"is not a JSON file of settings ({error})", remedy) from error
    for block in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(source.get(block, {}), dict):
            raise ConfigError(f"{path.name}: {block}", source[block], "must be an object", remedy)
    stage = source.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError(f"{path.name}: zero_optimization.stage", stage, "must be 0, 1, 2 or 3", remedy)
    return source


def decided_by(train: TrainConfig, micro_steps: int | None, bf16: bool | None) -> dict[str, Any]:
    """What the run decides of a DeepSpeed file: dotted key -> value; None = known later.

    Args:
        micro_steps: accumulation steps, which follow from the number of processes.
        bf16: whether ZeRO-3 holds parameters in bfloat16, which follows from the device.
    """
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": train.max_gradient_norm,
        "bf16.enabled": bf16,
    }


def fill_ds_config(source: dict[str, Any], decided: dict[str, Any], where: str) -> dict[str, Any]:
    """Replace every "auto" by what the run decides.

    Args:
        source: parsed JSON.
        decided: dotted key -> value, e.g. `train_batch_size`, `bf16.enabled`; None = decided later, so left as it is.

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
            node[leaf] = node[leaf] if decided[key] is None else decided[key]
        elif decided.get(key) is not None and node[leaf] != decided[key]:
            raise ConfigError(
                f"{where}: {key}", node[leaf], f"contradicts the run, which has {decided[key]}", 'Set it to "auto".'
            )
    for block in ("bf16", "fp16"):
        if filled.get(block, {}).get("enabled") and zero_stage(filled) < 3:
            raise ConfigError(
                f"{where}: {block}.enabled",
                True,
                "would cast the fp32 adapters and accumulate in 16 bits",
                "Remove the block; model.compute_dtype sets the precision of the base.",
            )
    if zero_stage(filled) == 3:
        _check_stage_3(filled, where)
    return filled


def zero_stage(ds_config: dict[str, Any]) -> int:
    """0, 1, 2 or 3."""
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


def shards_parameters(name: str) -> bool:
    """Whether `train.deepspeed` names a file of ZeRO-3."""
    return zero_stage(read_ds_config(name)) == 3


def combination_fault(ds_config: dict[str, Any], model: ModelConfig) -> ConfigError | None:
    """Why a base cannot be trained under a DeepSpeed file. Trainer and `pipeline.support.deepspeed` both ask here."""
    if zero_stage(ds_config) < 3:
        return None
    if model.quantization == "int8":
        return ConfigError(
            "model.quantization", "int8", "ZeRO-3 would shard nothing: bitsandbytes keeps a second reference to the"
            " whole 8-bit weights in every process", "Set model.quantization=nf4, or train.deepspeed=zero2.",
        )
    if model.hold == "dequantized":
        return ConfigError(
            "model.hold", "dequantized", "ZeRO-3 shards the quantized weights", "Leave it at auto, or set"
            " train.deepspeed=zero2.",
        )
    return sharded_float16() if model.compute_dtype == "float16" else None


def optimizer_fault(ds_config: dict[str, Any], train: TrainConfig, on_cpu: bool) -> ConfigError | None:
    """Why `train.optimizer` cannot be used under a DeepSpeed file, or on the device.

    DeepSpeed takes any optimizer (`zero_allow_untested_optimizer`), but ZeRO-1 to 3 hand it one flat part of all
    parameters per process: the blocks of its moments belong to no parameter, and no checkpoint could be read under
    another number of processes.
    """
    if train.optimizer == "adamw":
        return None
    if stage := zero_stage(ds_config):
        return ConfigError(
            "train.optimizer", train.optimizer, f"keeps moments by parameter, and ZeRO-{stage} of {train.deepspeed}"
            " cuts them into parts that belong to none", "Set train.deepspeed=zero0, or train.optimizer=adamw.",
        )
    if on_cpu and train.optimizer.startswith("paged"):
        return ConfigError(
            "train.optimizer", train.optimizer, "moves moments from a GPU to the host, and there is no GPU",
            f"Set train.optimizer={train.optimizer.removeprefix('paged_')}.",
        )
    return None


def sharded_float16() -> ConfigError:
    """Of ZeRO-3 over a base in float16, also where the device chose it."""
    return ConfigError(
        "model.compute_dtype", "float16", "ZeRO-3 holds the adapters in the base's precision, and the loss scale of"
        " float16 is undone in float32", "Set model.compute_dtype=bfloat16 or float32, or train.deepspeed=zero2.",
    )


def _check_stage_3(filled: dict[str, Any], where: str) -> None:
    """ZeRO-3 gathers parameters in flat buffers of one precision; sums stay fp32."""
    if filled.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{where}: fp16.enabled", True, "would need loss scaling", "Use bf16.")
    wanted = {"bf16": "enabled", "data_types": "grad_accum_dtype"}
    for block, key in wanted.items():
        if key not in filled.get(block, {}):
            remedy = "Start from ds_configs/zero3.json."
            raise ConfigError(f"{where}: {block}.{key}", None, "is missing; ZeRO-3 needs it", remedy)
    if filled["data_types"]["grad_accum_dtype"] != "fp32":
        accumulated = filled["data_types"]["grad_accum_dtype"]
        raise ConfigError(f"{where}: data_types.grad_accum_dtype", accumulated, "must be fp32", "Set it to fp32.")


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    for leaf, value in list(tree.items()):
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{leaf}.")
        else:
            yield f"{prefix}{leaf}", tree, leaf
