"""HiddenCut: statistics and rescale of its masks, what carries them, and whole models against a dense reference."""

from __future__ import annotations

import pytest
import torch
from helpers.attention_reference import Keyed
from helpers.reference import phi_z, z_score
from helpers.site_models import adapted, batch, compare_with_reference, our_logits, plan_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.masks import dropped_hidden
from pipeline.adapters.members import Member, MemberAxis, MemberAxisError, MemberPlan, RowKeys
from pipeline.adapters.sites.anatomy import down_projections
from pipeline.adapters.sites.ffn import HiddenCut, drop
from pipeline.config.method import Site

ALL = slice(None)
PATTERNS = ("element", "column", "span")


def hidden_site(pattern: str, rate: float = 0.5, compensation: str = "inverse", **options: object) -> Site:
    return Site.model_validate(
        {"position": "ffn_hidden", "pattern": pattern, "rate": rate, "compensation": compensation, **options}
    )


def row_keys(branches: list[int], examples: list[int], tokens: int, seed: int = 5) -> RowKeys:
    pairs = [(b, e) for b in branches for e in examples]
    branch, example = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    return RowKeys((seed,), branch, example, torch.arange(tokens).repeat(len(pairs), 1))


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1), layer=st.integers(0, 2**64 - 1), branch=st.integers(0, 2**31 - 1),
    example=st.integers(0, 2**63 - 1), start=st.integers(0, 2**20), rate=st.floats(0.01, 0.99),
    pattern=st.sampled_from(PATTERNS), length=st.integers(2, 9),
)
def test_hidden_masks_equal_the_integer_reference(
    seed: int, layer: int, branch: int, example: int, start: int, rate: float, pattern: str, length: int
) -> None:
    site = hidden_site(pattern, rate, span_length=length if pattern == "span" else 4)
    positions = list(range(start, start + 6))
    keys = RowKeys((seed,), torch.tensor([branch]), torch.tensor([example]), torch.tensor([positions]))
    ours = dropped_hidden(keys, ALL, layer, 5, site).expand(1, 6, 5)
    assert torch.equal(
        ours[0], Keyed(seed, layer, branch, [example] * 6, positions, rate, pattern, site.span_length).hidden(5)
    )


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_dropped_fraction_is_the_rate_along_every_axis(pattern: str, rate: float) -> None:
    """Of the independent draws - entries, (row, feature) columns, blocks of 4 tokens - within 5 standard deviations."""
    dropped = dropped_hidden(
        row_keys([0, 1, 2], list(range(40)), 64), ALL, 77, 128, hidden_site(pattern, rate)
    ).double()
    assert dropped.shape == {"element": (120, 64, 128), "column": (120, 1, 128), "span": (120, 64, 1)}[pattern]
    for axes in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        counts = dropped.sum(axes).flatten()
        trials = dropped.numel() / len(counts)
        width = 4.0 if pattern == "span" and 1 in axes else 1.0
        if trials > 30:
            assert max(abs(z_score(float(c), trials, rate)) for c in counts) < 5 * width**0.5


def test_a_span_is_whole_vectors_of_consecutive_tokens() -> None:
    """Changes along a row lie at one residue modulo the length, a different one from row to row."""
    dropped = dropped_hidden(row_keys([0], list(range(300)), 60), ALL, 3, 8, hidden_site("span", span_length=6))[..., 0]
    residues = []
    for line in dropped:
        changes = {int(t) % 6 for t in (line[1:] != line[:-1]).nonzero().flatten() + 1}
        assert len(changes) <= 1
        residues += changes
    counts = torch.bincount(torch.tensor(residues), minlength=6)
    assert len(residues) > 290 and max(abs(z_score(float(c), len(residues), 1 / 6)) for c in counts) < 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_of_layers_steps_branches_and_examples_are_independent(pattern: str) -> None:
    keys, site = row_keys([0, 1], list(range(64)), 64), hidden_site(pattern)
    stride = 4 if pattern == "span" else 1
    dropped = dropped_hidden(keys, ALL, 77, 64, site)[:, ::stride]
    halves = dropped.view(2, 64, *dropped.shape[1:])
    scores = [phi_z(halves[0], halves[1]), phi_z(halves[:, 1:], halves[:, :-1])]
    for other in (
        dropped_hidden(keys, ALL, 78, 64, site),
        dropped_hidden(row_keys([0, 1], list(range(64)), 64, 6), ALL, 77, 64, site),
    ):
        scores.append(phi_z(dropped, other[:, ::stride]))
    if pattern != "span":
        scores.append(phi_z(dropped[..., 1:], dropped[..., :-1]))
    if pattern != "column":
        scores.append(phi_z(dropped[:, 1:], dropped[:, :-1]))
    assert max(map(abs, scores)) < 5


def cut(site: Site, x: Tensor, members: list[Member], examples: Tensor) -> Tensor:
    """One row of T tokens per example and member, through a down projection that is the identity."""
    axis, size = MemberAxis(), len(members)
    rows = x.shape[0] // size
    layer = nn.Identity()
    layer.register_forward_pre_hook(HiddenCut(axis, "layers.0.mlp.down_proj", {0: site}, 13))
    branch = torch.tensor([-1 if m.draw is None else m.draw for m in members]).repeat_interleave(rows)
    keys = RowKeys((5,) * size, branch, examples.repeat(size), torch.arange(x.shape[1]).repeat(size * rows, 1))
    with axis.active(MemberPlan(tuple(members), rows, row_keys=keys)):
        return layer(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compensation", ["inverse", "none"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rescale_and_gradient(pattern: str, compensation: str, dtype: torch.dtype) -> None:
    """Kept entries × 1/(1-rate) or × 1, the gradient likewise; the mean over draws is x, or (1-rate) x."""
    site, draws = hidden_site(pattern, 0.25, compensation), 400
    x = torch.rand(draws, 8, 16, generator=torch.Generator().manual_seed(0)).add_(0.5)[:1].to(dtype)
    rows = x.expand(draws, -1, -1).clone().requires_grad_()
    y = cut(site, rows, [Member(0, draw) for draw in range(draws)], torch.tensor([3]))
    kept = 4 / 3 if compensation == "inverse" else 1.0
    ratio = (y / rows).detach().float()
    assert set(ratio.unique().tolist()) == {0.0} | set(((rows * kept) / rows).detach().float().unique().tolist())
    y.float().sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad.float(), torch.where(ratio > 0, torch.tensor(kept).to(dtype).float(), 0.0))
    deviation = kept * (0.25 * 0.75 / draws) ** 0.5
    assert float((ratio.mean(0) - 0.75 * kept).abs().max()) < 5 * deviation


def test_rows_without_a_draw_have_no_mask_and_no_factor() -> None:
    """With `none`, too: the read-out without masks is the model as it is (the paper's inference)."""
    x = torch.randn(8, 5, 16)
    for compensation in ("inverse", "none"):
        members = [Member(None), Member(0), Member(0, 1), Member(1, 1)]
        y = cut(hidden_site("element", 0.5, compensation), x, members, torch.tensor([3, 4]))
        for m in (0, 1, 3):
            assert torch.equal(y[2 * m : 2 * m + 2], x[2 * m : 2 * m + 2])
        assert 0.3 < float((y[4:6] == 0).double().mean()) < 0.7


def test_the_mask_is_not_stored_for_the_backward_pass() -> None:
    saved: list[Tensor] = []
    x = torch.randn(4, 5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = drop(x, lambda: torch.rand(4, 5, 16) < 0.5, 2.0)
    assert not saved and y.requires_grad


def test_infinite_entries_that_are_dropped_leave_no_nan() -> None:
    x = torch.full((1, 2, 4), torch.inf, requires_grad=True)
    y = drop(x, lambda: torch.ones(1, 2, 1, dtype=torch.bool), 2.0)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y)) and x.grad is not None and torch.equal(x.grad, torch.zeros_like(y))


def test_a_masked_row_without_keys_or_of_other_rows_is_refused() -> None:
    axis = MemberAxis()
    hook = HiddenCut(axis, "layers.0.mlp.down_proj", {0: hidden_site("element")}, 13)
    x = torch.randn(2, 5, 16)
    assert hook(nn.Identity(), (x,)) is None
    with axis.active(MemberPlan((Member(0, 0),), 2)), pytest.raises(MemberAxisError, match="row keys"):
        hook(nn.Identity(), (x,))
    with axis.active(MemberPlan((Member(0, 0),), 2)), pytest.raises(MemberAxisError, match="declared rows"):
        hook(nn.Identity(), (x.flatten(0, 1),))


def test_the_site_is_the_input_of_base_and_adapter_alike_adapted_or_not() -> None:
    """With and without an adapter on the down projection: the whole linear sees the masked input."""
    for targets in ("all-linear", ["q_proj"]):
        from pipeline.adapters.attach import attach
        from pipeline.adapters.spec import AdapterSpec
        from pipeline.support.sites import tiny_model

        adapters = attach(tiny_model("llama"), [AdapterSpec(sites=(hidden_site("element"),))], targets, seed=0)
        assert [type(m).__name__ for m in down_projections(adapters.model).values()] == [
            "LoRALinear" if targets == "all-linear" else "Linear"
        ] * 2
        rows = batch()
        logits = our_logits(adapters, plan_for(adapters, [Member(0), Member(0, 0)], rows, torch.tensor([1, 2])), rows)
        assert not torch.allclose(logits[0, 0], logits[1, 0])


def test_layers_by_fraction() -> None:
    adapters, _ = adapted("llama", hidden_site("element", layers=(0.5, 1.0)))
    hooks = {name: len(module._forward_pre_hooks) for name, module in down_projections(adapters.model).items()}
    assert hooks == {"model.layers.0.mlp.down_proj": 0, "model.layers.1.mlp.down_proj": 1}


CELLS = [hidden_site(pattern, 0.4, compensation) for pattern in PATTERNS for compensation in ("inverse", "none")]


def cell_name(site: Site) -> str:
    return f"{site.pattern}-{site.compensation}"


@pytest.mark.parametrize("site", [CELLS[0], CELLS[5]], ids=cell_name)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_equal_the_dense_reference(family: str, site: Site) -> None:
    """Logits and adapter gradients of four members on left-padded rows."""
    compare_with_reference(family, site)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("site", CELLS, ids=cell_name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert", "roberta"])
def test_every_family_equals_the_dense_reference(family: str, site: Site, quantization: str) -> None:
    compare_with_reference(family, site, quantization=quantization)
