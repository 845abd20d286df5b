"""What is trained: the adapter and the method that regularizes it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.config.method import Method, Rate, Site, resolve_preset


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
    """Dropping rate of a preset with one rate; sets rate_A and rate_B of LoRA Dropout."""
    rate_A: Rate | None = None
    """Rate on the columns of A alone (LoRA Dropout); 0 switches this side off."""
    rate_B: Rate | None = None
    """Rate on the rows of B alone (LoRA Dropout); 0 switches this side off."""
    rescale: Literal["inverse", "none"] = "inverse"
    """`inverse`: kept entries × 1/(1-rate) per side. `none`: the paper's literal equations, the same
    model as `inverse` with alpha × (1-rate_A)(1-rate_B)."""
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
        for position, rate in (("lora_A", self.rate_A), ("lora_B", self.rate_B)):
            if rate is not None:
                method = _with_rate(method, position, rate)
        return method


def _with_rate(method: Method, position: str, rate: float) -> Method:
    if not any(site.position == position for site in method.sites):
        raise ValueError(f"adapter.rate_{position[-1]} needs a method with the site {position}, such as lora_dropout")
    sites = tuple(s.model_copy(update={"rate": rate}) if s.position == position else s for s in method.sites)
    return method.model_copy(update={"sites": sites})
