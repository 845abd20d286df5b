"""The adapted linear as one function: the plain path's results, and those of a dense float64 reference."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from helpers.families import LORA_DROPOUT, assert_close_gradients, load_tiny, trained_start
from helpers.layers import (
    MIXED,
    RANK,
    TOLERANCE,
    dense_results,
    hosted,
    results,
    rows_of,
    unequal_members,
)
from torch import Tensor, nn

import pipeline.adapters.fused
import pipeline.adapters.linear
from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.fused import Matrices, Stack, Users, _blocks, adapted_linear, fuses
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_output_and_gradients_are_those_of_the_plain_path(count: int, dtype: torch.dtype) -> None:
    """Masked beside unmasked members and bare ones, two adapters of one stack, two ranks: in every mix of so many."""
    adapters = hosted(dtype)
    for shift in range(0, len(MIXED), 3):
        members = tuple(MIXED[(shift + m) % len(MIXED)] for m in range(count))
        x = rows_of(count, dtype=dtype)
        plain, fused = (results(adapters, members, x, one) for one in (False, True))
        wanted = {name: dtype if name in "xy" else torch.float32 for name in plain}
        assert {name: value.dtype for name, value in fused.items()} == wanted
        assert_close_gradients(fused, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("members", [MIXED, (Member(0),) * 3, (Member(0, 0), Member(0, 1)), (Member(1), Member(0))])
def test_output_and_gradients_are_those_of_the_dense_reference(members: tuple[Member, ...]) -> None:
    adapters = hosted()
    x = rows_of(len(members), 2)
    assert_close_gradients(results(adapters, members, x, True), dense_results(adapters, members, x))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_members_may_have_any_number_of_tokens(dtype: torch.dtype) -> None:
    """Runs of equal and other lengths, gaps, members without a token, entries dropped: each in float64 by itself."""
    for _, ours, theirs in unequal_members(dtype):
        assert_close_gradients(ours, theirs, TOLERANCE[dtype])


def model_results(adapters: Adapters, layout: object, checkpointing: bool) -> dict[str, Tensor]:
    from helpers.families import examples, gradients

    from pipeline.loss.objective import SupervisedLM
    from pipeline.training.batch import lay_out

    adapters.model.train()
    if checkpointing:
        adapters.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    rows = lay_out(adapters, examples([7, 5, 9, 6]), layout, 2, MaskKey(1, 0))  # type: ignore[arg-type]
    with adapters.axis.active(rows.plan):
        loss = SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights)
        loss.backward()
    return {"loss": loss.detach(), **gradients(adapters)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "nf4", "bf16"])
def test_a_model_trains_as_on_the_plain_path(precision: str, checkpointing: bool, tmp_path: Path) -> None:
    found = []
    for fused in (True, False):
        spec = AdapterSpec(rank=4, sites=(*LORA_DROPOUT, RANK))
        adapters = trained_start(attach(load_tiny(tmp_path, "llama", precision), [spec], "all-linear", seed=0))
        for layer in adapters.layers.values():
            layer.fused = fused
        found.append(model_results(adapters, split_layout(range(4), 3), checkpointing))
    assert_close_gradients(*found, tolerance=0.05 if precision == "bf16" else 1e-5)


def test_the_first_layer_s_input_gets_no_gradient_and_needs_none() -> None:
    adapters = hosted()
    with adapters.axis.active(adapters.plan([Member(0, 0)], 3, MaskKey(0, 0))):
        adapters.model(rows_of(1)).sum().backward()
    assert adapters.layers["linear"].buckets[0].lora_B.grad is not None


def watch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many updates each call of the one function had."""
    calls: list[int] = []

    def counted(x: Tensor, base: nn.Module, updates: list[tuple[Stack, Matrices]]) -> Tensor:
        calls.append(len(updates))
        return adapted_linear(x, base, updates)

    monkeypatch.setattr(pipeline.adapters.linear, "adapted_linear", counted)
    return calls


def test_prediction_uses_it_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, adapters = watch(monkeypatch), hosted()
    with torch.no_grad(), adapters.axis.active(adapters.plan(MIXED, 3, MaskKey(0, "test"))):
        assert not adapters.model(rows_of(len(MIXED))).requires_grad
    assert calls == [2]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("positions", [("lora_input",), ("lora_rank",), ("lora_input", "lora_rank")])
def test_what_is_dropped_token_by_token_is_what_the_plain_path_drops(
    positions: tuple[Literal["lora_input", "lora_rank"], ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside other rates, other ranks, weight masks, members without a draw and bare ones; padded and pooled rows."""
    by_token = [
        tuple(Site(position=one, rate=rate, pattern="element") for one in positions) for rate in (0.4, 0.7)
    ]
    specs = (
        AdapterSpec(rank=4, sites=(*LORA_DROPOUT, *by_token[0])), AdapterSpec(rank=4, sites=by_token[1]),
        AdapterSpec(rank=2, sites=by_token[0]),
    )
    adapters, calls = hosted(dtype, specs), watch(monkeypatch)
    for members in (MIXED, (Member(1, 0), Member(1, 1)), (Member(0, 1), Member(2, 0), Member(0, 0))):
        for tokens in (5, 1):
            x = rows_of(len(members), tokens=tokens, dtype=dtype)
            found = [results(adapters, members, x, fused, torch.arange(5).repeat(3, 1)) for fused in (True, False)]
            assert_close_gradients(*found, TOLERANCE[dtype])
    assert len(calls) == 6


@pytest.mark.parametrize("position", ["lora_input", "lora_rank"])
def test_a_model_drops_token_by_token_as_on_the_plain_path(position: str, tmp_path: Path) -> None:
    """Padded rows, rows laid end to end, several draws; recomputed activations."""
    site = Site(position=position, rate=0.4, pattern="element")  # type: ignore[arg-type]
    for checkpointing in (False, True):
        found = []
        for fused, end_to_end in ((True, False), (False, False), (True, True), (False, True)):
            spec = AdapterSpec(rank=4, sites=(*LORA_DROPOUT, site))
            adapters = trained_start(attach(load_tiny(tmp_path, "llama", "fp32"), [spec], "all-linear", seed=0))
            if end_to_end:
                assert adapters.set_end_to_end("sdpa", 9) is None
            for layer in adapters.layers.values():
                layer.fused = fused
            found.append(model_results(adapters, split_layout(range(4), 3), checkpointing))
        for other in found[1:]:
            assert_close_gradients(found[0], other)


def test_what_is_not_known_takes_the_plain_path(tmp_path: Path) -> None:
    """8-bit and transposed linears, a forward of its own, inputs of another dtype; a 4-bit layer is known."""
    x, linear = torch.zeros(2, 64), nn.Linear(64, 64)
    assert fuses(linear, x) and not fuses(linear, x.bfloat16())
    linear.forward = lambda x: x  # type: ignore[method-assign]
    assert not fuses(linear, x)
    for precision, family, known in (("nf4", "llama", True), ("int8", "llama", False), ("fp32", "gpt2", False)):
        model = load_tiny(tmp_path / precision, family, precision)
        name = "transformer.h.0.attn.c_attn" if family == "gpt2" else "model.layers.0.self_attn.q_proj"
        assert fuses(model.get_submodule(name), x) is known, precision
        assert not (known and fuses(model.get_submodule(name), x.bfloat16()))


def test_nothing_of_the_size_of_the_output_is_made_beside_it() -> None:
    """Forward and backward write y and dx once: no second tensor of their size appears on the way."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[tuple[str, int]] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() >= 24 * 50 * 9 and not func.is_view and "_." not in str(func):
                made.append((str(func), out.numel()))
            return out

    adapters, x = hosted(), torch.randn(24, 50, 12).requires_grad_()
    with adapters.axis.active(adapters.plan(MIXED, 3, MaskKey(0, 0))):
        with Sizes():
            y = adapters.model(x)
        seed = torch.ones_like(y)
        with Sizes():
            torch.autograd.grad(y, x, seed)
    assert [size for _, size in made] == [24 * 50 * 9, 24 * 50 * 12], made


def test_the_key_adapter_fused_switches_every_layer(tiny_folder: Path) -> None:
    from pipeline.adapters.build import attach_adapter
    from pipeline.config import AdapterConfig
    from pipeline.config.model import ModelConfig
    from pipeline.model.load import load_skeleton

    model = ModelConfig(path=str(tiny_folder / "model"), quantization="none")
    for fused in (True, False):
        adapters = attach_adapter(AdapterConfig(fused=fused), load_skeleton(model), 1, 0)
        assert {layer.fused for layer in adapters.layers.values()} == {fused}


UNEQUAL = ((0, 3), (3, 8), (8, 10), (10, 11), (11, 17), (17, 18), (18, 20), (20, 22))
"""Four draws of one run and four of another, of eleven tokens each."""


def test_unequal_draws_of_a_run_are_one_product_and_equal_runs_one_batch() -> None:
    device = torch.device("cpu")
    (block,) = _blocks(UNEQUAL, (0,) * 4 + (1,) * 4, False, 3, device)
    assert block.batches == 2 and block.tokens == slice(0, 22) and block.members == slice(0, 8)
    assert block.others is not None and block.others.shape == (2, 11, 12)
    assert torch.equal((~block.others).sum(-1), torch.full((2, 11), 3))  # of every token R columns are its own
    first_of_second_member = block.others[0, 3]
    assert (~first_of_second_member).nonzero().flatten().tolist() == [3, 4, 5]
    assert len(_blocks(UNEQUAL, (0, 1) * 4, False, 3, device)) == 7  # other adapters are never stacked: two are alike
    assert [b.batches for b in _blocks(((0, 4), (4, 8), (8, 11)), (0, 1, 2), False, 3, device)] == [2, 1]
    assert len(_blocks(UNEQUAL, (0,) * 8, False, 3000, device)) == 7  # too much arithmetic
    assert len(_blocks(UNEQUAL, (0,) * 8, True, 3000, device)) == 1


def stacked_results(slots: tuple[int, ...], A: Tensor, B: Tensor) -> list[Tensor]:
    chance = torch.Generator().manual_seed(3)
    base = nn.Linear(12, 9).requires_grad_(False)
    nn.init.ones_(base.weight), nn.init.zeros_(base.bias)
    leaves = [A.clone().requires_grad_(), B.clone().requires_grad_()]
    x = torch.randn(22, 12, generator=chance).requires_grad_()
    masks = [torch.rand(8, n, generator=chance).gt(0.4) * 2.0 for n in (12, 9)]
    stacked = Users(slots, UNEQUAL, (0.5,) * 8, *masks).stacked(A.shape[1], leaves[0])
    y = adapted_linear(x, base, [(stacked, Matrices(*leaves))])
    return [y.detach(), *torch.autograd.grad(y, [x, *leaves], torch.randn(22, 9, generator=chance))]


def test_stacking_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    slots, stack = (0,) * 4 + (1,) * 4, (torch.randn(2, 3, 12), torch.randn(2, 9, 3))
    together = stacked_results(slots, *stack)
    _blocks.cache_clear()
    monkeypatch.setattr(pipeline.adapters.fused, "MOST_STACKED", 0)
    apart = stacked_results(slots, *stack)
    _blocks.cache_clear()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_is_not_finite_stays_with_its_own_adapter() -> None:
    torch.manual_seed(0)
    slots, A, B = (0,) * 4 + (1,) * 4, torch.randn(2, 3, 12), torch.randn(2, 9, 3)
    whole = stacked_results(slots, A, B)
    A[0, 1, 2], B[0, 4, 1] = torch.nan, torch.inf
    y, dx, dA, dB = stacked_results(slots, A, B)
    assert not y[:11].isfinite().all() and not dx[:11].isfinite().all()
    mine = ((y[11:], whole[0][11:]), (dx[11:], whole[1][11:]), (dA[1], whole[2][1]), (dB[1], whole[3][1]))
    assert all(torch.equal(found, wanted) for found, wanted in mine)
