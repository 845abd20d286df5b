"""AdaLoRA's budget against stock PEFT: the schedule, the triplets kept at every step, a whole training run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.spec import AdapterSpec, RankSchedule
from pipeline.support.tiny import tiny_llama
from pipeline.training.rank_budget import RankBudget

TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(1))
SCHEDULES = {
    "every step": RankSchedule(6, 4, warmup=2, final=5, total=16),
    "every third step": RankSchedule(6, 2, warmup=1, final=4, total=20, interval=3, beta1=0.6, beta2=0.9),
    "pruned to the end": RankSchedule(5, 1, warmup=0, final=0, total=9),
}


def stock_config(plan: RankSchedule) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=plan.initial_rank, target_r=plan.target_rank, tinit=plan.warmup, tfinal=plan.final,
        total_step=plan.total, deltaT=plan.interval, beta1=plan.beta1, beta2=plan.beta2, lora_alpha=12,
        orth_reg_weight=plan.orthogonality, target_modules=TARGETS, task_type="CAUSAL_LM",
    )


def pair(plan: RankSchedule, max_norm: float) -> tuple[Adapters, RankBudget, PeftModel, dict[str, tuple]]:
    """The same adapter in both packages, and which parameters belong together."""
    spec = AdapterSpec(rank=plan.initial_rank, alpha=12.0, schedule=plan)
    adapters = attach(tiny_llama(), [spec], TARGETS, seed=0)
    stock = get_peft_model(tiny_llama(), stock_config(plan))
    together = {}
    for name, layer in adapters.layers.items():
        theirs = stock.base_model.model.get_submodule(name)
        for part in ("lora_A", "lora_B", "lora_E"):
            together[f"{name}.{part}"] = (getattr(layer.buckets[0], part), getattr(theirs, part)["default"])
    with torch.no_grad():
        for ours, theirs in together.values():
            theirs.copy_(ours[0].view(theirs.shape))
    return adapters, RankBudget(adapters.layers, plan, max_norm), stock, together


def compare(budget: RankBudget, stock: PeftModel, together: dict[str, tuple], exact: bool) -> list[int]:
    """Assert that both keep the same triplets and have the same Λ; returns the kept ranks."""
    pattern = stock.peft_config["default"].rank_pattern or {}
    kept = {f"{name}.lora_E.default": mask[0].tolist() for name, mask in budget.kept.items()}
    assert kept == dict(pattern)
    for name, (ours, theirs) in together.items():
        if name.endswith("lora_E"):
            assert torch.equal(ours[0] == 0, theirs[:, 0] == 0)
            torch.testing.assert_close(ours[0], theirs[:, 0], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-6)
    return [sum(mask) for mask in kept.values()]


@settings(max_examples=40)
@given(st.data())
def test_the_schedule_is_pefts_at_every_step(data: st.DataObject) -> None:
    total = data.draw(st.integers(2, 60))
    final = data.draw(st.integers(0, total - 2))
    warmup = data.draw(st.integers(0, total - final - 1))
    target = data.draw(st.integers(1, 9))
    initial = data.draw(st.integers(target, 14))
    interval, layers = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 30))
    plan = RankSchedule(initial, target, warmup, final, total, interval)
    config = SimpleNamespace(tinit=warmup, tfinal=final, total_step=total, deltaT=interval)
    stock = SimpleNamespace(peft_config=config, init_bgt=initial * layers, target_bgt=target * layers)
    for step in range(1, total - final + 1):
        budget, masks = RankAllocator.budget_schedule(stock, step)
        assert plan.budget(step, layers) == budget
        assert plan.prunes(step) == (masks or step == total - final)  # PEFT forces the last choice
    for step in range(total - final + 1, total + 1):
        assert plan.budget(step, layers) == target * layers and not plan.prunes(step)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_gradients_leave_the_triplets_that_stock_peft_leaves(name: str) -> None:
    """Random gradients, plain SGD: kept triplets, rank pattern and every Λ are equal to the bit at every step."""
    plan = SCHEDULES[name]
    adapters, budget, stock, together = pair(plan, max_norm=1.0)
    random = torch.Generator().manual_seed(2)
    triplets = []
    for step in range(1, plan.total + 1):
        for ours, theirs in together.values():
            ours.grad = torch.randn(ours.shape, generator=random)
            theirs.grad = ours.grad[0].view(theirs.shape).clone()
        budget.observe(step)
        with torch.no_grad():
            for pair_of in together.values():
                for parameter in pair_of:
                    parameter.sub_(parameter.grad, alpha=0.01)
        budget.apply(step, 0.0)
        stock.base_model.update_and_allocate(step)
        ranks = compare(budget, stock, together, exact=True)
        triplets.append(sum(ranks) if ranks else plan.initial_rank * len(adapters.layers))
        assert budget.progress()["triplets"] == triplets[-1]
    assert triplets[-1] == plan.target_rank * len(adapters.layers) and len(set(triplets)) > 3
    assert len(set(ranks)) > 1, "ranks differ between layers, or the comparison says little"


@pytest.mark.parametrize("max_norm", [1e9, 0.05], ids=["whole gradients", "clipped gradients"])
def test_a_training_run_prunes_as_stock_peft_does(max_norm: float) -> None:
    """Loss with the orthogonality term, AdamW, clipping: losses to 1e-4, the same triplets at every step."""
    plan = RankSchedule(6, 3, warmup=2, final=3, total=12, orthogonality=0.3)
    adapters, budget, stock, together = pair(plan, max_norm)
    model = adapters.model
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.02) for m in (model, stock)]
    clipped = 0
    for step in range(1, plan.total + 1):
        loss = model(IDS, labels=IDS).loss + budget.penalty()
        theirs = stock(IDS, labels=IDS).loss
        assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-4)
        loss.backward()
        theirs.backward()
        budget.observe(step)
        norms = []
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            own = [p for p in m.parameters() if p.requires_grad]
            norms.append(float(torch.nn.utils.clip_grad_norm_(own, max_norm)))
            optimizer.step()
        clipped += norms[0] > max_norm
        budget.apply(step, norms[0])
        stock.base_model.update_and_allocate(step)
        ranks = compare(budget, stock, together, exact=False)
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert clipped == (0 if max_norm > 1 else plan.total - 1) and sum(ranks) == 18 and len(set(ranks)) > 1


def test_a_restored_budget_goes_on_as_if_it_had_not_stopped() -> None:
    """State through plain tensors, at every step of the schedule."""
    plan = SCHEDULES["every third step"]
    adapters, budget, _, together = pair(plan, max_norm=1.0)
    other, again, _, twins = pair(plan, max_norm=1.0)
    random = torch.Generator().manual_seed(3)
    for step in range(1, plan.total + 1):
        again = RankBudget(other.layers, plan, 1.0)
        again.load_state({name: value.clone() for name, value in budget.state().items()})
        for (ours, _), (theirs, _) in zip(together.values(), twins.values(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=random)
            theirs.grad = ours.grad.clone()
        for one, parameters in ((budget, together), (again, twins)):
            one.observe(step)
            with torch.no_grad():
                for parameter, _ in parameters.values():
                    parameter.sub_(parameter.grad, alpha=0.01)
            one.apply(step, 3.0)
        assert budget.state().keys() == again.state().keys()
        assert all(torch.equal(value, again.state()[name]) for name, value in budget.state().items())
        assert all(torch.equal(a[0], b[0]) for a, b in zip(together.values(), twins.values(), strict=True))


def test_an_unsettled_adapter_does_not_compete_with_a_settled_one() -> None:
    plan = SCHEDULES["every step"]  # settled at step 11
    budget = RankBudget({}, plan, 1.0)
    assert [step for step in range(1, 17) if budget.supersedes(step, best=3)] == list(range(11, 17))
    assert not budget.supersedes(14, best=12)


def test_without_adalora_nothing_happens() -> None:
    adapters = attach(tiny_llama(), [AdapterSpec(rank=2)], TARGETS, seed=0)
    budget = RankBudget(adapters.layers, None, 1.0)
    before = [p.clone() for p in adapters.model.parameters()]
    budget.observe(1)
    budget.apply(1, 2.0)
    assert budget.penalty() == 0.0 and budget.state() == budget.progress() == {} and not budget.supersedes(9, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, adapters.model.parameters(), strict=True))


def test_the_importance_is_the_papers() -> None:
    """One layer, two steps, by hand in float64 (eq. 8-11)."""
    plan = RankSchedule(3, 1, warmup=0, final=1, total=4, beta1=0.7, beta2=0.4)
    adapters = attach(tiny_llama(layers=1), [AdapterSpec(rank=3, schedule=plan)], ["q_proj"], seed=0)
    budget = RankBudget(adapters.layers, plan, max_norm=1.0)
    random = torch.Generator().manual_seed(4)
    smoothed: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    for step in (1, 2):
        for name, parameter in budget.parameters.items():
            parameter.grad = torch.randn(parameter.shape, generator=random)
            parameter.data.copy_(torch.randn(parameter.shape, generator=random))
            now = (parameter.detach()[0].double() * parameter.grad[0].double() / 2).abs()  # norm 2, clipped at 1
            smoothed[name] = 0.7 * smoothed.get(name, 0 * now) + (1 - 0.7) * now
            spread[name] = 0.4 * spread.get(name, 0 * now) + (1 - 0.4) * (now - smoothed[name]).abs()
        budget.observe(step)
        budget.apply(step, 2.0 - 1e-6)
    layer = next(iter(budget.buckets))
    score = {part: smoothed[f"{layer}.{part}"] * spread[f"{layer}.{part}"] for part in ("lora_A", "lora_B", "lora_E")}
    wanted = score["lora_E"] + score["lora_B"].mean(dim=0) + score["lora_A"].mean(dim=1)
    torch.testing.assert_close(budget._scores(layer)[0].double(), wanted, rtol=1e-5, atol=1e-9)
    assert math.isclose(float(wanted.max()), float(budget._scores(layer).max()), rel_tol=1e-5)
