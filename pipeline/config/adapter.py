"""What is trained: the adapter and the method that regularizes it."""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.method import ONE_RATE_PRESETS, Method, Rate, Site, resolve_preset
from pipeline.config.section import Name, Positive, Section

UNSET_RATES: dict[str, Any] = {"adapter.rate": None, "adapter.rates": {}, "adapter.consistency": {}}
"""Dotted keys of a configuration whose method keeps its own rates (and its own consistency term)."""


class RatesConfig(Section):
    """Rates of single sites of the method in force, by position; None leaves the method's own, 0 switches it off."""

    lora_A: Rate | None = None
    """Columns of A (LoRA Dropout)."""
    lora_B: Rate | None = None
    """Rows of B (LoRA Dropout)."""
    lora_rank: Rate | None = None
    """Ranks (DropLoRA, rank dropout)."""
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


SERVED_RANKS = (8, 16, 32, 64, 128, 256)
"""LoRA ranks vLLM has kernels for; other ranks are padded to the next of them."""


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


def _check_span(span: int | float) -> int | float:
    if span < 0 or (isinstance(span, float) and span >= 1.0):
        raise ValueError("must be a whole number of steps, or a fraction of train.max_steps below 1")
    return span


Span = Annotated[int | float, AfterValidator(_check_span)]
"""Optimizer steps (a whole number), or a fraction of train.max_steps (rounded down)."""

Decay = Annotated[float, Field(gt=0.0, lt=1.0)]


class AdaLoRAConfig(Section):
    """The rank budget of `adapter.kind: adalora`. Its end, the average rank that is kept, is `adapter.rank`."""

    initial_rank: Positive | None = None
    """R of every matrix at the start; None = 1.5 × adapter.rank, rounded up (the paper's section 3.3)."""
    warmup: Span = 0.1
    """Steps before the first pruning: a whole number, or a fraction of train.max_steps (the released GLUE scripts:
    a tenth to a sixth)."""
    final: Span = 0.4
    """Steps at the end with the final ranks: a whole number, or a fraction of train.max_steps (the released GLUE
    scripts: nearly half)."""
    interval: Positive = 1
    """Steps between two prunings (the released scripts: 1 to 100, the more the longer the run)."""
    beta1: Decay = 0.85
    """Decay of the averaged sensitivity |w · gradient| (the paper's value)."""
    beta2: Decay = 0.85
    """Decay of its averaged uncertainty (the paper's value)."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the regularizer that keeps P and Q orthogonal (the released scripts: 0.1, RTE 0.3; PEFT: 0.5)."""

    def initial_rank_for(self, target_rank: int) -> int:
        """R at the start."""
        return -(-3 * target_rank // 2) if self.initial_rank is None else self.initial_rank

    def steps(self, max_steps: int) -> tuple[int, int]:
        """(warm-up, final) in optimizer steps.

        Raises:
            ValueError: they leave no step in which ranks are pruned by what was observed before.
        """
        warmup, final = _steps(self.warmup, max_steps), _steps(self.final, max_steps)
        if max_steps - final <= max(warmup, 1):
            raise ValueError(
                f"adapter.adalora.warmup and adapter.adalora.final take {warmup} + {final} of train.max_steps ="
                f" {max_steps}, which leaves no step to prune in; lower them (fractions such as 0.1 and 0.4 fit every"
                " length of 2 steps or more) or raise train.max_steps"
            )
        return warmup, final


def _steps(span: int | float, max_steps: int) -> int:
    return span if isinstance(span, int) else int(span * max_steps + 1e-9)


KIND_NAMES = {"lora": "LoRA", "adalora": "AdaLoRA"}
"""adapter.kind -> what people call it."""


def _check_expression(text: str) -> str:
    """As it is, where it is a regular expression of some text."""
    try:
        with warnings.catch_warnings(action="ignore"):  # what a later Python will read otherwise is legal today
            re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression; this is none ({error})") from error
    return text


def _check_targets(targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if not targets or "" in targets and not isinstance(targets, str):
        raise ValueError("must name the modules to adapt: all-linear, a list of name suffixes, or a regular expression")
    return _check_expression(targets) if isinstance(targets, str) else targets


Targets = Annotated[str | tuple[str, ...], AfterValidator(_check_targets)]

ModulePattern = Annotated[Name, AfterValidator(_check_expression)]


class AdapterConfig(Section):
    """LoRA matrices, where they sit, and what is dropped while they are trained."""

    kind: Literal["lora", "adalora"] = "lora"
    """`lora`: ΔW = s·B A. `adalora`: ΔW = s·P Λ Q, whose ranks are pruned by importance while it is trained."""
    rank: Positive = 8
    """R of lora_A (R, I) and lora_B (O, R); of AdaLoRA, the average rank that is kept in the end."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """scaling = alpha / rank (alpha / sqrt(rank) with `rslora`; alpha / adalora.initial_rank of AdaLoRA)."""
    rslora: bool = False
    """Rank-stabilized scaling (arXiv 2312.03732)."""
    target_modules: Targets = "all-linear"
    """`all-linear` (without the head), a list of name suffixes, or one regular expression."""
    rank_pattern: dict[ModulePattern, Positive] = {}
    """Module name pattern (PEFT's rules) -> rank, where it differs."""
    alpha_pattern: dict[ModulePattern, Annotated[float, Field(gt=0.0)]] = {}
    """Module name pattern (PEFT's rules) -> alpha, where it differs."""
    method: str | tuple[Site, ...] | Method = "lora_dropout"
    """A preset, a sum of presets, a list of sites, or sites with a consistency term."""
    rate: Rate | None = None
    """Dropping rate of a preset with one rate (both sides of LoRA Dropout); null = the preset's own, of LoRA Dropout
    0.5."""
    rates: RatesConfig = RatesConfig()
    """Rates of single sites of whatever method, on top of its own."""
    rescale: Literal["inverse", "none"] = "inverse"
    """Of a preset's masks on the LoRA matrices. `inverse`: kept entries × 1/(1-rate) per side. `none`: the paper's
    literal equations, the same model as `inverse` with alpha × (1-rate_A)(1-rate_B). Other sites of a sum keep their
    own compensation; methods without such masks, and lists of sites (which state theirs), refuse `none`."""
    consistency: ConsistencyConfig = ConsistencyConfig()
    """Changes the method's consistency term: its kind, weight, branches with gradient."""
    init_from: Name | None = None
    """Folder of a PEFT LoRA checkpoint to start from (its rank and alpha must agree)."""
    adalora: AdaLoRAConfig = AdaLoRAConfig()
    """The rank budget of `kind: adalora`."""
    fused: bool = True
    """Compute an adapted linear - base product, low-rank products, masks - as one function, where it can be. False:
    by autograd's own operations, to compare with. What is trained is the same up to rounding."""

    @model_validator(mode="after")
    def _check_method(self) -> AdapterConfig:
        method = self.resolved_method()
        if self.kind == "adalora":
            self._check_adalora(method)
        elif self.adalora != AdaLoRAConfig():
            raise ValueError("adapter.adalora has no effect on adapter.kind = lora; set adapter.kind = adalora")
        return self

    def _check_adalora(self, method: Method) -> None:
        """Refuse what AdaLoRA has no meaning for, or what PEFT's format of it cannot express."""
        if any(site.position == "lora_rank" and site.rate > 0 for site in method.sites):
            raise ValueError(
                "the site lora_rank goes with adapter.kind = lora: AdaLoRA prunes ranks itself, and LoRA Dropout never"
                " drops them (arXiv 2404.09610); use lora_A and lora_B"
            )
        for key, remedy in (
            ("init_from", "start from a fresh adapter"),
            ("rslora", "set adapter.alpha; the scaling is alpha / adapter.adalora.initial_rank"),
            ("rank_pattern", "ranks follow from importance: set adapter.rank, their average"),
            ("alpha_pattern", "set adapter.alpha; PEFT's AdaLoRA has one alpha"),
        ):
            if getattr(self, key):
                raise ValueError(f"adapter.{key} is not available for adapter.kind = adalora; {remedy}")
        if self.adalora.initial_rank_for(self.rank) < self.rank:
            raise ValueError(
                f"adapter.adalora.initial_rank = {self.adalora.initial_rank} is below adapter.rank = {self.rank}, the"
                " rank in the end; raise it, or leave it out for 1.5 × adapter.rank"
            )

    def resolved_method(self) -> Method:
        """The sites and the consistency term in force, presets and rates resolved."""
        if isinstance(self.method, Method | tuple):
            if self.rate is not None:
                raise ValueError("adapter.rate goes with a preset; set the rate of each site in the list instead")
            if self.rescale != "inverse":
                raise ValueError(
                    f"adapter.rescale = {self.rescale!r} goes with a preset; set the compensation of each site in the"
                    " list instead"
                )
            method = self.method if isinstance(self.method, Method) else Method.model_validate({"sites": self.method})
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
