"""Weight masks: drawn as their definition says, at the stated rate, independent where they should be.

The generator is counter-based, so every statistic below is one fixed number: no test here can fail by chance.
Bounds are 5 standard deviations, or stated.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama
from helpers.reference import phi_z, reference_key, reference_mask, reference_uniforms, splitmix64, z_score
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.masks import LayerSites, draw_weight_masks
from pipeline.adapters.members import MaskKey, Member, MemberPlan
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.randomness import key64, least_bits, random_bits, uniform

keys = st.integers(0, 2**64 - 1)


def test_splitmix64_gives_the_published_numbers() -> None:
    """The reference itself: the first outputs of Vigna's splitmix64 for the state 1234567."""
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.tuples(keys, st.integers(0, 9)), max_size=6))
def test_uniforms_equal_the_reference_segment_by_segment(segments: list[tuple[int, int]]) -> None:
    """An odd segment has one number more."""
    bits = random_bits([key for key, _ in segments], [size for _, size in segments], "cpu")
    wanted = [u for key, size in segments for u in reference_uniforms(key, size + size % 2)]
    assert bits.dtype == torch.int32 and uniform(bits).dtype == torch.float64 and uniform(bits).tolist() == wanted


@given(st.floats(0, 1, exclude_max=True), st.integers(-(2**31), 2**31 - 1))
@example(0.0, -(2**31))
@example(0.3, 1288490189 - 2**31)
@example(0.3, 1288490188 - 2**31)
@example(1.0 - 2.0**-53, 2**31 - 1)
def test_bits_are_compared_as_the_numbers_they_stand_for(probability: float, bits: int) -> None:
    number = (bits + 2**31) / 2**32
    assert (bits >= least_bits(probability)) == (number >= probability or bits == 2**31 - 1)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    """Byte frequencies of all four bytes, neighbours, the two halves of a word, neighbouring keys."""
    values = uniform(random_bits([7, 8], [2**18, 2**18], "cpu")).numpy()
    assert values.min() >= 0.0 and values.max() < 1.0
    words = (values * 2**32).astype(np.uint64)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words >> np.uint64(shift) & np.uint64(255)).astype(int), minlength=256)
        chi2 = float(((counts - len(words) / 256) ** 2).sum() / (len(words) / 256))
        assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    low = torch.from_numpy(values < 0.3)
    first, second = low[: 2**18], low[2**18 :]
    for x, y in [(low[:-1], low[1:]), (low[:-2], low[2:]), (first[::2], first[1::2]), (first, second)]:
        assert abs(phi_z(x, y)) < 5


@given(st.lists(st.one_of(st.integers(), st.text(), st.booleans(), st.none()), max_size=4))
def test_keys_equal_the_reference(parts: list[object]) -> None:
    assert key64(*parts) == reference_key(*parts)


def test_keys_tell_types_order_and_borders_apart() -> None:
    different = [(1, "a"), ("1", "a"), ("a", 1), ("a", "1"), ("1a",), (True, "a"), (1.0, "a"), ("", 1, "a")]
    assert len({key64(*parts) for parts in different}) == len(different)


def test_masks_equal_their_definition() -> None:
    """Every mask of a model, rebuilt from (seed, step, draw, layer, side) in plain integers, sizes odd and even."""
    sizes = {"a": (5, 4, 3), "b": (4, 1, 2)}
    sites = {
        "lora_A": Site(position="lora_A", rate=0.5),
        "lora_B": Site(position="lora_B", rate=0.3, compensation="none"),
        "lora_rank": Site(position="lora_rank", rate=0.75),
    }
    layers = {name: LayerSites({(0, side): n for side, n in zip(sites, size, strict=True)}, {0: sites})
              for name, size in sizes.items()}
    members = [Member(0, 0), Member(0), Member(None), Member(0, 2)]
    masks = draw_weight_masks(layers, members, [MaskKey(42, 6)] * 4, "cpu")
    for name, size in sizes.items():
        for (side, site), n in zip(sites.items(), size, strict=True):
            kept = 1.0 if site.compensation == "none" else 1.0 / (1.0 - site.rate)
            drawn = masks[name][side]
            assert drawn.dtype == torch.float32 and drawn.shape == (4, n)
            torch.testing.assert_close(drawn[0], reference_mask((42, 6, 0, name, side), n, site.rate, kept))
            torch.testing.assert_close(drawn[3], reference_mask((42, 6, 2, name, side), n, site.rate, kept))
            assert (drawn[1:3] == 1.0).all()


def test_masks_do_not_depend_on_what_is_asked_beside_them() -> None:
    """Alone or among others, in any order, drawn again by fresh objects, as after a resume: the same bytes."""
    def fresh() -> Adapters:
        specs = AdapterSpec(rank=4, sites=LORA_DROPOUT), AdapterSpec(rank=3, sites=SIDES)
        return adapted_llama(*specs, targets=["q_proj", "up_proj"])

    members = [Member(1, 0), Member(0, 2), Member(None), Member(0), Member(0, 5)]
    together = fresh().plan(members, 1, MaskKey(9, 4)).masks
    backwards = fresh().plan(members[::-1], 7, MaskKey(9, 4)).masks
    for m, member in enumerate(members):
        alone = fresh().plan([member], 3, MaskKey(9, 4)).masks
        for name, sides in together.items():
            for side, mask in sides.items():
                assert torch.equal(mask[m], backwards[name][side][-1 - m])
                mine = alone.get(name, {}).get(side, torch.ones(1, mask.shape[1]))[0]
                assert torch.equal(mask[m][: len(mine)], mine) and (mask[m][len(mine) :] == 1.0).all()


def test_masks_differ_where_any_part_of_their_key_differs() -> None:
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT), targets=["q_proj", "k_proj"])
    settings = [(9, 4, 0), (10, 4, 0), (9, 5, 0), (9, 4, 1), (9, "4", 0), (9, "test", 0)]
    drawn = set()
    for seed, phase, draw in settings:
        masks = adapters.plan([Member(0, draw)], 1, MaskKey(seed, phase)).masks
        drawn |= {mask[0, :32].numpy().tobytes() for sides in masks.values() for mask in sides.values()}
    assert len(drawn) == len(settings) * 2 * 2


LAYER_NAMES = [f"model.layers.{i}.self_attn.{leaf}" for i in range(4) for leaf in ("q_proj", "v_proj")]
SIDES = (Site(position="lora_A", rate=0.5), Site(position="lora_B", rate=0.2), Site(position="lora_rank", rate=0.9))


def many_masks(steps: int, draws: int = 4, size: int = 512) -> dict[str, Tensor]:
    """side -> (steps, layers, draws, size) dropped or not."""
    layers = {
        name: LayerSites({(0, site.position): size for site in SIDES}, {0: {site.position: site for site in SIDES}})
        for name in LAYER_NAMES
    }
    members = [Member(0, draw) for draw in range(draws)]
    drawn = [draw_weight_masks(layers, members, [MaskKey(0, step)] * draws, "cpu") for step in range(steps)]

    def stacked(position: str) -> Tensor:
        return torch.stack([torch.stack([masks[name][position] for name in layers]) for masks in drawn])

    return {site.position: stacked(site.position) == 0 for site in SIDES}


def test_the_dropped_fraction_is_the_rate_in_every_layer_draw_and_side() -> None:
    masks = many_masks(steps=16)
    for site in SIDES:
        dropped = masks[site.position]
        assert abs(z_score(int(dropped.sum()), dropped.numel(), site.rate)) < 5
        per_cell = dropped.double().sum(dim=(0, 3)).flatten()  # per (layer, draw), over 16 steps × 512 entries
        scores = torch.tensor([z_score(float(count), 16 * 512, site.rate) for count in per_cell])
        assert scores.abs().max() < 5
        assert abs(float(scores.square().sum()) - len(scores)) < 5 * (2 * len(scores)) ** 0.5  # binomial, not tamer
        per_entry = dropped.double().sum(dim=(0, 1, 2))  # per position in the mask: no entry is preferred
        scores = torch.tensor([z_score(float(count), 16 * len(LAYER_NAMES) * 4, site.rate) for count in per_entry])
        assert scores.abs().max() < 5 and abs(float(scores.square().sum()) - 512) < 5 * 1024**0.5


def test_masks_are_independent_across_layers_draws_steps_sides_and_entries() -> None:
    masks = many_masks(steps=16)
    A, B, rank = masks["lora_A"], masks["lora_B"], masks["lora_rank"]
    scores = [phi_z(x, y) for x, y in itertools.combinations((A, B, rank), 2)]
    for drawn in (A, B, rank):
        scores += [phi_z(drawn[:, i], drawn[:, j]) for i, j in itertools.combinations(range(len(LAYER_NAMES)), 2)]
        scores += [phi_z(drawn[:, :, i], drawn[:, :, j]) for i, j in itertools.combinations(range(4), 2)]
        scores += [phi_z(drawn[i], drawn[j]) for i, j in itertools.combinations(range(16), 2)]
        scores += [phi_z(drawn[..., :-lag], drawn[..., lag:]) for lag in (1, 2, 3, 4, 8, 64, 256)]
    measured = torch.tensor(scores)
    assert measured.abs().max() < 5
    assert abs(float(measured.square().mean()) - 1.0) < 5 * (2 / len(scores)) ** 0.5


@settings(max_examples=25)
@given(st.floats(0.0, 1.0, exclude_max=True), st.sampled_from(["inverse", "none"]), keys)
def test_kept_entries_are_scaled_for_every_rate(rate: float, rescale: str, seed: int) -> None:
    site = Site(position="lora_A", rate=rate, compensation=rescale)
    layers = {"x": LayerSites({(0, "lora_A"): 33}, {0: {"lora_A": site}})}
    masks = draw_weight_masks(layers, [Member(0, 0)], [MaskKey(seed, 0)], "cpu")
    kept = np.float32(1.0 / (1.0 - rate)) if rescale == "inverse" else np.float32(1.0)
    assert set(masks["x"]["lora_A"].unique().tolist()) <= {0.0, float(kept)}


class One(nn.Module):
    """A model of one linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(
    sites: tuple[Site, ...], inputs: int = 24, outputs: int = 16, rank: int = 4, alpha: float = 8.0
) -> Adapters:
    torch.manual_seed(0)
    adapters = attach(One(inputs, outputs), [AdapterSpec(rank=rank, alpha=alpha, sites=sites)], ["linear"], seed=0)
    for parameter in adapters.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return adapters


@pytest.mark.parametrize(("rate_A", "rate_B"), [(0.5, 0.5), (0.3, 0.0), (0.0, 0.6), (0.8, 0.2)])
def test_the_mean_over_draws_converges_to_plain_lora_at_the_rate_of_theory(rate_A: float, rate_B: float) -> None:
    """With `inverse`, E[y] is plain LoRA, and the mean of N draws errs by exactly sqrt(Var/N).

    c_oi = s (BA)_oi x_i,  Var[y_o] = (S² + p/(1-p) Σ_i c_oi²)/(1-q) - S²,  S = Σ_i c_oi,  p, q = rate_A, rate_B.
    """
    adapters = one_layer((Site(position="lora_A", rate=rate_A), Site(position="lora_B", rate=rate_B)))
    bucket = adapters.layers["linear"].buckets[0]
    x = torch.randn(24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        terms = 2.0 * (bucket.lora_B[0] @ bucket.lora_A[0]).double() * x.double()
        plain = adapters.model(x.view(1, 24)).double()[0]
    total = terms.sum(1)
    variance = (total**2 + rate_A / (1 - rate_A) * (terms**2).sum(1)) / (1 - rate_B) - total**2
    means = []
    for phase in range(120):
        members = [Member(0, draw) for draw in range(64)]
        with torch.no_grad(), adapters.axis.active(adapters.plan(members, 1, MaskKey(0, phase))):
            means.append(adapters.model(x.expand(64, 24)).double().mean(0))
    errors = torch.stack(means) - plain  # (120, 16), each of variance Var/64
    squared = (errors**2).mean(0) / (variance / 64)
    assert float((errors.mean(0).abs() / (variance / (64 * 120)).sqrt()).max()) < 5
    assert float(squared.min()) > 0.5 and float(squared.max()) < 1.7  # χ²(120)/120 has sd 0.13
    assert abs(float(squared.mean()) - 1.0) < 0.3


@given(st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.sampled_from([1.0, 8.0]))
@settings(max_examples=20)
def test_no_rescale_is_inverse_with_a_smaller_alpha(
    rate_A: float, rate_B: float, rate_rank: float, alpha: float
) -> None:
    """Draw by draw and mean-field: `none` at alpha = `inverse` at alpha · Π (1 - rate)."""
    rates = {"lora_A": rate_A, "lora_B": rate_B, "lora_rank": rate_rank}
    factor = (1 - rate_A) * (1 - rate_B) * (1 - rate_rank)
    outputs = []
    for rescale, effective in [("none", alpha), ("inverse", alpha * factor)]:
        sites = tuple(Site(position=axis, rate=rate, compensation=rescale) for axis, rate in rates.items())
        adapters = one_layer(sites, alpha=effective)
        members = [Member(0, 0), Member(0, 1), Member(0)]
        with torch.no_grad(), adapters.axis.active(adapters.plan(members, 2, MaskKey(1, 1))):
            outputs.append(adapters.model(torch.linspace(-1, 1, 6 * 24).view(6, 24)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


def test_one_side_alone() -> None:
    """rate_B = 0 masks columns of A only, rate_A = 0 rows of B only; the rank axis is never touched by LoRA Dropout."""
    for position, gone in [("lora_A", "lora_B"), ("lora_B", "lora_A")]:
        adapters = one_layer((Site(position=position, rate=0.5), Site(position=gone, rate=0.0)))
        plan = adapters.plan([Member(0, 0)], 1, MaskKey(0, 0))
        assert set(plan.masks["linear"]) == {position}
    both = one_layer(LORA_DROPOUT).plan([Member(0, 0)], 1, MaskKey(0, 0))
    assert set(both.masks["linear"]) == {"lora_A", "lora_B"}


def test_dropout_leaves_the_rank_of_the_update_whole() -> None:
    """diag(b) B A diag(a) keeps rank R while R rows and columns are left: measured on the update itself."""
    adapters = one_layer(LORA_DROPOUT, inputs=32, outputs=32, rank=4)
    base = adapters.layers["linear"].base
    for draw in range(8):
        plan = adapters.plan([Member(0, draw)], 32, MaskKey(0, 0))
        with torch.no_grad(), adapters.axis.active(plan):
            update = (adapters.model(torch.eye(32)) - base(torch.eye(32))).T
        dropped = plan.masks["linear"]
        assert int(torch.linalg.matrix_rank(update, tol=1e-3)) == 4
        assert torch.equal(update.abs().sum(0) < 1e-5, dropped["lora_A"][0] == 0)
        assert torch.equal(update.abs().sum(1) < 1e-5, dropped["lora_B"][0] == 0)


def test_masked_layers_follow_the_sites_range() -> None:
    half = AdapterSpec(sites=(Site(position="lora_A", rate=0.5, layers=(0.5, 1.0)),))
    plan = adapted_llama(half, layers=4).plan([Member(0, 0)], 1, MaskKey(0, 0))
    assert {name.split(".")[2] for name in plan.masks} == {"2", "3"}


def test_a_plan_draws_nothing_without_draws() -> None:
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    plan = adapters.plan([Member(0), Member(None)], 1, MaskKey(0, 0))
    assert isinstance(plan, MemberPlan) and not plan.masks
    assert replace(plan, rows=4).size == 2
