"""AdamW over stacked parameters against torch's own, run by run; and the slots in which runs come and leave."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from helpers.families import LORA_DROPOUT
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pipeline.adapters.attach import VACANT, attach, match_targets, place, remove, wrap
from pipeline.adapters.linear import RankBucket
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import TrainConfig
from pipeline.config.adapter import AdapterConfig
from pipeline.support.tiny import tiny_llama
from pipeline.training.packed.adamw import Stack, StackedAdamW, Update, squared_norms
from pipeline.training.packed.budget import PassBudget
from pipeline.training.packed.engine import StackedEngine

RUNS = {0: (0.1, 1.0, 0.0, 0.5), 4: (0.01, 16.0, 0.1, 1e9), 7: (0.003, 2.0, 0.3, 2.0)}
"""adapter -> learning rate, LoRA+ ratio, weight decay, norm at which it is clipped."""


def stacks(dtype: torch.dtype) -> list[Stack]:
    random, found = torch.Generator().manual_seed(0), []
    for size in (3, 5):
        bucket = RankBucket(2, size, 4)
        for adapter in RUNS:
            bucket.take(adapter, 1.0, random)
        bucket.to(dtype)
        with torch.no_grad():
            for parameter in bucket.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=random))
        found += [Stack(f"{size}.{part}", bucket, part, bucket.slot) for part in bucket.names]
    head = nn.Linear(3, 2).to(dtype)
    return [*found, *(Stack(part, head, part, {7: 0}, whole=True) for part in ("weight", "bias"))]


def own(stack: Stack, adapter: int) -> Tensor:
    return stack.rows(stack.parameter.detach())[stack.places[adapter]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_every_run_is_stepped_as_torch_steps_it(dtype: torch.dtype, tolerance: float) -> None:
    """One of them begins later, one rests in between: what rests is not touched."""
    random, together, optimizer = torch.Generator().manual_seed(1), stacks(dtype), StackedAdamW()
    copies = {k: {s.name: nn.Parameter(own(s, k).clone()) for s in together if k in s.places} for k in RUNS}
    stock = {}
    for k, (rate, ratio, decay, _) in RUNS.items():
        groups = [{"params": [p], "lr": rate * (ratio if "lora_B" in name else 1.0)} for name, p in copies[k].items()]
        stock[k] = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
    counts = dict.fromkeys(RUNS, 0)
    for step in range(30):
        active = [k for k in RUNS if not (k == 4 and step < 5) and not (k == 0 and 10 <= step < 15)]
        before = {k: [own(stack, k).clone() for stack in together if k in stack.places] for k in RUNS}
        for stack in together:
            stack.parameter.grad = torch.randn(stack.parameter.shape, generator=random, dtype=torch.float64).to(dtype)
        norms, updates = squared_norms(together), {}
        for k in active:
            for stack in (one for one in together if k in one.places):
                copies[k][stack.name].grad = stack.rows(stack.parameter.grad)[stack.places[k]].clone()  # type: ignore[arg-type]
            rate, ratio, decay, limit = RUNS[k]
            total = clip_grad_norm_(copies[k].values(), limit)
            assert norms[k] == pytest.approx(float(total) ** 2, rel=1e-5)
            stock[k].step()
            counts[k] += 1
            updates[k] = Update(rate, ratio, decay, counts[k], min(1.0, limit / (norms[k] ** 0.5 + 1e-6)))
        optimizer.step(together, updates)
        for k in RUNS:
            for stack, old in zip((one for one in together if k in one.places), before[k], strict=True):
                if k in active:
                    expected = copies[k][stack.name].detach()
                    torch.testing.assert_close(own(stack, k), expected, rtol=tolerance, atol=tolerance)
                else:
                    assert torch.equal(own(stack, k), old)


def matrices(layers: Iterable[tuple[str, nn.Module]], adapter: int) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": getattr(bucket, part)[bucket.slot[adapter]].detach().clone()
        for name, layer in layers for bucket in layer.buckets if adapter in bucket.slot for part in bucket.names  # type: ignore[union-attr, operator]
    }


def test_a_slot_starts_as_the_run_alone_and_is_used_again() -> None:
    hiddenkey = AdapterConfig(method="hiddenkey").resolved_method().sites
    wanted = {
        0: (AdapterSpec(rank=4, sites=LORA_DROPOUT), "all-linear", 1),
        1: (AdapterSpec(rank=4, alpha=3.0, sites=hiddenkey), ["q_proj", "down_proj"], 2),
        2: (AdapterSpec(rank=2), "all-linear", 1),
    }
    model = tiny_llama()
    adapters = wrap(model, match_targets(model, "all-linear"), {})

    def admit(adapter: int, which: int) -> dict[str, Tensor]:
        spec, targets, seed = wanted[which]
        stock = attach(tiny_llama(), [spec], targets, seed)
        place(adapters, adapter, stock.specs[0], match_targets(model, targets), seed, 0)
        expected, found = matrices(stock.layers.items(), 0), matrices(adapters.layers.items(), adapter)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        for key, draw in ((MaskKey(seed, 3), 0), (MaskKey(seed, 4), 1)):
            ours = adapters.plan([Member(adapter, draw)], 1, key).masks
            theirs = stock.plan([Member(0, draw)], 1, key).masks
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[n][p], theirs[n][p]) for n in theirs for p in theirs[n])
        return found

    first, _ = admit(0, 0), admit(1, 1)
    assert adapters.needs_row_keys()
    remove(adapters, 1)
    assert adapters.specs[1] is VACANT and not adapters.needs_row_keys()
    assert not any((1, p) in s.sizes or 1 in s.sites for s in adapters.sites.values() for p in ("lora_A", "lora_B"))
    admit(1, 2)
    remove(adapters, 1)
    again = admit(1, 0)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert {b.lora_A.shape[0] for layer in adapters.layers.values() for b in layer.buckets if b.rank == 4} == {2}


def test_a_run_that_takes_a_slot_finds_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    adapters = wrap(model, match_targets(model, "all-linear"), {})
    engine = StackedEngine(model, adapters)

    def step(adapter: int) -> None:
        for stack in engine.stacks:
            stack.parameter.grad = torch.ones_like(stack.parameter)
        slot.set_learning_rate(0.1)
        engine.step([slot])

    for _ in range(2):
        place(adapters, 0, AdapterSpec(rank=2), match_targets(model, ["q_proj"]), 1, 0)
        slot = engine.open_slot(0, TrainConfig(weight_decay=0.1))
        assert all(slot.moment(name, "exp_avg") is None for name in slot.sizes)
        step(0)
        values = {name: slot.value(name) for name in slot.sizes}
        assert all(name.endswith(("buckets.0.lora_A", "buckets.0.lora_B")) for name in values)
        assert all(value.shape[0] == 1 for value in values.values())
        moments = {name: slot.moment(name, "exp_avg") for name in slot.sizes}
        assert all(bool((moment != 0).all()) for moment in moments.values())  # type: ignore[union-attr]
        remove(adapters, 0)
        engine.close_slot()
        assert not any(stack.places for stack in engine.stacks)


@pytest.mark.parametrize(("most", "expected"), [(1e9, None), (300.0, 512), (64.0, 64), (100.0, 128)])
def test_passes_grow_while_that_pays(most: float, expected: int | None) -> None:
    """A device that makes places at the rate min(size, most): twice the size pays up to `most`. Every other step is
    slow, as beside other programs."""
    budget, micro, runs = PassBudget(accelerated=True), 64, 64
    for step in range(40):
        together = max(min(budget.places // micro, runs), 1)
        passes = [together * micro] * (runs // together)
        budget.note(passes, sum(passes) / min(passes[0], most) * (3.0 if step % 2 == 0 else 1.0))
    assert budget.settled == (expected is not None)
    assert budget.places == (expected or micro * runs)
    assert budget.shrink() and budget.settled and budget.places == (expected or micro * runs) // 2


@pytest.mark.parametrize(("micro", "expected"), [(64, 2048), (1500, 3000)])
def test_without_an_accelerator_passes_stay_below_a_bound(micro: int, expected: int) -> None:
    budget = PassBudget(accelerated=False)
    for _ in range(40):
        together = max(budget.places // micro, 1)
        budget.note([together * micro] * 4, 4.0)
    assert budget.settled and budget.places == expected


def test_a_larger_pass_that_is_no_faster_is_not_kept() -> None:
    budget = PassBudget(accelerated=False)
    while not budget.settled:
        size = max(budget.places, 300)
        budget.note([size] * 4, 4.0 * size)
    assert budget.places == 300


def test_one_doubling_that_seems_to_bring_nothing_does_not_end_it() -> None:
    """As measured beside another program."""
    budget, rates = PassBudget(accelerated=True), {300: 1.0, 600: 0.97, 1200: 1.3, 2400: 1.32, 4800: 1.33}
    while not budget.settled:
        size = max(budget.places, 300)
        budget.note([size] * 8, 8 * size / rates[size])
    assert budget.places == 1200


def test_where_memory_ends_the_best_size_that_fits_is_kept() -> None:
    budget = PassBudget(accelerated=True)
    rates = {64: 1.0, 128: 2.0, 256: 2.02}
    while budget.places < 512:
        size = max(budget.places, 64)
        budget.note([size] * 8, 8 * size / rates[size])
    assert budget.shrink() and (budget.places, budget.settled) == (128, True)
    assert budget.shrink() and budget.places == 64
    assert budget.shrink() and budget.places == 32
