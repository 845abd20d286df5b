"""Adapters on a base model: fresh as configured, or those that were stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.adapters.attach import VACANT, Adapters, attach, match_targets, place, remove, wrap
from pipeline.adapters.heads import load_head
from pipeline.adapters.peft_format import StoredAdapter, load_matrices, read_adapter
from pipeline.adapters.sites.anatomy import check_sites, is_causal
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
    spec, stored = AdapterSpec.from_config(config, max_steps), _stored_start(config, max_steps)
    adapters = attach(base.model, [spec], config.target_modules, seed, base.heads, config.fused)
    if stored is not None:
        _load_start(adapters, 0, stored)
    return adapters


def open_slots(base: BaseModel) -> Adapters:
    """The base ready for adapters that come and leave: every linear that `all-linear` means is wrapped."""
    return wrap(base.model, match_targets(base.model, "all-linear", base.heads), base.heads)


def admit_adapter(adapters: Adapters, config: AdapterConfig, max_steps: int, seed: int) -> int:
    """Put the configured adapter into a free slot, where it starts as it would alone; returns the slot's number.

    Raises:
        ConfigError: as `attach_adapter`; a target that is not wrapped.
    """
    model = adapters.model
    spec = AdapterSpec.from_config(config, max_steps).resolved_for(is_causal(model))
    stored = _stored_start(config, max_steps)
    check_sites(model, [spec])
    targeted = match_targets(model, config.target_modules, adapters.heads)
    if odd := [name for name in targeted if name not in adapters.layers]:
        raise ConfigError(
            "adapter.target_modules", config.target_modules, f"matches {odd[0]}, which runs that share a pass leave"
            " alone", "Train it by itself, or use all-linear.",
        )
    slot = next((k for k, its in enumerate(adapters.specs) if its is VACANT), len(adapters.specs))
    place(adapters, slot, spec, targeted, seed, 0)
    try:
        if stored is not None:
            _load_start(adapters, slot, stored)
    except ConfigError:
        remove(adapters, slot)
        raise
    return slot


def attach_stored(base: BaseModel, stored: list[StoredAdapter], seed: int, fused: bool = True) -> Adapters:
    """K adapters from disk on one base, ranks and layers mixed as they come."""
    names = sorted({name for adapter in stored for name in adapter.matrices})
    adapters = attach(base.model, [adapter.spec for adapter in stored], names, seed, base.heads, fused)
    for k, adapter in enumerate(stored):
        load_matrices(adapters.layers, k, adapter.matrices, f"adapter {k}")
        load_head(adapters.heads, k, adapter.head, f"adapter {k}")
    return adapters


def _stored_start(config: AdapterConfig, max_steps: int) -> StoredAdapter | None:
    if config.init_from is None:
        return None
    stored = read_adapter(Path(config.init_from))
    _refuse_other_scaling(config, AdapterSpec.from_config(config, max_steps), stored)
    return stored


def _load_start(adapters: Adapters, adapter: int, stored: StoredAdapter) -> None:
    load_matrices(adapters.layers, adapter, stored.matrices, "adapter.init_from")
    if stored.head.tensors:
        load_head(adapters.heads, adapter, stored.head, "adapter.init_from")


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
                _settings_of(stored.spec),
            )


def _settings_of(spec: AdapterSpec) -> str:
    """By which settings a stored LoRA is a start; none give a layer a rank or an alpha of its own."""
    if spec.rank_pattern or spec.alpha_pattern:
        return "Its layers differ in rank or alpha: give an adapter that has one of each."
    return f"Set adapter.rank={spec.rank}, adapter.alpha={spec.alpha:g} and adapter.rslora={str(spec.rslora).lower()}."
