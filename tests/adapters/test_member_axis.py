"""The member axis against a dense float64 reference: forward and gradients, for any mix of members."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama, stock_double
from helpers.reference import dense_linear, dense_model, dense_update
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.members import MaskKey, Member, MemberAxisError, MemberPlan
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.errors import ConfigError
from pipeline.support.tiny import tiny_gpt2, tiny_llama

NAME = "layers.0.linear"
WEIGHT_AXES = ("lora_A", "lora_B", "lora_rank")


@dataclass(frozen=True)
class Case:
    """One layer, its adapters, the members of one pass."""

    inputs: int
    outputs: int
    kind: str
    specs: tuple[AdapterSpec, ...]
    members: tuple[Member, ...]
    rows: int
    tokens: int | None
    """T, or None for an input without a token axis."""
    seed: int


SQUARE = Case(  # I = O = R = B = T = M
    4, 4, "plain", (AdapterSpec(rank=4, sites=LORA_DROPOUT),) * 2, tuple(Member(k % 2, k) for k in range(4)), 4, 4, 0
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    ranks = st.sampled_from([inputs, outputs, 1, 2, 3, 5])  # R = I and R = O: a wrong broadcast would pass
    rate = st.sampled_from([0.0, 0.2, 0.5, 0.9])
    specs = []
    for _ in range(draw(st.integers(1, 3))):
        rescale = draw(st.sampled_from(["inverse", "none"]))
        sites = tuple(
            Site(position=axis, rate=draw(rate), compensation=rescale) for axis in WEIGHT_AXES if draw(st.booleans())
        )
        specs.append(AdapterSpec(
            rank=draw(ranks), alpha=draw(st.sampled_from([1.0, 4.0, 7.5])), rslora=draw(st.booleans()), sites=sites,
            layers=draw(st.sampled_from([None, frozenset({NAME})])),
        ))
    adapter = st.one_of(st.none(), st.integers(0, len(specs) - 1))
    members = st.builds(Member, adapter, st.one_of(st.none(), st.integers(0, 3)))
    return Case(
        inputs, outputs, draw(st.sampled_from(["plain", "no bias", "conv1d"])), tuple(specs),
        tuple(draw(st.lists(members, min_size=1, max_size=5))), draw(st.integers(1, 3)),
        draw(st.one_of(st.none(), st.integers(1, 4))), draw(st.integers(0, 2**31)),
    )


class Host(nn.Module):
    """A model of one linear (and one that nothing adapts)."""

    def __init__(self, inputs: int, outputs: int, kind: str = "plain") -> None:
        super().__init__()
        linear = Conv1D(outputs, inputs) if kind == "conv1d" else nn.Linear(inputs, outputs, bias=kind == "plain")
        self.layers = nn.ModuleList([nn.ModuleDict({"linear": linear})])
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0]["linear"](x)


def attached(case: Case) -> tuple[Adapters, Tensor, Tensor | None]:
    """Adapters with random A and B on the case's layer; W (O, I) and its bias."""
    torch.manual_seed(case.seed)
    host = Host(case.inputs, case.outputs, case.kind)
    base = host.layers[0]["linear"]
    weight = (base.weight.T if case.kind == "conv1d" else base.weight).detach().clone()
    bias = None if base.bias is None else base.bias.detach().normal_().clone()
    adapters = attach(host, case.specs, ["linear"], seed=0)
    for parameter in host.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return adapters, weight, bias


def matrices_of(adapters: Adapters, k: int) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) of one adapter."""
    bucket = next(b for b in adapters.layers[NAME].buckets if k in b.slot)
    return bucket.lora_A[bucket.slot[k]], bucket.lora_B[bucket.slot[k]]


def expected_scaling(spec: AdapterSpec, member: Member) -> float:
    """s from the definition; a member without a draw reads the mean of its mask products."""
    scaling = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
    if member.draw is None:
        for site in spec.sites:
            scaling *= 1.0 - site.rate if site.compensation == "none" else 1.0
    return scaling


def dense_output(
    case: Case, adapters: Adapters, plan: MemberPlan, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    parts = []
    for m, member in enumerate(case.members):
        update = torch.zeros(case.outputs, case.inputs, dtype=torch.float64)
        if member.adapter is not None:
            A, B = matrices_of(adapters, member.adapter)
            masks = {axis: mask[m] for axis, mask in plan.masks.get(NAME, {}).items()}
            r = masks["lora_rank"][: len(A)] if "lora_rank" in masks else None
            scaling = expected_scaling(case.specs[member.adapter], member)
            update = dense_update(A, B, scaling, masks.get("lora_A"), masks.get("lora_B"), r)
        parts.append(dense_linear(x[m * case.rows : (m + 1) * case.rows], weight, bias, update))
    return torch.cat(parts)


def sensitivities(output: Tensor, leaves: list[Tensor], direction: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(output, leaves, direction.to(output.dtype), allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def assert_matches_reference(
    case: Case, plan: MemberPlan, adapters: Adapters, weight: Tensor, bias: Tensor | None
) -> None:
    shape = (len(case.members) * case.rows, *(() if case.tokens is None else (case.tokens,)), case.inputs)
    x = torch.randn(shape, requires_grad=True)
    with adapters.axis.active(plan):
        ours = adapters.model(x)
    theirs = dense_output(case, adapters, plan, x, weight, bias)
    size = max(1.0, float(theirs.detach().abs().max()))
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * size
    leaves = [x, *(p for p in adapters.model.parameters() if p.requires_grad)]
    direction = torch.randn(theirs.shape)
    pairs = zip(sensitivities(ours, leaves, direction), sensitivities(theirs, leaves, direction), strict=True)
    for got, wanted in pairs:
        size = max(1.0, float(wanted.abs().max()))
        assert float((got.double() - wanted.double()).abs().max()) <= 1e-5 * size


@settings(max_examples=80)
@given(cases())
@example(SQUARE)
def test_drawn_masks_equal_the_dense_reference(case: Case) -> None:
    adapters, weight, bias = attached(case)
    plan = adapters.plan(case.members, case.rows, MaskKey(case.seed, 0))
    assert_matches_reference(case, plan, adapters, weight, bias)


@settings(max_examples=50)
@given(cases(), st.sets(st.sampled_from(WEIGHT_AXES), min_size=1))
def test_given_masks_equal_the_dense_reference(case: Case, masked: set[str]) -> None:
    """Any real vector as a mask: a transposed or repeated axis cannot hide behind zeros and ones."""
    adapters, weight, bias = attached(case)
    sizes = {"lora_A": case.inputs, "lora_B": case.outputs, "lora_rank": max(spec.rank for spec in case.specs)}
    masks = {axis: torch.randn(len(case.members), sizes[axis]) for axis in masked}
    assert_matches_reference(case, MemberPlan(case.members, case.rows, {NAME: masks}), adapters, weight, bias)


@settings(max_examples=40)
@given(cases())
def test_one_pass_of_all_members_equals_a_pass_for_each(case: Case) -> None:
    adapters, _, _ = attached(case)
    x = torch.randn(len(case.members) * case.rows, case.tokens or 1, case.inputs)
    with adapters.axis.active(adapters.plan(case.members, case.rows, MaskKey(5, "test"))):
        together = adapters.model(x)
    for m, member in enumerate(case.members):
        rows = slice(m * case.rows, (m + 1) * case.rows)
        with adapters.axis.active(adapters.plan([member], case.rows, MaskKey(5, "test"))):
            alone = adapters.model(x[rows])
        torch.testing.assert_close(together[rows], alone, rtol=1e-5, atol=1e-5)


def test_a_model_with_mixed_adapters_equals_the_dense_model() -> None:
    """Ranks by pattern, layers by name, three adapters and the base in one pass; logits and gradients."""
    specs = (
        AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT, rank_pattern={"q_proj": 2, "layers.1.mlp.*": 64}),
        AdapterSpec(rank=2, alpha=3.0, rslora=True, layers=frozenset({"model.layers.0.self_attn.v_proj"})),
        AdapterSpec(rank=4, alpha=8.0, alpha_pattern={"o_proj": 1.0}, sites=(Site(position="lora_rank", rate=0.5),)),
    )
    members = [Member(0, 0), Member(None), Member(2, 1), Member(1), Member(0, 1)]
    base = tiny_llama()
    dense = stock_double(base)
    adapters = attach(base, list(specs), "all-linear", seed=0)
    for parameter in adapters.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    ones, positions = torch.ones_like(ids), torch.arange(6).repeat(2, 1)
    plan = adapters.plan(members, 2, MaskKey(11, 3))
    with adapters.axis.active(plan):
        ours = adapters.model(ids.repeat(5, 1), position_ids=positions.repeat(5, 1)).logits
    theirs = torch.cat([dense_model(dense, member_updates(adapters, plan, m), ids, ones, positions) for m in range(5)])
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())
    leaves = [p for p in adapters.model.parameters() if p.requires_grad]
    direction = torch.randn_like(ours)
    pairs = zip(sensitivities(ours, leaves, direction), sensitivities(theirs, leaves, direction), strict=True)
    for got, wanted in pairs:
        assert float((got.double() - wanted.double()).abs().max()) <= 1e-5 * float(wanted.abs().max())


def member_updates(adapters: Adapters, plan: MemberPlan, m: int) -> dict[str, Tensor]:
    """ΔW of one member in every layer that its adapter has, from the specs by hand."""
    k, draw = plan.members[m].adapter, plan.members[m].draw
    updates = {}
    for name, layer in adapters.layers.items():
        bucket = next((b for b in layer.buckets if k in b.slot), None)
        if k is None or bucket is None:
            continue
        A, B = bucket.lora_A[bucket.slot[k]], bucket.lora_B[bucket.slot[k]]
        rank = {0: 2 if name.endswith("q_proj") else 64 if "layers.1.mlp" in name else 4, 1: 2, 2: 4}[k]
        assert len(A) == rank
        scaling = {0: 8.0 / rank, 1: 3.0 / 2**0.5, 2: (1.0 if name.endswith("o_proj") else 8.0) / rank}[k]
        masks = {axis: mask[m] for axis, mask in plan.masks.get(name, {}).items()} if draw is not None else {}
        r = masks["lora_rank"][:rank] if "lora_rank" in masks else None
        updates[name] = dense_update(A, B, scaling, masks.get("lora_A"), masks.get("lora_B"), r)
    return updates


@pytest.mark.usefixtures("stock_attention")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_attaching_is_the_identity_bit_for_bit(make) -> None:
    ids = torch.randint(3, 60, (6, 5), generator=torch.Generator().manual_seed(1))
    model = make()
    before = model(ids).logits
    adapters = attach(model, [AdapterSpec(sites=LORA_DROPOUT), AdapterSpec(rank=3)], "all-linear", seed=0)
    assert torch.equal(model(ids).logits, before)
    with adapters.axis.active(adapters.plan([Member(0, 0), Member(1), Member(None)], 2, MaskKey(0, 0))):
        assert torch.equal(model(ids).logits, before)


def test_rate_zero_is_plain_lora_bit_for_bit() -> None:
    ids = torch.randint(3, 60, (4, 5), generator=torch.Generator().manual_seed(1))
    outputs = []
    for rates in [(), (0.0, 0.0)]:
        sites = tuple(Site(position=axis, rate=rate) for axis, rate in zip(("lora_A", "lora_B"), rates, strict=False))
        adapters = adapted_llama(AdapterSpec(sites=sites))
        plan = adapters.plan([Member(0, 0), Member(0, 1)], 2, MaskKey(0, 0))
        assert not plan.masks
        with adapters.axis.active(plan):
            outputs.append(adapters.model(ids).logits)
    assert torch.equal(*outputs)


def test_evaluation_is_mask_free_to_the_bit_whatever_the_mode_was() -> None:
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    sites = (*LORA_DROPOUT, Site(position="lora_rank", rate=0.5), Site(position="lora_input", rate=0.5))
    adapters, plain = adapted_llama(AdapterSpec(sites=sites)), adapted_llama(AdapterSpec())
    outputs = []
    for owner, training in [(plain, False), (plain, True), (adapters, False), (adapters, True)]:
        owner.model.train(training)
        outputs.append(owner.model(ids).logits)
        with owner.axis.active(owner.plan([Member(0)], 2, MaskKey(0, 0))):
            outputs.append(owner.model(ids).logits)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_the_plan_is_restored_on_exit_and_after_an_exception() -> None:
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    ids = torch.randint(3, 60, (2, 5), generator=torch.Generator().manual_seed(1))
    before = adapters.model(ids).logits
    outer, inner = (adapters.plan([Member(0, draw)], 2, MaskKey(0, 0)) for draw in (0, 1))
    with adapters.axis.active(outer):
        masked = adapters.model(ids).logits
        with pytest.raises(KeyError), adapters.axis.active(inner):
            assert adapters.axis.current is inner
            raise KeyError
        assert adapters.axis.current is outer
        assert torch.equal(adapters.model(ids).logits, masked)
    with pytest.raises(MemberAxisError), adapters.axis.active(inner):
        adapters.model(ids[:1])
    assert adapters.axis.current is None
    assert torch.equal(adapters.model(ids).logits, before) and not torch.equal(masked, before)


@pytest.mark.parametrize("shape", [(5, 3, 8), (12, 8), (7, 1, 8)])
def test_an_input_without_the_declared_rows_is_refused(shape: tuple[int, ...]) -> None:
    adapters = attach(Host(8, 3), [AdapterSpec(rank=2)], ["linear"], seed=0)
    plan = adapters.plan([Member(0), Member(None)], 3, MaskKey(0, 0))
    told = rf"{NAME} received .* {shape[0]}; .* 2 members"
    with adapters.axis.active(plan), pytest.raises(MemberAxisError, match=told):
        adapters.model(torch.zeros(shape))


def test_recomputing_outside_the_plan_is_an_error_rather_than_another_gradient() -> None:
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    adapters.model.train()
    adapters.model.activation_checkpointing_enable({"use_reentrant": False})
    with adapters.axis.active(adapters.plan([Member(0, 0)], 2, MaskKey(0, 0))):
        loss = adapters.model(torch.full((2, 5), 7)).logits.square().sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_layers_that_no_adapter_has_are_left_alone() -> None:
    layers = frozenset({"model.layers.1.mlp.up_proj"})
    adapters = attach(tiny_llama(), [AdapterSpec(layers=layers)], "all-linear", seed=0)
    assert set(adapters.layers) == layers and adapters.device == torch.device("cpu")
    assert isinstance(adapters.model.get_submodule("model.layers.0.mlp.up_proj"), nn.Linear)


def test_an_adapter_without_any_targeted_layer_is_refused() -> None:
    elsewhere = AdapterSpec(layers=frozenset({"model.layers.7.mlp.up_proj"}))
    with pytest.raises(ConfigError, match="adapter 1"):
        attach(tiny_llama(), [AdapterSpec(), elsewhere], "all-linear", seed=0)


def test_the_start_of_an_adapter_does_not_depend_on_its_neighbours() -> None:
    """A is drawn by (seed, adapter, layer) alone, and is bounded as PEFT's kaiming start: |A| <= 1/sqrt(I)."""
    alone = attach(tiny_llama(), [AdapterSpec(rank=4)], ["q_proj"], seed=3)
    specs = [AdapterSpec(rank=4), AdapterSpec(rank=4), AdapterSpec(rank=2)]
    beside = attach(tiny_llama(), specs, ["q_proj", "up_proj"], seed=3)
    for name, layer in alone.layers.items():
        A = layer.buckets[0].lora_A[0]
        assert torch.equal(A, beside.layers[name].buckets[0].lora_A[0])
        assert not torch.equal(A, beside.layers[name].buckets[0].lora_A[1])
        assert 0.95 / 8 < float(A.detach().abs().max()) <= 1 / 8
        assert not layer.buckets[0].lora_B.any()
    other = attach(tiny_llama(), [AdapterSpec(rank=4)], ["q_proj"], seed=4)
    assert not torch.equal(A, other.layers[name].buckets[0].lora_A[0])
