"""Attention of short rows, written out: the dense attention, and PyTorch's own, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.adapters.sites.attention import member_attention
from pipeline.adapters.sites.short_attention import LONGEST, is_short, short_attention

T = 7


def masks(dtype: torch.dtype) -> dict[str, Tensor | None]:
    """None, and bool and additive ones: left padding (a query that sees nothing), one per head, one for all rows."""
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    padded = (torch.arange(T) >= torch.tensor([[0], [2], [T]]))[:, None, None] & causal
    by_head = padded & (torch.rand(3, 6, T, T, generator=torch.Generator().manual_seed(4)) < 0.6)
    additive = {
        name: torch.zeros(padded.shape, dtype=dtype).masked_fill(~padded, low)
        for name, low in (("-inf", -math.inf), ("min", torch.finfo(dtype).min))
    }
    bias = torch.randn(1, 6, T, T, generator=torch.Generator().manual_seed(5)).to(dtype)
    shared = causal[None, None]
    return {"none": None, "padded": padded, "by head": by_head, "one for all": shared, "bias": bias, **additive}


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """In float64, from the definition; a query that sees nothing gives 0."""
    logits = 0.4 * q @ k.mT
    if mask is None:
        mask = torch.ones(T, T, dtype=torch.bool).tril() if causal else torch.ones(T, T, dtype=torch.bool)
    if mask.dtype != torch.bool:
        logits, mask = logits + mask.double().clamp_min(-1e300), mask != -math.inf
    weights = torch.where(mask, logits, -1e300).softmax(-1) * mask
    return weights @ v


@pytest.mark.parametrize("mask", ["none", "padded", "by head", "one for all", "-inf"])
def test_it_is_what_pytorch_s_own_computes(mask: str) -> None:
    """Forward and backward. (Where a finite mask hides all from a query, PyTorch's gradient is of other weights.)"""
    q, k, v = (torch.randn(3, 6, T, 8, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(3))
    given = masks(torch.float32)[mask]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=0.4, is_causal=given is None)
    ours = short_attention(q, k, v, given, 0.4, given is None)
    torch.testing.assert_close(ours, out)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, out)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", masks(torch.float32))
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_dense_attention_forward_and_backward(mask: str, groups: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, T, h, 8, generator=random).to(dtype).transpose(1, 2) for h in (6, groups, groups))
    direction = torch.randn(3, 6, T, 8, generator=random).to(dtype)
    given = masks(dtype)[mask]
    for causal in (True, False) if given is None else (False,):
        ours = [x.clone().requires_grad_() for x in (q, k, v)]
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out = short_attention(*ours, given, 0.4, causal)
        wide = [exact[0], *(x.repeat_interleave(6 // groups, dim=1) for x in exact[1:])]
        theirs = dense(*wide, given, causal)
        found = (out, *torch.autograd.grad(out, ours, direction))
        wanted = (theirs, *torch.autograd.grad(theirs, exact, direction.double()))
        for one, other in zip(found, wanted, strict=True):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
            assert one.dtype == dtype and one.shape == other.shape
            assert float((one.double() - other).detach().abs().max()) <= tolerance * float(other.detach().abs().max())


def test_logits_are_not_rounded_to_sixteen_bits() -> None:
    """Two keys whose logits, 64.1 and 64, are one number in bfloat16."""
    query = torch.tensor([1.0, 0.1]).bfloat16().view(1, 1, 1, 2).expand(1, 1, 2, 2)
    key = torch.tensor([[64.0, 1.0], [64.0, 0.0]]).bfloat16().view(1, 1, 2, 2)
    value = torch.tensor([[1.0], [0.0]]).bfloat16().view(1, 1, 2, 1)
    out = short_attention(query, key, value, None, 1.0, False)
    assert float(out[0, 0, 0, 0]) == pytest.approx(torch.sigmoid(torch.tensor(0.1)).item(), abs=2e-3)


def test_it_is_for_whole_short_sequences_on_a_cpu() -> None:
    assert set(LONGEST) == {torch.float32, torch.bfloat16}
    for dtype, longest in LONGEST.items():
        q = torch.zeros(1, 1, longest, 8, dtype=dtype)
        assert is_short(q, q) and not is_short(q[:, :, -1:], q) and not is_short(q.half(), q.half())
        assert not is_short(q.to("meta"), q.to("meta"))
        longer = torch.zeros(1, 1, longest + 1, 8, dtype=dtype)
        assert not is_short(longer, longer)


def test_terms_that_it_does_not_know_go_to_the_stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []

    def stock(*_: object, **settings: object) -> tuple[None, None]:
        calls.append(settings)
        return None, None

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", stock)
    module, x = torch.nn.Module(), torch.zeros(1, 2, T, 8)
    assert member_attention(module, x, x, x, None)[0].shape == (1, T, 2, 8) and not calls
    for other in ({"softcap": 1.0}, {"s_aux": x}, {"position_bias": x}, {"cache": x}, {"dropout": 0.1}):
        member_attention(module, x, x, x, None, **other)  # type: ignore[arg-type]
    member_attention(module, x[:, :, -1:], x, x, None)
    assert len(calls) == 6
