"""What is trained: the adapter and the method that regularizes it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.config.method import ONE_RATE_PRESETS, Method, Rate, Site, resolve_preset

UNSET_RATES: dict[str, Any] = {"adapter.rate": None, "adapter.rates": {}, "adapter.consistency": {}}
"""Dotted keys of a configuration whose method keeps its own rates (and its own consistency term)."""


class RatesConfig(Section):
    """Rates of single sites of the method in force, by position; None leaves the method's own, 0 switches it off."""

    lora_A: Rate | None = None
    """Columns of A (LoRA Dropout)."""
    lora_B: Rate | None = None
    """Rows of B (LoRA Dropout)."""
    lora_rank: Rate | None = None
    """Ranks (DropLoRA)."""
    lora_input: Rate | None = None
    """Inputs of the adapter (stock LoRA's dropout)."""
    attention_logits: Rate | None = None
    """Keys (DropKey, HiddenKey)."""
    attention_weights: Rate | None = None
    """Attention weights (DropAttention)."""
    ffn_hidden: Rate | None = None
    """Hidden vectors of the feed-forward network (HiddenCut, HiddenKey)."""

    def given(self) -> dict[str, float]:
        """position -> rate, where one is set."""
        return {position: rate for position, rate in self if rate is not None}


class ConsistencyConfig(Section):
    """Changes the consistency term of the method, without writing the method out. What is None stays as it is."""

    kind: Literal["none", "kl", "js"] | None = None
    """Divergence between the branches: bidirectional KL, Jensen-Shannon, or no term."""
    weight: Annotated[float, Field(ge=0.0)] | None = None
    """Multiplier of the term; 0 = only measured."""
    branches: Literal["one", "both"] | None = None
    """Branches that carry gradient."""

    def applied_to(self, method: Method) -> Method:
        """`method` with the values given here. Raises `ValueError` where they would say nothing."""
        given = self.model_dump(exclude_none=True)
        term = method.consistency.model_copy(update=given)
        if term.kind == "none" and set(given) - {"kind"}:
            raise ValueError(
                f"adapter.consistency.{min(set(given) - {'kind'})} says nothing about a method without a consistency"
                " term: set adapter.consistency.kind to kl or js, or take a method that has one, such as hiddenkey"
            )
        return method.model_copy(update={"consistency": term})


class AdapterConfig(Section):
    """LoRA matrices, where they sit, and what is dropped while they are trained."""

    rank: Annotated[int, Field(ge=1)] = 8
    """R of lora_A (R, I) and lora_B (O, R)."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """scaling = alpha / rank (alpha / sqrt(rank) with `rslora`)."""
    rslora: bool = False
    """Rank-stabilized scaling (arXiv 2312.03732)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """`all-linear` (without the head), a list of name suffixes, or one regular expression."""
    rank_pattern: dict[str, int] = {}
    """Module name pattern (PEFT's rules) -> rank, where it differs."""
    alpha_pattern: dict[str, float] = {}
    """Module name pattern (PEFT's rules) -> alpha, where it differs."""
    method: str | tuple[Site, ...] | Method = "lora_dropout"
    """A preset, a sum of presets, a list of sites, or sites with a consistency term."""
    rate: Rate | None = None
    """Dropping rate of a preset with one rate (both sides of LoRA Dropout)."""
    rates: RatesConfig = RatesConfig()
    """Rates of single sites of whatever method, on top of its own."""
    rescale: Literal["inverse", "none"] = "inverse"
    """`inverse`: kept entries × 1/(1-rate) per side. `none`: the paper's literal equations, the same
    model as `inverse` with alpha × (1-rate_A)(1-rate_B)."""
    consistency: ConsistencyConfig = ConsistencyConfig()
    """Changes the method's consistency term: its kind, weight, branches with gradient."""
    init_from: str | None = None
    """Folder of a PEFT LoRA checkpoint to start from (its rank and alpha must agree)."""

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: object) -> object:
        if isinstance(values, dict):
            values = {k: tuple(v) if k in ("target_modules", "method") and isinstance(v, list) else v
                      for k, v in values.items()}
        return values

    @model_validator(mode="after")
    def _check_method(self) -> AdapterConfig:
        self.resolved_method()
        return self

    def resolved_method(self) -> Method:
        """The sites and the consistency term in force, presets and rates resolved."""
        if isinstance(self.method, Method | tuple):
            if self.rate is not None:
                raise ValueError("adapter.rate goes with a preset; set the rate of each site in the list instead")
            method = self.method if isinstance(self.method, Method) else Method(sites=self.method)
        else:
            method = resolve_preset(self.method, self.rate, self.rescale)
        for position, rate in self.rates.given().items():
            method = _with_rate(method, position, rate)
        return self.consistency.applied_to(method)

    def takes_one_rate(self) -> bool:
        """Whether `rate` fits the method: a preset whose strength is one number."""
        return isinstance(self.method, str) and self.method in ONE_RATE_PRESETS


def _with_rate(method: Method, position: str, rate: float) -> Method:
    positions = {site.position for site in method.sites}
    if position not in positions:
        has = f"has {', '.join(sorted(positions))}" if positions else "has none"
        raise ValueError(f"adapter.rates.{position} needs a method with a site at {position}; the one in force {has}")
    sites = tuple(s.model_copy(update={"rate": rate}) if s.position == position else s for s in method.sites)
    return method.model_copy(update={"sites": sites})
