"""One grammar for every dropout of arXiv 2404.09610 and arXiv 2403.00812.

A *method* is a list of *sites* plus an optional consistency term. A site is
position × pattern × rate × compensation × layers. Presets are named lists in this grammar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.extensions import MASK_PATTERNS, listed, load, offered
from pipeline.config.section import Positive, Section

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Probability of *dropping* an entry, in [0, 1)."""

Position = Literal[
    "lora_A", "lora_B", "lora_rank", "lora_input", "attention_logits", "attention_weights", "ffn_hidden"
]
Pattern = Literal["element", "column", "span"] | str
Compensation = Literal["inverse", "none", "normalized"]

WEIGHT_POSITIONS = ("lora_A", "lora_B", "lora_rank")
"""The adapter's own matrices. Pattern `column`, and those of installed packages, mask weights: one vector per member,
for all tokens of its rows."""
ATTENTION_POSITIONS = ("attention_logits", "attention_weights")
"""Masks inside the base model's attention."""

LEGAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora_A": (("column",), ("inverse", "none")),
    "lora_B": (("column",), ("inverse", "none")),
    "lora_rank": (("column", "element"), ("inverse", "none")),
    "lora_input": (("element",), ("inverse",)),
    "attention_logits": (("column", "element", "span"), ("none",)),
    "attention_weights": (("column", "element", "span"), ("normalized",)),
    "ffn_hidden": (("element", "column", "span"), ("inverse", "none")),
}
"""position -> (legal patterns, legal compensations); the first of each is the default."""


def patterns_at(position: str) -> tuple[str, ...]:
    """The legal patterns, with what installed packages add at the adapter's own matrices."""
    own = LEGAL[position][0]
    return (*own, *(n for n in offered(MASK_PATTERNS) if n not in own)) if position in WEIGHT_POSITIONS else own


class Site(Section):
    """One place where entries are dropped."""

    position: Position
    """What is masked."""
    rate: Rate
    """Probability of dropping, in [0, 1)."""
    pattern: Pattern = "column"
    """Structure of the mask; defaults to the position's first legal one. At `lora_rank`, `column` drops ranks for a
    whole draw, and `element` drops entries of A x, for every token anew (DropLoRA). At `lora_A`, `lora_B` and
    `lora_rank` also the name of a pattern that an installed package adds (docs/python.md)."""
    compensation: Compensation = "inverse"
    """`inverse`: kept entries × 1/(1-rate); `none`: the literal equations of arXiv 2404.09610. A read-out without
    masks multiplies the weight sites by (1-rate) where they have `none`; `ffn_hidden` never: it is not masked at
    inference (arXiv 2403.00812), and a factor there would change the base model, which no adapter can carry."""
    layers: tuple[float, float] | Literal["auto"] = (0.0, 1.0)
    """Fraction range [from, to) of the decoder or encoder layers, 0 = first, 1 = past the last. `auto` (what the
    presets hiddenkey and hiddenkey_minus have): all layers of an encoder, the latter half of a causal decoder's
    (arXiv 2403.00812); resolved when the adapter is attached, and stored with it as a range."""
    heads: Literal["query", "kv"] = "query"
    """Attention sites: masks of their own per query head, or shared by the query heads of a key-value head (which
    saves the copy of keys and values per query head under grouped-query attention)."""
    span_length: Positive = 4
    """Pattern `span`: consecutive tokens dropped together (keys of a query, or hidden vectors of a row). The paper
    names spans and gives neither length nor how they are drawn: blocks of this length at a random offset, each
    dropped with probability `rate`, are our choice."""
    stop_gradient: bool = True
    """`attention_weights`: no gradient through the normalizer Σ_j m_j w_j, as the paper has DropAttention. Without it
    DropAttention is DropKey, and keeps the fast kernels."""

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: object) -> object:
        if isinstance(values, dict) and values.get("position") in LEGAL:
            patterns, compensations = LEGAL[values["position"]]
            values = {"pattern": patterns[0], "compensation": compensations[0], **values}
        return values

    @model_validator(mode="after")
    def _check_legal(self) -> Site:
        patterns, compensations = LEGAL[self.position]
        if self.pattern not in patterns_at(self.position):
            added = f"; {listed(MASK_PATTERNS)}" if self.position in WEIGHT_POSITIONS else ""
            raise ValueError(f"{self.position} has the patterns {', '.join(patterns)}, not {self.pattern}{added}")
        if self.pattern not in patterns:
            load(MASK_PATTERNS, self.pattern)  # what cannot be imported is said before a model is loaded
        if self.compensation not in compensations:
            raise ValueError(
                f"{self.position} has the compensations {', '.join(compensations)}, not {self.compensation}"
            )
        start, end = self.layer_range
        if not 0.0 <= start < end <= 1.0:
            raise ValueError(f"layers must satisfy 0 <= from < to <= 1, got {[start, end]}")
        self._refuse_idle_options()
        return self

    def _refuse_idle_options(self) -> None:
        fields = type(self).model_fields
        idle = {
            "heads": self.position not in ATTENTION_POSITIONS,
            "span_length": self.pattern != "span",
            "stop_gradient": self.position != "attention_weights",
        }
        for name, is_idle in idle.items():
            if is_idle and getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name} says nothing about {self.position} with the pattern {self.pattern}: leave it out"
                )

    @property
    def masks_weights(self) -> bool:
        """Whether a draw of it is a plain LoRA: one mask on the matrices for all tokens."""
        return self.position in WEIGHT_POSITIONS and self.pattern != "element"

    @property
    def layer_range(self) -> tuple[float, float]:
        """[from, to); the whole stack where it is `auto` and not yet resolved."""
        return (0.0, 1.0) if self.layers == "auto" else self.layers


class Consistency(Section):
    """A loss term that pulls the distributions of an example's branches together (arXiv 2403.00812, section 3.4).

    Every example is read under a pair of mask draws: the S draws of a step are S/2 pairs. `pipeline.loss.consistency`
    has the equation.
    """

    kind: Literal["none", "kl", "js"] = "none"
    """`kl`: ½ [KL(P1‖P2) + KL(P2‖P1)] between the two draws. `js`: the generalized Jensen-Shannon divergence of both
    draws and the mask-free forward, 1/3 Σ KL(P‖mean)."""
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Multiplier of the term in nats per supervised token; 0 = only measured. The paper searches 0.01 to 10."""
    branches: Literal["one", "both"] = "one"
    """Branches that carry gradient. `one`, the paper's form: the others are a forward without backward. `both`: the
    pair is two members of one pass; twice the rows through the backward pass, and for `kl` twice the expected gradient
    of the term at the same weight."""


class Method(Section):
    """Sites plus consistency."""

    sites: tuple[Site, ...] = ()
    consistency: Consistency = Consistency()

    @model_validator(mode="after")
    def _check_overlap(self) -> Method:
        for i, site in enumerate(self.sites):
            for other in self.sites[:i]:
                (start, end), (from_, to) = site.layer_range, other.layer_range
                if site.position == other.position and start < to and from_ < end:
                    raise ValueError(
                        f"{site.position} has two sites on the same layers: keep one, or divide the layers"
                    )
        return self

    def rate_of(self, position: str) -> float:
        """The dropping rate at `position`, 0.0 where the method has no such site."""
        return next((site.rate for site in self.sites if site.position == position), 0.0)


def _sites(pattern: str, *positions: str) -> Callable[[float, str], tuple[Site, ...]]:
    """Builder (rate, rescale) -> sites; only those on the LoRA matrices have a choice of rescale."""

    def build(rate: float, rescale: str) -> tuple[Site, ...]:
        fields = [{"position": p, "pattern": pattern, "rate": rate} for p in positions]
        return tuple(
            Site.model_validate({**f, "compensation": rescale} if f["position"] in WEIGHT_POSITIONS else f)
            for f in fields
        )

    return build


ONE_RATE_PRESETS: dict[str, tuple[float, Callable[..., tuple[Site, ...]]]] = {
    "input_dropout": (0.1, _sites("element", "lora_input")),
    "lora_dropout": (0.5, _sites("column", "lora_A", "lora_B")),
    "droplora": (0.5, _sites("element", "lora_rank")),
    "rank_dropout": (0.5, _sites("column", "lora_rank")),
    "dropkey": (0.1, _sites("column", "attention_logits")),
    "dropattention": (0.1, _sites("column", "attention_weights")),
    "hiddencut": (0.1, _sites("element", "ffn_hidden")),
}
"""name -> (default rate, builder): the presets whose strength is one number."""

_HIDDENKEY_SITES = (
    Site.model_validate({"position": "attention_logits", "pattern": "column", "rate": 0.1, "layers": "auto"}),
    Site.model_validate({"position": "ffn_hidden", "pattern": "element", "rate": 0.1, "layers": "auto"}),
)
FIXED_PRESETS: dict[str, Method] = {
    "none": Method(),
    "hiddenkey_minus": Method(sites=_HIDDENKEY_SITES),
    "hiddenkey": Method(sites=_HIDDENKEY_SITES, consistency=Consistency(kind="kl")),
}
"""The presets with no single rate."""

PRESETS = (*FIXED_PRESETS, *ONE_RATE_PRESETS)


def resolve_preset(name: str, rate: float | None, rescale: str) -> Method:
    """The method a preset name (or a sum such as `lora_dropout+hiddenkey`) stands for.

    Raises:
        ValueError: unknown name, `rate` given where the sum has several independent rates, or rescale `none` where no
            LoRA matrix is masked.
    """
    sites: list[Site] = []
    consistency = Consistency()
    for part in name.split("+"):
        if part in ONE_RATE_PRESETS:
            default_rate, build = ONE_RATE_PRESETS[part]
            sites.extend(build(default_rate if rate is None or "+" in name else rate, rescale))
        elif part in FIXED_PRESETS:
            sites.extend(FIXED_PRESETS[part].sites)
            if FIXED_PRESETS[part].consistency.kind != "none":
                consistency = FIXED_PRESETS[part].consistency
        else:
            raise ValueError(f"unknown method {part!r}; the presets are {', '.join(PRESETS)}")
    if rate is not None and name not in ONE_RATE_PRESETS:
        named = ", ".join(f"{s.position} ({s.rate})" for s in sites) or "no site"
        raise ValueError(
            f"adapter.rate does not fit the method {name!r}, which has {named}; set adapter.rates.POSITION instead"
        )
    if sites and not takes_rescale(name) and rescale != "inverse":
        named = ", ".join(dict.fromkeys(s.position for s in sites))
        raise ValueError(
            f"adapter.rescale = {rescale!r} is about masks on the LoRA matrices; the method {name!r} has {named}. Set"
            " adapter.rescale=inverse, or write the sites out as a list, each with its compensation"
        )
    return Method.model_validate({"sites": tuple(sites), "consistency": consistency})  # raises what a validator may


def takes_rescale(method: object) -> bool:
    """Whether `adapter.rescale` fits: a preset, or a sum of them, with masks on the LoRA matrices."""
    return isinstance(method, str) and not {"lora_dropout", "droplora", "rank_dropout"}.isdisjoint(method.split("+"))
