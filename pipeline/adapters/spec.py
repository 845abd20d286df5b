"""What one adapter is, in plain values: the layers know nothing of configuration files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.adapters.adalora_schedule import RankSchedule
from pipeline.config.adapter import AdapterConfig
from pipeline.config.method import Consistency, Method, Site

_LAYER_NUMBER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter of a model: ranks, scalings, dropout sites."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    sites: tuple[Site, ...] = ()
    consistency: Consistency = field(default_factory=Consistency)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers: frozenset[str] | None = None
    """Names of the layers it adapts; None = every targeted layer."""
    schedule: RankSchedule | None = None
    """AdaLoRA's rank budget; its `rank` is then that of the start, and `rank_pattern` holds the pruned ones."""

    @classmethod
    def from_config(cls, config: AdapterConfig, max_steps: int = 0) -> AdapterSpec:
        """The spec that an `adapter:` section describes; AdaLoRA's depends on the length of the run, too."""
        method: Method = config.resolved_method()
        adaptive = config.kind == "adalora"
        schedule = RankSchedule.from_config(config.adalora, config.rank, max_steps) if adaptive else None
        return cls(
            schedule=schedule,
            rank=config.rank if schedule is None else schedule.initial_rank,
            alpha=config.alpha,
            rslora=config.rslora,
            sites=method.sites,
            consistency=method.consistency,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
        )

    @property
    def kind(self) -> Literal["lora", "adalora"]:
        """Which matrices it has."""
        return "lora" if self.schedule is None else "adalora"

    def resolved_for(self, causal: bool) -> AdapterSpec:
        """The spec with `layers: auto` replaced: the latter half of a causal decoder, all layers of an encoder."""
        layers = (0.5, 1.0) if causal else (0.0, 1.0)
        sites = (s.model_copy(update={"layers": layers}) if s.layers == "auto" else s for s in self.sites)
        return replace(self, sites=tuple(sites))

    def adapts(self, layer: str) -> bool:
        """Whether the adapter has matrices in a layer."""
        return self.layers is None or layer in self.layers

    def rank_of(self, layer: str) -> int:
        """R of a layer, `rank_pattern` considered (PEFT's matching rules)."""
        return int(_by_pattern(self.rank_pattern, layer, self.rank))

    def alpha_of(self, layer: str) -> float:
        """alpha of a layer, `alpha_pattern` considered."""
        return float(_by_pattern(self.alpha_pattern, layer, self.alpha))

    def scaling_of(self, layer: str) -> float:
        """s = alpha / R, or alpha / sqrt(R) with rsLoRA (arXiv 2312.03732); of AdaLoRA, R is that of the start."""
        if self.kind == "adalora":
            return self.alpha_of(layer) / (self.rank + 1e-5)  # as PEFT has it
        rank = self.rank_of(layer)
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rslora else rank)

    def sites_of(self, layer: str, layer_count: int) -> dict[str, Site]:
        """position -> site, for the sites with a rate above 0 that cover this layer."""
        return {
            site.position: site for site in self.sites if site.rate > 0 and covers(site, layer, layer_count)
        }

    def mean_field_factor(self, layer: str, layer_count: int) -> float:
        """E[mask product] of a weight entry: Π (1-rate) over weight sites without rescale, else 1."""
        factor = 1.0
        for position, site in self.sites_of(layer, layer_count).items():
            if position in ("lora_A", "lora_B", "lora_rank") and site.compensation == "none":
                factor *= 1.0 - site.rate
        return factor


def layer_number(name: str) -> int | None:
    """Index of the transformer layer that a module belongs to; None outside the stack."""
    match = _LAYER_NUMBER.search(f".{name}.")
    return int(match.group(1)) if match else None


def count_layers(names: list[str]) -> int:
    """Transformer layers among module names (highest index + 1; at least 1)."""
    return max((number for number in map(layer_number, names) if number is not None), default=0) + 1


def covers(site: Site, layer: str, layer_count: int) -> bool:
    """Whether a site's fraction range [from, to) includes a layer. Modules outside the stack: always."""
    number = layer_number(layer)
    if number is None:
        return True
    start, end = site.layer_range
    return start * layer_count <= number < end * layer_count


def _by_pattern(patterns: dict[str, int] | dict[str, float], layer: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return default
