"""Members of one pass under keys of their own: each has, bit for bit, the masks of a pass of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama
from helpers.reference import phi_z, reference_bits
from helpers.site_models import adapted, batch, our_logits, plan_for
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.masks import dropped_hidden, dropped_keys, dropped_pairs, element_mask, row_hash, threshold
from pipeline.adapters.members import MaskKey, Member, MemberAxisError, MemberPlan, RowKeys
from pipeline.adapters.sites.deberta import _table_keys
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig
from pipeline.config.method import Site
from pipeline.support.sites import tiny_model

ALL = slice(None)
PATTERNS = ("column", "element", "span")
WEIGHT_SITES = (*LORA_DROPOUT, Site(position="lora_rank", rate=0.5))
MEMBERS = [Member(0, 0), Member(0, 0), Member(0, 1), Member(0), Member(0, 0), Member(None), Member(0, 1), Member(0, 1)]
KEYS = [
    MaskKey(7, 3), MaskKey(8, 3), MaskKey(8, 3), MaskKey(8, 3), MaskKey(7, 4), MaskKey(7, 4), MaskKey(7, "test"),
    MaskKey(2**40, 0),
]
EXAMPLES = torch.tensor([11, 2**40 + 5])
PACKED = torch.tensor([[11] * 4 + [12] * 5, [2**40 + 5] * 9])


def masked_sites(pattern: str) -> tuple[Site, ...]:
    """An attention and an FFN site of the pattern."""
    return (
        Site(position="attention_logits", pattern=pattern, rate=0.4),  # type: ignore[arg-type]
        Site(position="ffn_hidden", pattern=pattern, rate=0.3),  # type: ignore[arg-type]
    )


CASES: dict[str, tuple[Site, ...]] = {
    "weight sites": WEIGHT_SITES,
    "hiddenkey": AdapterConfig(method="hiddenkey").resolved_method().sites,
    "all at once": (*WEIGHT_SITES, Site(position="lora_input", rate=0.3), *masked_sites("element")),
    **{pattern: masked_sites(pattern) for pattern in PATTERNS},
}


def apart(adapters: Adapters, rows: dict[str, Tensor], examples: Tensor = EXAMPLES) -> list[MemberPlan]:
    """A plan of its own for every member."""
    return [plan_for(adapters, [m], rows, examples, key) for m, key in zip(MEMBERS, KEYS, strict=True)]


def row_keys(plan: MemberPlan) -> RowKeys:
    assert plan.row_keys is not None
    return plan.row_keys


Mask = Callable[[RowKeys, slice], Tensor]
MASKS: dict[str, Mask] = {
    "input": lambda keys, rows: element_mask(keys, rows, 2**63 + 9, 33, 0.4) == 0,
    **{
        f"hidden {site.pattern}": lambda keys, rows, site=site: dropped_hidden(keys, rows, 77, 33, site)  # type: ignore[misc]
        for site in (masked_sites(pattern)[1] for pattern in PATTERNS)
    },
    "keys column": lambda keys, rows: dropped_keys(keys, rows, 78, 3, masked_sites("column")[0]),
    "pairs element": lambda keys, rows: dropped_pairs(keys, rows, 79, 3, masked_sites("element")[0]),
    "pairs span": lambda keys, rows: dropped_pairs(keys, rows, 80, 3, masked_sites("span")[0]),
}


@pytest.mark.parametrize("examples", [EXAMPLES, PACKED], ids=["one example per row", "packed"])
@pytest.mark.parametrize("kind", MASKS)
def test_activation_masks_are_those_of_a_pass_of_its_own(kind: str, examples: Tensor) -> None:
    """All rows at once, any run of members, and a part of a member's rows."""
    mask, rows = MASKS[kind], batch()
    adapters, _ = adapted("llama", *masked_sites("column"))
    together = row_keys(plan_for(adapters, MEMBERS, rows, examples, KEYS))
    alone = torch.cat([mask(row_keys(plan), ALL) for plan in apart(adapters, rows, examples)])
    assert torch.equal(mask(together, ALL), alone)
    for start, stop in itertools.combinations(range(len(alone) + 1), 2):
        assert torch.equal(mask(together, slice(start, stop)), alone[start:stop]), (start, stop)


def test_weight_masks_are_those_of_a_pass_of_its_own() -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=WEIGHT_SITES)), batch()
    together = adapters.plan(MEMBERS, 2, KEYS).masks
    assert {side for sides in together.values() for side in sides} == {site.position for site in WEIGHT_SITES}
    for m, plan in enumerate(apart(adapters, rows)):
        for name, sides in together.items():
            for side, mask in sides.items():
                mine = plan.masks.get(name, {}).get(side, torch.ones(1, mask.shape[1]))
                assert torch.equal(mask[m], mine[0]), (m, name, side)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_separate_passes(case: str) -> None:
    adapters, _ = adapted("llama", *CASES[case])
    rows = batch()
    real = rows["attention_mask"].bool()
    adapters.model.train()
    together = our_logits(adapters, plan_for(adapters, MEMBERS, rows, EXAMPLES, KEYS), rows)[:, real]
    alone = torch.cat([our_logits(adapters, plan, rows)[:, real] for plan in apart(adapters, rows)])
    size = float(alone.detach().abs().max())
    assert float((together - alone).detach().abs().max()) <= 1e-6 * size
    for one, other in itertools.combinations([0, 1, 4, 3, 6, 7], 2):
        assert float((together[one] - together[other]).detach().abs().max()) > 1e-3 * size, (one, other)
    parameters = [p for p in adapters.model.parameters() if p.requires_grad]
    direction = torch.randn(alone.shape, generator=torch.Generator().manual_seed(9))
    found, wanted = (torch.autograd.grad(logits, parameters, direction) for logits in (together, alone))
    largest = max(float(gradient.abs().max()) for gradient in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) <= 1e-5 * largest


def test_pooled_vectors_and_deberta_tables_have_the_masks_of_a_pass_of_its_own() -> None:
    """Where the row keys of a plan are turned into others."""
    adapters, rows = adapted_llama(AdapterSpec(sites=(Site(position="lora_input", rate=0.5),))), batch()
    together = plan_for(adapters, MEMBERS, rows, EXAMPLES, KEYS)
    plans = apart(adapters, rows)
    for of_plan in (lambda plan: plan.keys_for(plan.rows, "pooler"), lambda plan: _table_keys(plan, 6)):
        alone = torch.cat([element_mask(of_plan(plan), ALL, 9, 16, 0.5) for plan in plans])
        assert torch.equal(element_mask(of_plan(together), ALL, 9, 16, 0.5), alone)


halves = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])


@settings(max_examples=40)
@given(st.lists(st.one_of(halves, st.integers(0, 2**64 - 1)), min_size=2, max_size=5), st.integers(0, 2**64 - 1))
@example([2**64 - 1, 0, 2**63, 2**31], 2**63)
@example([5, 5], 0)
def test_masks_of_different_keys_equal_the_integer_reference(seeds: list[int], layer: int) -> None:
    """Two rows per member; signs and wrap-around of both halves of each key."""
    names = torch.tensor([3, 2**62 + 2**31]).repeat(len(seeds))
    branch = torch.arange(len(seeds)).repeat_interleave(2)
    keys = RowKeys(tuple(seeds), branch, names, torch.arange(2).repeat(2 * len(seeds), 1))
    dropped = element_mask(keys, ALL, layer, 3, 0.5) == 0
    for row, t, feature in itertools.product(range(len(names)), range(2), range(3)):
        bits = reference_bits(seeds[row // 2], layer, int(branch[row]), int(names[row]), t, feature)
        assert bool(dropped[row, t, feature]) == (bits < threshold(0.5))


def test_adapters_of_different_keys_never_share_a_mask() -> None:
    """The same draw of two adapters: equal masks under one key, unrelated ones under two, in every layer and row."""
    spec = AdapterSpec(rank=8, sites=(*LORA_DROPOUT, *masked_sites("element")))
    adapters = attach(tiny_model("llama"), [spec, spec], "all-linear", seed=0)

    def masks(*keys: MaskKey) -> tuple[dict[str, Tensor], Tensor]:
        """One mask of each adapter, (2, …) by name; what each row's masks are hashed from, (2, 2)."""
        plan = plan_for(adapters, [Member(0, 0), Member(1, 0)], batch((9, 9)), EXAMPLES, keys)
        found = {f"{name} {side}": mask == 0 for name, sides in plan.masks.items() for side, mask in sides.items()}
        found |= {kind: mask(row_keys(plan), ALL).unflatten(0, (2, 2)) for kind, mask in MASKS.items()}
        return found, row_hash(row_keys(plan), ALL, 5).view(2, 2)

    keys = [MaskKey(seed, phase) for seed in (0, 1, 2) for phase in (0, 1, 2, "0", "test")]
    scores, lines = [], set()
    for one, other in itertools.combinations(keys, 2):
        found, hashes = masks(one, other)
        lines |= set(hashes.flatten().tolist())
        for kind, pair in found.items():
            if "column" not in kind and "span" not in kind:  # their entries depend on each other
                assert not torch.equal(*pair), (one, other, kind)
                scores.append(phi_z(*pair))
    assert len(lines) == 2 * len(keys)
    measured = torch.tensor(scores)
    assert measured.abs().max() < 5
    assert abs(float(measured.square().mean()) - 1.0) < 5 * (2 / len(scores)) ** 0.5
    found, hashes = masks(keys[0], keys[0])
    assert all(torch.equal(*pair) for pair in (*found.values(), hashes))


def test_one_key_stands_for_all_members_and_other_numbers_of_keys_are_refused() -> None:
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    members = [Member(0, 0), Member(0, 1)]
    assert adapters.plan(members, 1, KEYS[0]).keys == (KEYS[0],) * 2
    for count in (0, 1, 3):
        with pytest.raises(MemberAxisError, match=f"2 members have {count} mask keys"):
            adapters.plan(members, 1, KEYS[:count])
