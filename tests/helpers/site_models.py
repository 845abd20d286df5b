"""Whole models under activation sites, ours and a float64 reference: stock modules, dense attention, explicit masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from helpers.attention_reference import Keyed, dense_attention
from helpers.reference import dense_update, reference_key
from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.members import MaskKey, Member, MemberPlan
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import ATTENTION_POSITIONS, Site
from pipeline.support.sites import tiny_model

DENSE = "dense-float64-reference"
KEY = MaskKey(7, 3)
ATTENTION = {"bert": "attention.self", "roberta": "attention.self", "gpt2": "attn"}
DOWN = {"bert": "output.dense", "roberta": "output.dense", "gpt2": "mlp.c_proj"}


def adapted(
    family: str, *sites: Site, quantization: str = "none", attention: str = "sdpa", device: str | torch.device = "cpu"
) -> tuple[Adapters, nn.Module]:
    """A tiny model with one trained-looking adapter that has `sites`, and its stock float64 twin on the CPU."""
    model = tiny_model(family, quantization, attention, device)
    stock = dequantized(model).cpu()
    spec = AdapterSpec(rank=4, alpha=8.0, sites=sites)
    return with_random_B(attach(model, [spec], "all-linear", seed=0)), stock


def with_random_B(adapters: Adapters) -> Adapters:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for bucket in layer.buckets:
                bucket.lora_B.copy_(torch.randn(bucket.lora_B.shape, generator=random) * 0.1)
    return adapters


def dequantized(model: nn.Module) -> nn.Module:
    """A float64 copy with plain linears in place of 4-bit ones."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if type(module).__name__ == "Linear4bit":
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
            if module.bias is not None:
                linear.bias.data = module.bias.data.clone()
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, linear)
    return plain.double().requires_grad_(False)


def batch(lengths: Sequence[int] = (9, 5), side: str = "left", total: int | None = None) -> dict[str, Tensor]:
    """Random rows, padded; positions count real tokens from 0."""
    size = max(lengths) if total is None else total
    random = torch.Generator().manual_seed(4)
    ids, mask, positions = (torch.zeros(len(lengths), size, dtype=torch.int64) for _ in range(3))
    for row, length in enumerate(lengths):
        where = slice(size - length, size) if side == "left" else slice(length)
        ids[row, where] = torch.randint(3, 60, (length,), generator=random)
        mask[row, where], positions[row, where] = 1, torch.arange(length)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def model_positions(model: nn.Module, positions: Tensor) -> Tensor:
    """RoBERTa counts from the padding index + 1."""
    return positions + model.config.pad_token_id + 1 if model.config.model_type == "roberta" else positions


def plan_for(
    adapters: Adapters,
    members: Sequence[Member],
    rows: dict[str, Tensor],
    examples: Tensor,
    key: MaskKey | Sequence[MaskKey] = KEY,
) -> MemberPlan:
    """The plan of `rows` under every member; `examples` (B,) or (B, T)."""
    size = len(members)
    repeated = examples.repeat(size, *([1] * (examples.dim() - 1)))
    plan = adapters.plan(members, len(rows["input_ids"]), key)
    return with_row_keys(plan, repeated.to(adapters.device), rows["position_ids"].repeat(size, 1).to(adapters.device))


def our_logits(adapters: Adapters, plan: MemberPlan, rows: dict[str, Tensor]) -> Tensor:
    """(M, B, T, V)."""
    inputs = {**rows, "position_ids": model_positions(adapters.model, rows["position_ids"])}
    repeated = {
        k: v if v is None else v.repeat(plan.size, *([1] * (v.dim() - 1))).to(adapters.device)
        for k, v in inputs.items()
    }
    with adapters.axis.active(plan):
        logits: Tensor = adapters.model(**repeated, use_cache=False).logits
    return logits.view(plan.size, plan.rows, *logits.shape[1:])


class Reference:
    """One member of an adapted model in float64: W + ΔW everywhere, dense attention, explicit masks."""

    def __init__(self, stock: nn.Module, adapters: Adapters, family: str) -> None:
        self.stock, self.adapters, self.family = stock, adapters, family
        self.leaves: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in adapters.layers.items():
            bucket = layer.buckets[0]
            self.leaves[name] = tuple(  # type: ignore[assignment]
                p[0].detach().cpu().double().requires_grad_() for p in (bucket.lora_A, bucket.lora_B)
            )
        AttentionInterface.register(DENSE, _dense_interface)
        AttentionMaskInterface.register(DENSE, _whole_mask)
        stock.set_attn_implementation(DENSE)

    def logits(self, member: Member, plan: MemberPlan, rows: dict[str, Tensor], examples: Tensor) -> Tensor:
        """(B, T, V) of one member; gradients flow into `leaves`."""
        hooks = []
        keyed = member.draw is not None and plan.row_keys is not None
        for name, module in self.stock.named_modules():
            if name.endswith(f".{ATTENTION.get(self.family, 'self_attn')}"):
                module.dense_drops = self._attention_drops(name, member, plan, rows, examples) if keyed else {}
            if keyed and self._is_down(name):
                factor = self._hidden_factor(name, member, plan, rows, examples)
                if factor is not None:
                    hooks.append(module.register_forward_pre_hook(lambda _, args, f=factor: (args[0] * f,)))
        weights = {}
        if member.adapter is not None:
            scaling = self.adapters.specs[0].scaling_of("")
            for name, (A, B) in self.leaves.items():
                layer, update = self.stock.get_submodule(name), dense_update(A, B, scaling)
                weights[f"{name}.weight"] = layer.weight + (update.T if type(layer).__name__ == "Conv1D" else update)
        inputs = {**rows, "position_ids": model_positions(self.stock, rows["position_ids"])}
        logits: Tensor = functional_call(self.stock, weights, kwargs={**inputs, "use_cache": False}).logits
        for hook in hooks:
            hook.remove()
        return logits

    def _is_down(self, name: str) -> bool:
        return name.endswith(f".{DOWN.get(self.family, 'mlp.down_proj')}") and "attention.output" not in name

    def _sites(self, name: str, *positions: str) -> list[Site]:
        count = self.stock.config.num_hidden_layers
        number = next(int(part) for part in name.split(".") if part.isdigit())
        return [
            site for site in self.adapters.specs[0].sites
            if site.position in positions and site.layers[0] * count <= number < site.layers[1] * count
        ]

    def _keyed(
        self,
        site: Site,
        name: str,
        row: int,
        member: Member,
        plan: MemberPlan,
        rows: dict[str, Tensor],
        examples: Tensor,
    ) -> Keyed:
        positions = rows["position_ids"][row].tolist()
        of_token = examples[row].tolist() if examples.dim() == 2 else [int(examples[row])] * len(positions)
        (key,) = set(plan.keys)
        return Keyed(
            reference_key(key.seed, key.phase, "activation"),
            reference_key(name, site.position),
            member.draw,
            of_token,
            positions,
            site.rate,
            site.pattern,
            site.span_length,
        )

    def _attention_drops(
        self, name: str, member: Member, plan: MemberPlan, rows: dict[str, Tensor], examples: Tensor
    ) -> dict[str, Any]:
        config = self.stock.config
        heads = config.num_attention_heads
        groups = heads // getattr(config, "num_key_value_heads", heads)
        drops: dict[str, Any] = {}
        for site in self._sites(name, *ATTENTION_POSITIONS):
            per_row = []
            for row in range(len(rows["input_ids"])):
                keyed = self._keyed(site, name, row, member, plan, rows, examples)
                count = heads if site.heads == "query" else heads // groups
                per_row.append(keyed.pairs(count).repeat_interleave(heads // count, 0))
            drops["logits" if site.position == "attention_logits" else "weights"] = torch.stack(per_row)
            if site.position == "attention_weights":
                drops["stop_gradient"] = site.stop_gradient
        return drops

    def _hidden_factor(
        self, name: str, member: Member, plan: MemberPlan, rows: dict[str, Tensor], examples: Tensor
    ) -> Tensor | None:
        for site in self._sites(name, "ffn_hidden"):
            module = self.stock.get_submodule(name)
            features = module.in_features if isinstance(module, nn.Linear) else module.nx
            masks = [
                self._keyed(site, name, row, member, plan, rows, examples).hidden(features)
                for row in range(len(rows["input_ids"]))
            ]
            return (~torch.stack(masks)).double() / (1.0 - site.rate if site.compensation == "inverse" else 1.0)
        return None


def _whole_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _dense_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1.0
    visible = visible.expand(query.shape[0], query.shape[1], -1, -1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return dense_attention(query, key, value, scale, visible, **module.dense_drops).transpose(1, 2), None


def compare_with_reference(
    family: str, *sites: Site, quantization: str = "none", attention: str = "sdpa", tolerance: float = 2e-4,
    device: str | torch.device = "cpu",
) -> float:
    """Logits of four members and the gradients of the adapter, within `tolerance` of the largest entry (gradients: five
    times); returns what the logits are off by at the most."""
    adapters, stock = adapted(family, *sites, quantization=quantization, attention=attention, device=device)
    members, rows, examples = (
        [Member(None), Member(0), Member(0, 0), Member(0, 3)],
        batch(),
        torch.tensor([11, 2**40 + 5]),
    )
    plan = plan_for(adapters, members, rows, examples)
    real = rows["attention_mask"].bool()
    adapters.model.train()
    ours = our_logits(adapters, plan, rows).cpu()[:, real]
    reference = Reference(stock, adapters, family)
    theirs = torch.stack([reference.logits(m, plan, rows, examples)[real] for m in members])
    size = float(theirs.detach().abs().max())
    for m in range(len(members)):
        worst = float((ours[m] - theirs[m]).detach().abs().max()) / size
        assert worst <= tolerance, f"logits of member {m}: {worst:.1e}"
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9))
    (ours * direction).sum().backward()
    (theirs * direction.double()).sum().backward()
    for name, leaves in reference.leaves.items():
        bucket = adapters.layers[name].buckets[0]
        for parameter, leaf in zip((bucket.lora_A, bucket.lora_B), leaves, strict=True):
            assert parameter.grad is not None and leaf.grad is not None
            scale = max(float(leaf.grad.abs().max()), 1e-2)
            off = float((parameter.grad[0].cpu() - leaf.grad).abs().max()) / scale
            assert off <= 5 * tolerance, f"gradient of {name}: {off:.1e}"
    return float((ours - theirs).detach().abs().max()) / size
