"""DropKey and DropAttention: the mathematics, the masks, and what never has weight."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.attention_heads import FORMS, heads_of, model_masks, some_drops, visible_to
from helpers.attention_reference import Keyed, dense_attention
from helpers.attention_rounding import gradient_bounds, output_bound, relative_rounding
from helpers.reference import phi_z, z_score
from helpers.site_models import compare_with_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.masks import dropped_keys, dropped_pairs
from pipeline.adapters.members import Member, MemberAxis, MemberAxisError, MemberPlan, RowKeys
from pipeline.adapters.sites.attention import AttentionSites, member_attention
from pipeline.adapters.sites.attention_kernels import (
    AttentionInputs,
    column_attention,
    plain_attention,
)
from pipeline.config.method import Site

ALL = slice(None)
PATTERNS = ("column", "element", "span")
LOGITS = {pattern: Site(position="attention_logits", pattern=pattern, rate=0.5) for pattern in PATTERNS}


def row_keys(branches: list[int], examples: list[int], tokens: int, seed: int = 5) -> RowKeys:
    """Every (branch, example) pair as a row of `tokens` tokens."""
    pairs = [(b, e) for b in branches for e in examples]
    branch, example = (torch.tensor(column, dtype=torch.int64) for column in zip(*pairs, strict=True))
    return RowKeys((seed,), branch, example, torch.arange(tokens).repeat(len(pairs), 1))


def pair_mask(keys: RowKeys, layer: int, heads: int, site: Site) -> Tensor:
    """(B, H, Tq or 1, Tk)."""
    if site.pattern == "column":
        return dropped_keys(keys, ALL, layer, heads, site).unsqueeze(2)
    return dropped_pairs(keys, ALL, layer, heads, site)


# --- the mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", model_masks())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_form_equals_the_dense_reference(form: str, mask: str, groups: int) -> None:
    """Forward and gradients, float64 reference query by query; queries with nothing left are as exact as all others."""
    heads = heads_of(groups=groups, mask=model_masks()[mask])
    leaves = [x.requires_grad_() for x in (heads.query, heads.key, heads.value)]
    dropped, seen = some_drops(heads, columns=form == "column"), visible_to(heads)
    assert bool((seen.any(-1) & ~(seen & ~dropped).any(-1)).any()), "no query lost all it sees"
    ours = FORMS[form](heads, dropped)
    stopped = form == "plain weights"
    theirs = dense_attention(*leaves, heads.scale, seen, **{"weights" if stopped else "logits": dropped})
    sighted = seen.any(-1)
    bound = output_bound(*leaves, heads.scale, seen, dropped)
    assert float(bound[sighted].max()) < 1e-4
    assert bool(((ours - theirs).abs() <= bound)[sighted].all())
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5)) * sighted.unsqueeze(-1)
    got = torch.autograd.grad(ours, leaves, direction)
    wanted = torch.autograd.grad(theirs, leaves, direction.double())
    bounds = gradient_bounds(*leaves, heads.scale, seen, dropped, direction, stopped)
    for name, ours_, theirs_, most in zip("qkv", got, wanted, bounds, strict=True):
        assert bool(((ours_ - theirs_).abs() <= most).all()), f"{name}: {float((ours_ - theirs_).abs().max()):.1e}"


def test_dropkey_is_dropattention_without_stop_gradient_and_differs_with_it_as_the_paper_says() -> None:
    """s = q (keys are unit vectors), p the kept weights ÷ their sum, w the whole softmax, g = dL/dp:

    DropKey and no stop-gradient: dL/ds_i = p_i (g_i - Σ_j g_j p_j), 0 for dropped logits.
    Stop-gradient:                dL/ds_i = p_i g_i - w_i Σ_j g_j p_j, so dropped logits get -w_i Σ_j g_j p_j.
    """
    tokens = 6
    q = torch.randn(
        1, 1, tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    v = torch.randn(1, 1, tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    heads = AttentionInputs(q, torch.eye(tokens, dtype=torch.float64)[None, None], v, None, 1.0, False)
    dropped = torch.rand(1, 1, tokens, tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    assert bool((~dropped).any(-1).all())
    direction = torch.randn(1, 1, tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    seen = torch.ones_like(dropped)
    dropkey, stopped = plain_attention(heads, dropped_logits=dropped), plain_attention(heads, dropped_weights=dropped)
    free = dense_attention(q, heads.key, v, 1.0, seen, weights=dropped, stop_gradient=False)
    torch.testing.assert_close(dropkey, free, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dropkey, stopped, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(y, q, direction, retain_graph=True)[0] for y in (dropkey, free, stopped)]
    p = torch.softmax(q.detach().masked_fill(dropped, -math.inf), -1)
    w, g = torch.softmax(q.detach(), -1), direction @ v.transpose(-1, -2)
    mean = (g * p).sum(-1, keepdim=True)
    torch.testing.assert_close(gradients[0], p * (g - mean), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[2], p * g - w * mean, rtol=1e-12, atol=1e-12)
    assert bool((gradients[0][dropped] == 0).all())
    torch.testing.assert_close(gradients[2][dropped], (-w * mean)[dropped], rtol=1e-12, atol=1e-12)
    assert float(gradients[2][dropped].abs().min()) > 0


def test_dropattention_survives_kept_weights_that_underflow() -> None:
    """Only keys 300 below the maximum are kept: 0/0 where the equation is taken literally in float32."""
    heads = heads_of(tokens=4, size=4, groups=1, causal=False, scale=1.0)
    key = torch.zeros_like(heads.key)
    key[:, :, 0] = 300.0
    heads = AttentionInputs(torch.ones_like(heads.query).requires_grad_(), key, heads.value, None, 1.0, False)
    dropped = torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    dropped[..., 0] = True
    out = plain_attention(heads, dropped_weights=dropped)
    torch.testing.assert_close(out, heads.value[:, :, 1:].mean(2, keepdim=True).expand_as(out))
    out.sum().backward()
    assert heads.query.grad is not None and bool(heads.query.grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("scale", [None, 1.0, 1.0 / (8 * 24)])
def test_the_extra_dimension_costs_no_precision(dtype: torch.dtype, size: int, scale: float | None) -> None:
    """In every dtype within the rounding of a kernel without masks, also where all visible keys are dropped."""
    heads = heads_of(tokens=24, size=size, groups=1, dtype=dtype, scale=scale)
    dropped, seen = some_drops(heads, columns=True), visible_to(heads)
    ours = column_attention(heads, dropped[:, :, 0]).double()
    theirs = dense_attention(heads.query, heads.key, heads.value, heads.scale, seen, logits=dropped)
    lost = ~(seen & ~dropped).any(-1)
    assert bool(lost.any()) and bool((~lost).any())
    bound = output_bound(heads.query, heads.key, heads.value, heads.scale, seen, dropped)
    assert bool(((ours - theirs).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", model_masks())
def test_a_query_without_kept_keys_attends_as_if_none_were_dropped_bit_for_bit(mask: str, dtype: torch.dtype) -> None:
    """Packed rows and padding among the masks: the same kernel on the same numbers, whatever others have left."""
    heads = heads_of(mask=model_masks(dtype=dtype)[mask], dtype=dtype, groups=1)
    dropped, seen = some_drops(heads, columns=True), visible_to(heads)
    lost = seen.any(-1) & ~(seen & ~dropped).any(-1)
    assert bool(lost.any()) and not bool(lost.all())
    plainly = column_attention(heads, torch.zeros_like(dropped[:, :, 0]))
    assert torch.equal(column_attention(heads, dropped[:, :, 0])[lost], plainly[lost])
    everywhere = seen.any(-1)
    nothing_kept = column_attention(heads, torch.ones_like(dropped[:, :, 0]))
    assert torch.equal(nothing_kept[everywhere], plainly[everywhere])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 100.0, 6000.0])
def test_dropped_keys_have_weight_0_whatever_the_logits(spread: float, dtype: torch.dtype) -> None:
    """Dropped keys stand above the kept ones by the whole spread and hold a huge value: no bit of it arrives."""
    heads = heads_of(tokens=40, groups=1, dtype=dtype, causal=False, scale=1.0)
    query, key = torch.zeros_like(heads.query), torch.zeros_like(heads.key)
    query[..., 0] = 8.0
    key[..., 0] = torch.linspace(0, spread / 8, 40).to(dtype)
    dropped = torch.zeros(2, 4, 40, dtype=torch.bool)
    dropped[:, :, 20:] = True
    value = heads.value.clone()
    value[:, :, 20:] = 1e4
    value.requires_grad_()
    out = column_attention(AttentionInputs(query, key, value, None, 1.0, False), dropped)
    blank = heads.value.clone()
    blank[:, :, 20:] = 0.0
    assert torch.equal(out, column_attention(AttentionInputs(query, key, blank, None, 1.0, False), dropped))
    out.sum().backward()
    assert value.grad is not None and not bool(value.grad[:, :, 20:].any()) and bool(value.grad[:, :, 19].all())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads_per_group", [1, 2])
def test_column_masks_run_on_the_flash_kernel_alone(heads_per_group: int, dtype: torch.dtype, device: str) -> None:
    """Every other backend is switched off: causal, forward and backward, against float64."""
    if device == "cuda" and (not torch.cuda.is_available() or dtype == torch.float32):
        pytest.skip("needs an accelerator, whose flash kernels are 16-bit")
    heads = heads_of(tokens=40, size=64, groups=heads_per_group, dtype=dtype)
    leaves = [x.to(device).detach().requires_grad_() for x in (heads.query, heads.key, heads.value)]
    on_device = AttentionInputs(*leaves, None, heads.scale, True)
    dropped, seen = some_drops(heads, columns=True), visible_to(heads)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        ours = column_attention(on_device, dropped[:, :, 0].to(device))
        ours.float().square().sum().backward()
    theirs = dense_attention(heads.query, heads.key, heads.value, heads.scale, seen, logits=dropped)
    bound = output_bound(heads.query, heads.key, heads.value, heads.scale, seen, dropped)
    assert bool(((ours.detach().double().cpu() - theirs).abs() <= bound).all())
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) and bool(x.grad.any()) for x in leaves)


# --- what never has weight -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", model_masks())
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_hidden_keys_have_no_weight_and_no_gradient(form: str, mask: str, rate: float) -> None:
    """Future, padded, foreign keys take any value, also where all visible ones are dropped: same bits, gradient 0."""
    heads = heads_of(mask=model_masks()[mask], groups=1)
    seen = visible_to(heads)
    dropped = some_drops(heads, rate, columns=form == "column")
    out = FORMS[form](heads, dropped)
    for query in range(7):
        hidden = ~seen[0, 0, query]
        if bool(hidden.all()):
            continue
        key, value = heads.key.clone(), heads.value.clone()
        key[:, :, hidden] = 30 * heads.query[:, :, query, None, :]  # the most attractive keys there could be
        value[:, :, hidden] = 1e30
        value.requires_grad_()
        changed = FORMS[form](AttentionInputs(heads.query, key, value, heads.mask, heads.scale, heads.causal), dropped)
        assert torch.equal(changed[:, :, query], out[:, :, query]), f"query {query}"
        changed[:, :, query].sum().backward()
        assert value.grad is not None and bool((value.grad[:, :, hidden] == 0).all())
        assert bool((value.grad[:, :, ~hidden].abs().sum((2, 3)) > 0).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bool", "min", "-inf"])
def test_a_query_that_sees_nothing_at_all_makes_no_nan(form: str, kind: str) -> None:
    """Queries on left padding see no key: whatever comes out, it is finite, and so are the gradients."""
    blind = (torch.ones(7, 7, dtype=torch.bool).tril() & (torch.arange(7) >= 3))[None, None]
    low = torch.finfo(torch.float32).min if kind == "min" else -math.inf
    mask = blind if kind == "bool" else torch.zeros(1, 1, 7, 7).masked_fill(~blind, low)
    heads = heads_of(mask=mask)
    leaves = [x.requires_grad_() for x in (heads.query, heads.key, heads.value)]
    out = FORMS[form](heads, some_drops(heads, 0.9, columns=form == "column"))
    assert bool(out.isfinite().all())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.square().sum(), leaves))


def test_a_dropped_column_is_dropped_for_all_queries_of_its_head_alone() -> None:
    heads = heads_of(causal=False, groups=1)
    dropped = torch.zeros(2, 4, 7, dtype=torch.bool)
    dropped[0, 1, 3] = True
    out = column_attention(heads, dropped)
    key, value = heads.key.clone(), heads.value.clone()
    key[:, :, 3], value[:, :, 3] = 9.0, 1e6
    changed = column_attention(AttentionInputs(heads.query, key, value, None, heads.scale, False), dropped)
    same = (changed == out).all(-1).all(-1)
    assert bool(same[0, 1]) and int(same.sum()) == 1
    assert bool((changed != out).any(-1)[~same].all())


# --- the masks -------------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**64 - 1), layer=st.integers(0, 2**64 - 1), branch=st.integers(0, 2**31 - 1),
    example=st.integers(0, 2**63 - 1), start=st.integers(0, 2**20), rate=st.floats(0.01, 0.99),
    pattern=st.sampled_from(PATTERNS), length=st.integers(2, 9),
)
def test_attention_masks_equal_the_integer_reference(
    seed: int, layer: int, branch: int, example: int, start: int, rate: float, pattern: str, length: int
) -> None:
    site = Site(position="attention_logits", pattern=pattern, rate=rate, span_length=length if pattern == "span" else 4)
    positions = list(range(start, start + 6))
    keys = RowKeys((seed,), torch.tensor([branch]), torch.tensor([example]), torch.tensor([positions]))
    ours = pair_mask(keys, layer, 3, site).expand(1, 3, 6, 6)
    theirs = Keyed(seed, layer, branch, [example] * 6, positions, rate, pattern, site.span_length).pairs(3)
    assert torch.equal(ours[0], theirs)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_dropped_fraction_is_the_rate_along_every_axis(pattern: str, rate: float) -> None:
    """Per row, head, query and key, within 5 standard deviations (of whole blocks, where blocks are dropped)."""
    site = Site(position="attention_logits", pattern=pattern, rate=rate)
    dropped = pair_mask(row_keys([0, 1], list(range(12)), 64), 77, 8, site)
    width = site.span_length if pattern == "span" else 1
    for axes in [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]:
        counts = dropped.double().sum(axes).flatten()
        trials = dropped.numel() / len(counts)
        independent = width if 3 in axes else 1  # a key's own entries, one per line, are never of one block
        assert max(abs(z_score(float(c), trials, rate)) for c in counts) < 5 * independent**0.5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_masks_are_independent_along_every_axis(pattern: str) -> None:
    """Neighbouring heads, queries, keys (blocks), examples, branches; layers and steps."""
    site = LOGITS[pattern]
    keys = row_keys([0, 1], list(range(10)), 48)
    dropped = pair_mask(keys, 77, 8, site)
    stride = site.span_length if pattern == "span" else 1
    thinned = dropped[..., ::stride]  # one entry of every block
    scores = []
    for axis in range(4):
        for lag in (1, 2, 4):
            if lag < thinned.shape[axis]:
                size = thinned.shape[axis] - lag
                scores.append(phi_z(thinned.narrow(axis, 0, size), thinned.narrow(axis, lag, size)))
    for other in (pair_mask(keys, 78, 8, site), pair_mask(row_keys([0, 1], list(range(10)), 48, 6), 77, 8, site)):
        scores.append(phi_z(thinned, other[..., ::stride]))
    assert len(scores) > 10 and max(map(abs, scores)) < 5


def test_spans_are_whole_blocks_at_offsets_that_vary() -> None:
    """Along the keys of a query, changes between dropped and kept happen at one residue modulo the length."""
    site = Site(position="attention_logits", pattern="span", rate=0.5, span_length=5)
    dropped = dropped_pairs(row_keys([0], list(range(4)), 60), ALL, 3, 4, site).reshape(-1, 60)
    residues = []
    for line in dropped:
        changes = {int(t) % 5 for t in (line[1:] != line[:-1]).nonzero().flatten() + 1}
        assert len(changes) <= 1
        residues += changes
    counts = torch.bincount(torch.tensor(residues), minlength=5)
    assert len(residues) > 900 and max(abs(z_score(float(c), len(residues), 0.2)) for c in counts) < 5


# --- which rows are masked -------------------------------------------------------------------------------------------


def attention_module(
    axis: MemberAxis, sites: dict[int, tuple[tuple[Site, int], ...]], plain: bool = False
) -> nn.Module:
    """A stand-in for a model's attention module."""
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2  # type: ignore[assignment]
    module.loradrop_sites = AttentionSites(axis, "layers.0.self_attn", plain, sites)  # type: ignore[assignment]
    return module


def run(members: list[Member], sites: dict[int, tuple[tuple[Site, int], ...]], plain: bool = False) -> Tensor:
    """(M, B, T, H, D), every member on the same two rows."""
    axis, one = MemberAxis(), heads_of()
    size = len(members)
    branch = torch.tensor([-1 if m.draw is None else m.draw for m in members]).repeat_interleave(2)
    keys = RowKeys((5,) * size, branch, torch.tensor([3, 4]).repeat(size), torch.arange(7).repeat(2 * size, 1))
    q, k, v = (x.repeat(size, 1, 1, 1) for x in (one.query, one.key, one.value))
    with axis.active(MemberPlan(tuple(members), 2, row_keys=keys)):
        out, _ = member_attention(attention_module(axis, sites, plain), q, k, v, None, scaling=one.scale)
    return out.view(size, 2, *out.shape[1:])


SITES = {
    "dropkey": ((LOGITS["column"], 101),),
    "elements": ((LOGITS["element"], 102),),
    "dropattention": ((Site(position="attention_weights", pattern="column", rate=0.4), 103),),
    "kv": ((Site(position="attention_logits", pattern="column", rate=0.4, heads="kv"), 104),),
    "both": ((LOGITS["span"], 105), (Site(position="attention_weights", pattern="element", rate=0.3), 106)),
}


def expected(member: Member, sites: dict[int, tuple[tuple[Site, int], ...]]) -> Tensor:
    """(B, T, H, D) of one member, dense."""
    one = heads_of()
    drops: dict[str, Tensor] = {}
    for site, key in sites.get(member.adapter, ()) if member.draw is not None else ():  # type: ignore[arg-type]
        heads = 4 if site.heads == "query" else 2
        mask = torch.stack([
            Keyed(5, key, member.draw, [e] * 7, range(7), site.rate, site.pattern, site.span_length).pairs(heads)  # type: ignore[arg-type]
            for e in (3, 4)
        ])
        drops["logits" if site.position == "attention_logits" else "weights"] = mask.repeat_interleave(4 // heads, 1)
    return dense_attention(one.query, one.key, one.value, one.scale, visible_to(one), **drops).transpose(1, 2)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("together", [("dropkey",), ("kv",), ("dropkey", "kv"), ("dropkey", "elements"), tuple(SITES)])
def test_adapters_with_different_sites_share_a_pass(together: tuple[str, ...], plain: bool) -> None:
    """Each member as its own reference has it, whatever the others drop; rows without a draw are not masked."""
    sites = {k: SITES[name] for k, name in enumerate(together)}
    members = [Member(None), Member(0), *(Member(k, draw) for k in sites for draw in (0, 2)), Member(len(sites), 1)]
    ours, one = run(members, sites, plain), heads_of()
    most = relative_rounding(one.query, one.key, one.scale) * float(one.value.abs().max())
    assert most < 1e-4
    for m, member in enumerate(members):
        torch.testing.assert_close(ours[m].double(), expected(member, sites), rtol=0.0, atol=most)
    plainly = expected(Member(None), {})
    for m in (0, 1, len(members) - 1):
        torch.testing.assert_close(ours[m].double(), plainly, rtol=0.0, atol=most)


def test_without_stop_gradient_the_fused_kernels_serve_dropattention(monkeypatch: pytest.MonkeyPatch) -> None:
    free = Site(position="attention_weights", pattern="column", rate=0.5, stop_gradient=False)
    ours = "pipeline.adapters.sites.attention"
    monkeypatch.setattr(f"{ours}.plain_attention", lambda *_: pytest.fail("the unfused form ran"))
    monkeypatch.setattr(f"{ours}.pair_attention", lambda *_: pytest.fail("a mask was built"))
    same_key = run([Member(0, 1)], {0: ((free, 9),)})
    assert torch.equal(same_key, run([Member(0, 1)], {0: ((LOGITS["column"], 9),)}))


@pytest.mark.usefixtures("stock_attention")
def test_column_masks_keep_the_causal_flag_and_build_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flash kernels take no mask: what they get must be (q', k', v', is_causal), widths a multiple of 8."""
    seen: list[dict[str, object]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(*tensors: Tensor, **settings: object) -> Tensor:
        seen.append({**settings, "widths": {x.shape[-1] for x in tensors}, "heads": tensors[1].shape[1]})
        return real(*tensors, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watch)
    run([Member(0, 1)], {0: SITES["dropkey"]})
    run([Member(0, 1)], {0: SITES["kv"]})
    for call, heads in zip(seen, (4, 2), strict=True):
        assert call["attn_mask"] is None and call["is_causal"] is True and call["widths"] == {16}
        assert call["heads"] == heads and call["enable_gqa"] is (heads == 2)


def test_a_masked_row_without_keys_or_with_a_cache_is_refused() -> None:
    axis, one = MemberAxis(), heads_of()
    module = attention_module(axis, {0: SITES["dropkey"]})
    plan = MemberPlan((Member(0, 0),), 2)
    with axis.active(plan), pytest.raises(MemberAxisError, match="row keys"):
        member_attention(module, one.query, one.key, one.value, None)
    with axis.active(plan), pytest.raises(MemberAxisError, match="cache"):
        member_attention(module, one.query[:, :, -1:], one.key, one.value, None)
    with axis.active(plan), pytest.raises(MemberAxisError, match="declared rows"):
        member_attention(module, one.query[:1], one.key[:1], one.value[:1], None)


def test_terms_of_the_logits_that_are_not_computed_are_refused_by_name() -> None:
    from pipeline.errors import ConfigError

    axis, one = MemberAxis(), heads_of()
    module = attention_module(axis, {0: SITES["dropkey"]}, plain=True)
    for term, what in (("softcap", "soft cap"), ("s_aux", "sinks"), ("position_bias", "position bias")):
        with pytest.raises(ConfigError, match=what):
            member_attention(module, one.query, one.key, one.value, None, **{term: 1.0})


@pytest.mark.usefixtures("stock_attention")
def test_without_sites_or_plan_the_attention_is_the_stock_one_bit_for_bit() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    one = heads_of()
    stock = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    wanted, _ = sdpa_attention_forward(stock, one.query, one.key, one.value, None, scaling=one.scale)  # type: ignore[arg-type]
    module = attention_module(MemberAxis(), {0: SITES["dropkey"]})
    assert torch.equal(member_attention(module, one.query, one.key, one.value, None, scaling=one.scale)[0], wanted)
    assert torch.equal(run([Member(0), Member(None)], {0: SITES["dropkey"]})[1], wanted)


# --- whole models ----------------------------------------------------------------------------------------------------

CELLS = [
    Site(position=position, pattern=pattern, rate=0.4, stop_gradient=stop)  # type: ignore[arg-type]
    for position, stop in (("attention_logits", True), ("attention_weights", True), ("attention_weights", False))
    for pattern in PATTERNS
]


def cell_name(site: Site) -> str:
    return f"{site.position}-{site.pattern}" + ("" if site.stop_gradient else "-free")


@pytest.mark.parametrize("site", [CELLS[0], CELLS[4]], ids=cell_name)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_models_equal_the_dense_reference(family: str, site: Site) -> None:
    """Logits and adapter gradients of four members on left-padded rows."""
    compare_with_reference(family, site)


def test_masks_per_key_value_head_and_per_layer_equal_the_dense_reference() -> None:
    compare_with_reference("llama", Site(position="attention_logits", rate=0.4, heads="kv", layers=(0.5, 1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("site", CELLS, ids=cell_name)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert", "roberta"])
def test_every_family_equals_the_dense_reference(family: str, site: Site, quantization: str, attention: str) -> None:
    compare_with_reference(family, site, quantization=quantization, attention=attention)
