"""Adapters on a base model: fresh as configured, or those that were stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.heads import load_head
from pipeline.adapters.peft_format import StoredAdapter, load_matrices, read_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.model.load import BaseModel


def attach_adapter(config: AdapterConfig, base: BaseModel, max_steps: int, seed: int) -> Adapters:
    """Attach the configured adapter: fresh, or from `adapter.init_from`.

    A classifier's head starts from the stored one where there is one; a LoRA without a head is a start, too.

    Raises:
        ConfigError: the targets do not match, or the stored adapter does not fit the configuration.
    """
    spec = AdapterSpec.from_config(config, max_steps)
    if config.init_from is None:
        return attach(base.model, [spec], config.target_modules, seed, base.heads)
    stored = read_adapter(Path(config.init_from))
    _refuse_other_scaling(config, spec, stored)
    adapters = attach(base.model, [spec], config.target_modules, seed, base.heads)
    load_matrices(adapters.layers, 0, stored.matrices, "adapter.init_from")
    if stored.head.tensors:
        load_head(adapters.heads, 0, stored.head, "adapter.init_from")
    return adapters


def attach_stored(base: BaseModel, stored: list[StoredAdapter], seed: int) -> Adapters:
    """K adapters from disk on one base, ranks and layers mixed as they come."""
    names = sorted({name for adapter in stored for name in adapter.matrices})
    adapters = attach(base.model, [adapter.spec for adapter in stored], names, seed, base.heads)
    for k, adapter in enumerate(stored):
        load_matrices(adapters.layers, k, adapter.matrices, f"adapter {k}")
        load_head(adapters.heads, k, adapter.head, f"adapter {k}")
    return adapters


def _refuse_other_scaling(config: AdapterConfig, spec: AdapterSpec, stored: StoredAdapter) -> None:
    if stored.spec.kind != "lora":
        raise ConfigError(
            "adapter.init_from", config.init_from, "is an AdaLoRA adapter",
            "Give the plain LoRA that `export` makes of it.",
        )
    for name in stored.matrices:
        ours, theirs = spec.scaling_of(name), stored.spec.scaling_of(name)
        if spec.rank_of(name) != stored.spec.rank_of(name) or not math.isclose(ours, theirs, rel_tol=1e-6):
            raise ConfigError(
                "adapter.init_from",
                config.init_from,
                f"has rank {stored.spec.rank_of(name)} and scaling {theirs:g} at {name};"
                f" the configuration has rank {spec.rank_of(name)} and scaling {ours:g}",
                f"Set adapter.rank={stored.spec.rank} and adapter.alpha={stored.spec.alpha:g}.",
            )
