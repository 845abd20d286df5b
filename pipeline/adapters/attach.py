"""Put adapters onto a base model, and make plans for its passes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pipeline.adapters.adalora import SvdBucket
from pipeline.adapters.bucket import Bucket
from pipeline.adapters.heads import TrainedHead
from pipeline.adapters.linear import LoRALinear, RankBucket
from pipeline.adapters.masks import LayerSites, draw_weight_masks
from pipeline.adapters.members import MaskKey, Member, MemberAxis, MemberAxisError, MemberPlan, RowKeys
from pipeline.adapters.sites.anatomy import check_sites, is_causal, padding_reason
from pipeline.adapters.sites.attention import install_attention_sites, install_end_to_end, remove_attention_sites
from pipeline.adapters.sites.deberta import install_position_projections
from pipeline.adapters.sites.ffn import install_ffn_sites, remove_ffn_sites
from pipeline.adapters.spec import AdapterSpec, count_layers
from pipeline.errors import ConfigError
from pipeline.randomness import key64

BUCKETS: dict[str, type[Bucket]] = {"lora": RankBucket, "adalora": SvdBucket}
"""kind of an adapter -> what holds its matrices."""
VACANT = AdapterSpec(layers=frozenset())
"""Adapts nothing."""
EXPERTS = re.compile(r"(^|\.)experts\.")


@dataclass
class Adapters:
    """K adapters on one model: their layers, their specs, and the axis that selects among them."""

    model: nn.Module
    axis: MemberAxis
    layers: dict[str, LoRALinear]
    specs: list[AdapterSpec]
    """By adapter; `VACANT` where a slot is free."""
    sites: dict[str, LayerSites]
    layer_count: int
    """Transformer layers of the model."""
    suffixes: dict[str, int]
    """Last name part -> how many linears of the base, trained heads left out, end in it."""
    heads: dict[str, TrainedHead] = field(default_factory=dict)
    """Modules that each adapter trains whole, by name; none in a causal model."""
    end_to_end: bool = False
    """Whether training passes lay their rows end to end, without padding: see `set_end_to_end`."""

    @property
    def device(self) -> torch.device:
        """Where the adapters live."""
        layer = next(iter(self.layers.values()))
        return (layer.buckets[0].lora_A if layer.buckets else layer.base.weight).device  # type: ignore[union-attr]

    def plan(self, members: Sequence[Member], rows: int, key: MaskKey | Sequence[MaskKey]) -> MemberPlan:
        """A plan with freshly drawn weight masks (a pure function of its arguments).

        A member's masks are those that it has under its key in a pass of its own.

        Args:
            rows: B, per member.
            key: of all members, or one per member.

        Raises:
            MemberAxisError: the number of keys is not that of the members.
        """
        keys = (key,) * len(members) if isinstance(key, MaskKey) else tuple(key)
        if len(keys) != len(members):
            raise MemberAxisError(f"{len(members)} members have {len(keys)} mask keys")
        masks = draw_weight_masks(self.sites, members, keys, self.device)
        return MemberPlan(tuple(members), rows, masks, keys=keys)

    def needs_row_keys(self) -> bool:
        """Whether any adapter has an activation site."""
        return any(not site.masks_weights for spec in self.specs for site in spec.sites if site.rate > 0)

    def set_end_to_end(self, attention: str, longest: int) -> str | None:
        """From now on training passes lay their rows end to end; if the model does not allow it, the reason.

        Arguments as `padding_reason`.
        """
        reason = padding_reason(self.model, attention, longest)
        if reason is None:
            install_end_to_end(self.model, self.axis)
            self.end_to_end = True
        return reason


def with_row_keys(plan: MemberPlan, example: Tensor, position: Tensor) -> MemberPlan:
    """`plan` plus the keys of its rows; every row is a (member, example) pair, member-major, under its member's key.

    Args:
        example: (M·B,) int64 example identities; (M·B, T), one per token, where rows pack several examples.
        position: (M·B, T) int64 token positions within the example.
    """
    draws = torch.tensor([-1 if m.draw is None else m.draw for m in plan.members], dtype=torch.int64)
    branch = draws.repeat_interleave(plan.rows).to(example.device)
    seeds = tuple(key64(key.seed, key.phase, "activation") for key in plan.keys)
    return replace(plan, row_keys=RowKeys(seeds, branch, example, position))


def attach(
    model: nn.Module, specs: Sequence[AdapterSpec], target_modules: str | Sequence[str], seed: int,
    heads: Mapping[str, Collection[str]] | None = None, fused: bool = True,
) -> Adapters:
    """Wrap every targeted linear of `model` that some adapter has, in place; freeze everything but the adapters.

    A fresh adapter is the identity (B = 0). A's start depends on (seed, adapter, layer name) only.

    Args:
        heads: modules that every adapter trains whole, with their parameters that are new: a model's `BaseModel.heads`.
        fused: whether a layer that can be is computed by one function.

    Raises:
        ConfigError: nothing matches `target_modules` or the layers of an adapter, a match is no linear layer or is
            an MoE expert, or the model cannot honour a site.
    """
    specs = [spec.resolved_for(is_causal(model)) for spec in specs]
    check_sites(model, specs)
    targeted = match_targets(model, target_modules, heads or {})
    _refuse_empty_adapters(specs, targeted, target_modules)
    adapters = wrap(model, [name for name in targeted if any(spec.adapts(name) for spec in specs)], heads or {}, seed)
    for layer in adapters.layers.values():
        layer.fused = fused
    for k, spec in enumerate(specs):
        place(adapters, k, spec, targeted, seed, k)
    return adapters


def wrap(model: nn.Module, names: Sequence[str], heads: Mapping[str, Collection[str]], seed: int = 0) -> Adapters:
    """Wrap linears, and modules that are trained whole, for adapters to come; freeze everything.

    Args:
        seed: of the untrained head that the base alone has.
    """
    axis = MemberAxis()
    model.requires_grad_(False)
    layer_count = count_layers([name for name, _ in model.named_modules()])
    suffixes = Counter(
        name.rpartition(".")[2]
        for name, module in model.named_modules() if is_linear(module) and not _is_within(name, heads)
    )
    layers: dict[str, LoRALinear] = {}
    for name in names:
        layers[name] = LoRALinear(model.get_submodule(name), name, axis)
        _put_in_place(model, name, layers[name])
    install_position_projections(model, axis)
    trained: dict[str, TrainedHead] = {}
    for name, fresh in heads.items():
        deviation = getattr(model.config, "initializer_range", 0.02)
        trained[name] = TrainedHead(model.get_submodule(name), name, axis, fresh, deviation, seed)
        _put_in_place(model, name, trained[name])
    sites = {name: LayerSites({}, {}) for name in layers}
    return Adapters(model, axis, layers, [], sites, layer_count, dict(suffixes), trained)


def place(
    adapters: Adapters, adapter: int, spec: AdapterSpec, targeted: Collection[str], seed: int, origin: int
) -> None:
    """Put a fresh adapter onto a wrapped model, under an index that is free.

    Args:
        spec: resolved for the model.
        targeted: layers that it adapts, as far as the spec does not leave them out.
        seed, origin: its start is a function of these and the layer names.
    """
    adapters.specs += [VACANT] * (adapter + 1 - len(adapters.specs))
    adapters.specs[adapter] = spec
    for name in targeted:
        if spec.adapts(name):
            _place_in_layer(adapters, adapter, spec, name, key64(seed, "init", origin, name))
    install_attention_sites(adapters.model, adapters.axis, adapter, spec, adapters.layer_count)
    install_ffn_sites(adapters.model, adapters.axis, adapter, spec, adapters.layer_count)
    for head in adapters.heads.values():
        head.take(adapter, seed, origin)


def remove(adapters: Adapters, adapter: int) -> None:
    """Take an adapter away; its index is free."""
    adapters.specs[adapter] = VACANT
    for name, layer in adapters.layers.items():
        layer.leave(adapter)
        adapters.sites[name].forget(adapter)
    remove_attention_sites(adapters.model, adapter)
    remove_ffn_sites(adapters.model, adapter)


def match_targets(model: nn.Module, target_modules: str | Sequence[str], heads: Collection[str] = ()) -> list[str]:
    """Names of the linears to wrap: `all-linear` (without the output head), suffixes, or one regular expression.

    What lies in `heads`, the modules that are trained whole, is passed over (as PEFT does).
    """
    named = {name: module for name, module in base_modules(model).items() if not _is_within(name, heads)}
    linears = {name: module for name, module in named.items() if is_linear(module)}
    if target_modules == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        matched = [name for name, module in linears.items() if module is not head and not EXPERTS.search(name)]
    else:
        matched = [name for name in named if name and _matches(name, target_modules)]
        _refuse_bad_matches(matched, linears, target_modules)
    if not matched:
        leaves = sorted({name.rpartition(".")[2] for name in linears})
        raise ConfigError(
            "adapter.target_modules", target_modules, "matches no linear layer of this model",
            f"Linear layers end in: {', '.join(leaves)}.",
        )
    return matched


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base by their names in it, also where adapters have been put around some."""
    found: dict[str, nn.Module] = {}
    around = "/"
    for name, module in model.named_modules():
        if not name.startswith(around):
            found[name] = module.base if isinstance(module, LoRALinear) else module
            around = f"{name}." if isinstance(module, LoRALinear) else "/"
    return found


def is_linear(module: nn.Module) -> bool:
    """Plain and bitsandbytes linears, and GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_shape(base: nn.Module) -> tuple[int, int]:
    """(I, O) from the layer's configuration: shapes of quantized or partitioned weights say nothing."""
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    return base.nx, base.nf  # type: ignore[return-value]


def _place_in_layer(adapters: Adapters, adapter: int, spec: AdapterSpec, name: str, key: int) -> None:
    layer, rank = adapters.layers[name], spec.rank_of(name)
    inputs, outputs = linear_shape(layer.base)
    bucket_type = BUCKETS[spec.kind]
    bucket = next((b for b in layer.buckets if type(b) is bucket_type and b.rank == rank), None)
    if bucket is None:
        bucket = bucket_type(rank, inputs, outputs).to(layer.base.weight.device)  # type: ignore[arg-type]
        layer.buckets.append(bucket)
    bucket.take(adapter, spec.scaling_of(name), torch.Generator().manual_seed(key >> 1))  # type: ignore[operator]  # 63 bits
    factor = spec.mean_field_factor(name, adapters.layer_count)
    if factor != 1.0:
        layer.mean_factors[adapter] = factor
    sites = spec.sites_of(name, adapters.layer_count)
    for position, of_adapter in (("lora_input", layer.input_sites), ("lora_rank", layer.rank_sites)):
        if position in sites and not sites[position].masks_weights:
            of_adapter[adapter] = (sites[position], key64(name, position))
    masked = {position: site for position, site in sites.items() if site.masks_weights}
    adapters.sites[name].note(adapter, {"lora_A": inputs, "lora_B": outputs, "lora_rank": rank}, masked)


def _matches(name: str, target_modules: str | Sequence[str]) -> bool:
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in target_modules)


def _refuse_bad_matches(matched: list[str], linears: dict[str, nn.Module], target_modules: object) -> None:
    for name in matched:
        if EXPERTS.search(name):
            raise ConfigError(
                "adapter.target_modules", target_modules, f"matches {name}, an expert of a mixture-of-experts layer",
                "Experts see flattened tokens, which the member axis cannot serve: target the attention layers.",
            )
        if name not in linears:
            raise ConfigError(
                "adapter.target_modules", target_modules, f"matches {name}, which is not a linear layer",
                "Name linear layers only, or use all-linear.",
            )


def _refuse_empty_adapters(specs: Sequence[AdapterSpec], targeted: Sequence[str], target_modules: object) -> None:
    for k, spec in enumerate(specs):
        if not any(spec.adapts(name) for name in targeted):
            raise ConfigError(
                "adapter.target_modules", target_modules, f"has no layer in common with adapter {k}",
                f"Adapter {k} adapts {', '.join(sorted(spec.layers or ())[:3])}, …: use its own base model.",
            )


def _is_within(name: str, heads: Collection[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def _put_in_place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
