"""What one adapter is, in plain values: the layers know nothing of configuration files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline.config.adapter import AdaLoRAConfig, AdapterConfig
from pipeline.config.method import WEIGHT_POSITIONS, Consistency, Method, Site

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
    def from_config(cls, config: AdapterConfig, max_steps: int) -> AdapterSpec:
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
            if position in WEIGHT_POSITIONS and site.compensation == "none":
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


@dataclass(frozen=True)
class RankSchedule:
    """b(t) triplets for an adapter of L layers, t = optimizer steps done (1 after the first).

    t <= warmup: L · initial_rank.  t >= total - final: L · target_rank.  In between, with
    u = (t - warmup) / (total - final - warmup), the whole part of L·target + L·(initial - target)·(1 - u)³.

    PEFT leaves the count of t to its caller; here the last step is t = total, so that `final` may be 0.
    """

    initial_rank: int
    target_rank: int
    warmup: int
    """Steps without pruning at the start (PEFT: tinit)."""
    final: int
    """Steps with settled ranks at the end (PEFT: tfinal)."""
    total: int
    """Steps in all (PEFT: total_step)."""
    interval: int = 1
    """Steps between prunings (PEFT: deltaT)."""
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.1
    """Weight of the orthogonality term (PEFT: orth_reg_weight)."""

    @classmethod
    def from_config(cls, config: AdaLoRAConfig, target_rank: int, max_steps: int) -> RankSchedule:
        """The schedule of a run. Raises `ValueError` where its phases do not fit into `max_steps`."""
        warmup, final = config.steps(max_steps)
        return cls(
            config.initial_rank_for(target_rank), target_rank, warmup, final, max_steps,
            config.interval, config.beta1, config.beta2, config.orthogonality,
        )

    @property
    def settled(self) -> int:
        """The step at which the final ranks are chosen."""
        return self.total - self.final

    def budget(self, step: int, layers: int) -> int:
        """b(t): triplets kept over all layers."""
        initial, target = self.initial_rank * layers, self.target_rank * layers
        if step <= self.warmup:
            return initial
        if step >= self.settled:
            return target
        left = 1 - (step - self.warmup) / (self.settled - self.warmup)
        return int((initial - target) * left**3 + target)

    def prunes(self, step: int) -> bool:
        """Whether ranks are chosen anew after this step."""
        return step == self.settled or (self.warmup < step < self.settled and step % self.interval == 0)
