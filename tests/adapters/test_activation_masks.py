"""Hashed activation masks: exact integers, uniform, independent, and keyed by what they claim to be keyed by.

The hash is deterministic, so every statistic below is one fixed number: no test here can fail by chance.
Bounds are 5 standard deviations, or stated.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.families import CPU, adapted_llama, examples
from helpers.reference import dense_update, lowbias32, phi_z, reference_bits, z_score
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.masks import element_mask, mix32, threshold, token_hash
from pipeline.adapters.members import MaskKey, Member, MemberAxisError, RowKeys
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.collate import example_keys
from pipeline.training.batch import lay_out

ALL = slice(None)


def row_keys(branches: list[int], ids: list[int], positions: list[int], seed: int = 5) -> RowKeys:
    """Every (branch, example) pair as a row, every position in each."""
    pairs = list(itertools.product(branches, ids))
    branch, example_ids = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    return RowKeys((seed,), branch, example_ids, torch.tensor(positions).repeat(len(pairs), 1))


def text_ids(count: int) -> list[int]:
    """Identities as real examples have them."""
    return example_keys([f"row-{i}" for i in range(count)]).tolist()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1), layer=st.integers(0, 2**64 - 1), branch=st.integers(-1, 2**31 - 1),
    identity=st.integers(0, 2**63 - 1), position=st.integers(0, 2**31 - 1), rate=st.floats(0.0, 1.0, exclude_max=True),
)
@example(seed=2**64 - 1, layer=0, branch=-1, identity=2**63 - 1, position=2**31 - 1, rate=0.5)
@example(seed=0, layer=2**63, branch=2**31 - 1, identity=0x40000000_7FFFFFFF, position=0, rate=0.5)
def test_masks_equal_the_integer_reference(
    seed: int, layer: int, branch: int, identity: int, position: int, rate: float
) -> None:
    """int32 wrap-around, signs and 64-bit identities: entry by entry what plain integers give."""
    keys = row_keys([branch], [identity], [position, 0], seed)
    mask = element_mask(keys, ALL, layer, 3, rate)
    for t, p in enumerate([position, 0]):
        for feature in range(3):
            bits = reference_bits(seed, layer, branch, identity, p, feature)
            wanted = 0.0 if bits < threshold(rate) else 1.0 / (1.0 - rate)
            assert float(mask[0, t, feature]) == pytest.approx(wanted, rel=1e-6)


@given(st.floats(0.0, 1.0, exclude_max=True))
@example(0.0)
@example(0.5)
@example(1.0 - 2.0**-53)
@example(2.0**-40)
def test_the_threshold_is_the_rate_to_32_bits(rate: float) -> None:
    """(threshold + 2³¹) of the 2³² hashes are below it."""
    assert -(2**31) <= threshold(rate) <= 2**31 - 1
    assert abs((threshold(rate) + 2**31) / 2**32 - rate) <= 2.0**-32


def test_rate_zero_keeps_everything_and_a_rate_near_one_almost_nothing() -> None:
    keys = row_keys([0], text_ids(8), list(range(128)))
    assert (element_mask(keys, ALL, 1, 512, 0.0) == 1.0).all()
    nearly_all = element_mask(keys, ALL, 1, 512, 1.0 - 2.0**-12)
    assert abs(z_score(int((nearly_all > 0).sum()), nearly_all.numel(), 2.0**-12)) < 5
    assert set(nearly_all.unique().tolist()) == {0.0, 4096.0}
    nearly_none = element_mask(keys, ALL, 1, 512, 2.0**-12)
    assert abs(z_score(int((nearly_none == 0).sum()), nearly_none.numel(), 2.0**-12)) < 5


def test_the_mixer_is_lowbias32_and_avalanches() -> None:
    """Every input bit flips every output bit of consecutive numbers half of the time, within 3 %."""
    x = torch.arange(-(2**14), 2**14, dtype=torch.int32)
    mixed = mix32(x)
    assert mixed[::4097].tolist() == [
        y - 2**32 if y >= 2**31 else y for y in (lowbias32(int(v) % 2**32) for v in x[::4097])
    ]
    assert len(mixed.unique()) == len(x)
    for bit in range(32):
        flip = torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
        changed = mix32(x ^ flip) ^ mixed
        rates = torch.stack([(changed >> k & 1).double().mean() for k in range(32)])
        assert float((rates - 0.5).abs().max()) < 0.03


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_the_dropped_fraction_is_the_rate_along_every_axis(rate: float) -> None:
    """Total, per feature, per position, per example, per branch: binomial counts, as spread as binomial counts are."""
    keys = row_keys([0, 1, 2], text_ids(16), list(range(64)))
    dropped = (element_mask(keys, ALL, 77, 192, rate) == 0).view(3, 16, 64, 192).double()
    assert abs(z_score(float(dropped.sum()), dropped.numel(), rate)) < 5
    for axes in [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (2, 3), (0, 1), (0, 3)]:
        counts = dropped.sum(dim=axes).flatten()
        scores = torch.tensor([z_score(float(c), dropped.numel() / len(counts), rate) for c in counts])
        assert scores.abs().max() < 5
        assert abs(float(scores.square().sum()) - len(scores)) < 5 * (2 * len(scores)) ** 0.5


def test_masks_are_independent_along_every_axis() -> None:
    """Pairs of features, positions, examples, branches, layers, steps; identities also as bare counters."""
    scores = []
    for ids in (text_ids(6), list(range(6)), [i << 32 for i in range(6)]):
        keys = row_keys([0, 1, 2], ids, list(range(48)))
        dropped = (element_mask(keys, ALL, 77, 96, 0.5) == 0).view(3, 6, 48, 96)
        for axis in range(4):
            for lag in (1, 2, 4, 16, 32):
                if lag < dropped.shape[axis]:
                    size = dropped.shape[axis] - lag
                    scores.append(phi_z(dropped.narrow(axis, 0, size), dropped.narrow(axis, lag, size)))
        for layer in (78, 77 + 2**32, 0):
            scores.append(phi_z(dropped, element_mask(keys, ALL, layer, 96, 0.5).view_as(dropped) == 0))
        for seed in (4, 5 + 2**32):
            later = row_keys([0, 1, 2], ids, list(range(48)), seed)
            scores.append(phi_z(dropped, element_mask(later, ALL, 77, 96, 0.5).view_as(dropped) == 0))
    measured = torch.tensor(scores)
    assert measured.abs().max() < 5
    assert abs(float(measured.square().mean()) - 1.0) < 5 * (2 / len(scores)) ** 0.5


def test_token_and_feature_do_not_interact() -> None:
    """The parity of the four entries of two tokens × two features is a fair coin: no exclusive-or structure."""
    keys = row_keys([0], text_ids(8), list(range(64)))
    dropped = (element_mask(keys, ALL, 3, 256, 0.5) == 0).view(-1, 256)
    for tokens, features in itertools.product((1, 2, 64), (1, 2, 128)):
        rows = dropped ^ dropped.roll(tokens, 0)
        parity = (rows ^ rows.roll(features, 1))[:, : features if features == 128 else 256]
        parity = parity[: 256 if tokens == 64 else len(parity)]
        assert abs(z_score(int(parity.sum()), parity.numel(), 0.5)) < 5


def test_different_tokens_have_different_masks() -> None:
    """Collisions of (branch, example, position), structured on purpose, are as rare as for a random 32-bit hash."""
    for ids in (text_ids(64), list(range(64)), [i << 32 for i in range(64)], [i * 0x9E3779B1 for i in range(64)]):
        hashes = token_hash(row_keys(list(range(16)), ids, list(range(256))), ALL, 12).flatten()
        expected = len(hashes) ** 2 / 2 / 2**32  # 8 of 262,144
        assert len(hashes) - len(hashes.unique()) < expected + 5 * expected**0.5


def test_steps_and_layers_do_not_trade_places() -> None:
    """The mask of (step s, layer l) never reappears at (s', l'), however the two keys are related."""
    small = [0, 1, 2, 3, 2**32, 2**32 + 1, 3 << 32]
    seen = {
        element_mask(row_keys([0], [7], [0, 1], seed), ALL, layer, 64, 0.5).numpy().tobytes()
        for seed, layer in itertools.product(small, small)
    }
    assert len(seen) == len(small) ** 2


def test_padding_side_order_and_company_do_not_change_the_mask_of_a_token() -> None:
    site = (Site(position="lora_input", rate=0.5),)
    adapters = adapted_llama(AdapterSpec(sites=site))
    rows = examples([7, 4, 9])
    def masks(chosen: list[int], side: str, draws: int) -> dict[tuple[str, int], Tensor]:
        layout = replicate_layout(len(chosen), draws)
        built = lay_out(adapters, [rows[i] for i in chosen], layout, 2, MaskKey(0, 3), side)
        mask = element_mask(built.plan.row_keys, ALL, 99, 16, 0.5)
        real = built.tensors["attention_mask"].bool()
        names = [rows[i].example for i in chosen] * draws
        return {(name, r // len(chosen)): mask[r][real[r]] for r, name in enumerate(names)}
    reference = masks([0, 1, 2], "left", 2)
    assert not torch.equal(reference["row-0", 0], reference["row-0", 1])
    for other in (masks([0, 1, 2], "right", 2), masks([2, 0], "left", 2), masks([1], "right", 1)):
        for where, mask in other.items():
            assert torch.equal(mask, reference[where]), where


class One(nn.Module):
    """A model of one linear."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(*specs: AdapterSpec, inputs: int = 6, outputs: int = 6) -> Adapters:
    torch.manual_seed(0)
    adapters = attach(One(inputs, outputs), specs, ["linear"], seed=0)
    for parameter in adapters.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return adapters


DROPPED_INPUT = AdapterSpec(rank=2, alpha=6.0, sites=(Site(position="lora_input", rate=0.5),))


def test_input_dropout_equals_the_dense_reference() -> None:
    """y = x Wᵀ + s (mask ∘ x)(BA)ᵀ: the base sees the whole input; forward and gradients, members mixed."""
    adapters = one_layer(DROPPED_INPUT, AdapterSpec(rank=3, alpha=3.0))
    layer, members = adapters.layers["linear"], [Member(0, 0), Member(1, 0), Member(0), Member(None), Member(0, 1)]
    x = torch.randn(10, 4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    identities, positions = torch.tensor([11, 12]).repeat(5), torch.arange(4).repeat(10, 1)
    plan = with_row_keys(adapters.plan(members, 2, MaskKey(0, 0)), identities, positions)
    with adapters.axis.active(plan):
        ours = adapters.model(x)
    scalings, matrices = (3.0, 1.0), [(b.lora_A[0], b.lora_B[0]) for b in layer.buckets]
    parts = []
    for m, member in enumerate(members):
        rows = slice(2 * m, 2 * m + 2)
        mask = torch.ones(2, 4, 6)
        if member == Member(0, member.draw) and member.draw is not None:
            _, layer_key = layer.input_sites[0]
            mask = element_mask(plan.row_keys, rows, layer_key, 6, 0.5)
        part = x[rows].double() @ layer.base.weight.double().T + layer.base.bias.double()
        if member.adapter is not None:
            update = dense_update(*matrices[member.adapter], scalings[member.adapter])
            part = part + (x[rows] * mask).double() @ update.T
        parts.append(part)
    theirs = torch.cat(parts)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    leaves, direction = [x, *(p for p in adapters.model.parameters() if p.requires_grad)], torch.randn(10, 4, 6)
    found = torch.autograd.grad(ours, leaves, direction)
    expected = torch.autograd.grad(theirs, leaves, direction.double())
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_the_mean_over_draws_of_input_dropout_converges_at_the_rate_of_theory() -> None:
    """Element masks: Var[y_o] = p/(1-p) Σ_i c_oi², c_oi = s (BA)_oi x_i."""
    adapters = one_layer(DROPPED_INPUT, inputs=24, outputs=8)
    bucket = adapters.layers["linear"].buckets[0]
    x = torch.randn(24, generator=torch.Generator().manual_seed(2))
    draws, steps = 32, 40
    with torch.no_grad():
        variance = (3.0 * (bucket.lora_B[0] @ bucket.lora_A[0]).double() * x.double()).square().sum(1)
        plain = adapters.model(x.view(1, 24)).double()[0]
    errors = []
    for step in range(steps):
        members = [Member(0, draw) for draw in range(draws)]
        identity, position = torch.zeros(draws, dtype=torch.int64), torch.zeros(draws, 1, dtype=torch.int64)
        plan = with_row_keys(adapters.plan(members, 1, MaskKey(0, step)), identity, position)
        with torch.no_grad(), adapters.axis.active(plan):
            errors.append(adapters.model(x.expand(draws, 24)).double().mean(0) - plain)
    measured = torch.stack(errors)
    assert float((measured.mean(0).abs() / (variance / (draws * steps)).sqrt()).max()) < 5
    assert abs(float((measured.square().mean(0) / (variance / draws)).mean()) - 1.0) < 0.3


def test_a_pooled_input_counts_as_the_first_token() -> None:
    """Encoders pool one vector per row before their last linears."""
    adapters = one_layer(DROPPED_INPUT)
    identities, positions = torch.tensor([3, 4]), torch.arange(5).repeat(2, 1)
    plan = with_row_keys(adapters.plan([Member(0, 0)], 2, MaskKey(0, 0)), identities, positions)
    x = torch.randn(2, 5, 6)
    with adapters.axis.active(plan):
        torch.testing.assert_close(adapters.model(x[:, 0]), adapters.model(x)[:, 0])
        with pytest.raises(MemberAxisError, match="2 × 5 tokens"):
            adapters.model(x[:, :3])


def test_a_draw_without_row_keys_is_refused_rather_than_left_unmasked() -> None:
    adapters = one_layer(DROPPED_INPUT)
    x = torch.randn(2, 5, 6)
    plan = adapters.plan([Member(0, 0)], 2, MaskKey(0, 0))
    with adapters.axis.active(plan), pytest.raises(MemberAxisError, match="row keys"):
        adapters.model(x)
    with adapters.axis.active(adapters.plan([Member(0)], 2, MaskKey(0, 0))):
        assert adapters.model(x).shape == (2, 5, 6)


def test_identities_of_examples_are_63_bits_and_distinct() -> None:
    identities = example_keys([f"{i}" for i in range(5000)])
    assert identities.device == CPU and identities.dtype == torch.int64
    assert int(identities.min()) >= 0 and len(np.unique(identities.numpy())) == 5000
