"""Which runs can share their passes with others on one base. No torch in here."""

from __future__ import annotations

from typing import Any

from pipeline.config.deepspeed import read_ds_config, zero_stage
from pipeline.config.run import RunConfig


def pack_refusal(shared: RunConfig, config: RunConfig) -> str | None:
    """Why a run cannot be trained in a pack, so trains alone; None where it can.

    Args:
        shared: whose base model and rows the pack has.
    """
    for section, free in (("model", "trust_remote_code"), ("data", "cache")):
        if different := _difference(_values(shared, section, free), _values(config, section, free)):
            return f"{section}.{different} is not that of the pack, whose runs share one base and its rows"
    if not config.adapter.fused:
        return "adapter.fused = false is a matter of the layers, which runs of a pack share"
    if config.adapter.kind == "adalora":
        return "adapter.kind = adalora chooses its ranks from whole gradients of one run"
    if config.data.streaming:
        return "data.streaming reads rows in an order of each run's own"
    if config.model.compute_dtype == "float16":
        return "model.compute_dtype = float16 needs a loss scale, which one backward pass of many runs has not"
    if config.model.quantization == "int8":
        return "model.quantization = int8 looks for outliers over all rows of a pass, so that runs are not independent"
    if config.train.optimizer != "adamw":
        return f"train.optimizer = {config.train.optimizer} keeps the moments of one run, in blocks or pages of its own"
    zero = read_ds_config(config.train.deepspeed)
    if zero_stage(zero) == 3 or any(key.startswith("offload") for key in zero.get("zero_optimization", {})):
        return f"train.deepspeed = {config.train.deepspeed} shards or offloads what a pack holds whole"
    return None


def _values(config: RunConfig, section: str, free: str) -> dict[str, Any]:
    """A section without the key that does not decide what is loaded."""
    return {key: value for key, value in getattr(config, section).model_dump(mode="json").items() if key != free}


def _difference(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    return next((key for key in ours if ours[key] != theirs.get(key)), None)
