"""Training layouts: `replicate` is the paper's objective, `split` has its expectation at the cost of plain LoRA.

And what must not matter, does not: accumulation, processes, padding side, activation checkpointing, a resume.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from helpers.families import (
    LORA_DROPOUT,
    SITES,
    adapted_llama,
    assert_close_gradients,
    examples,
    gradients,
    stock_double,
    trained_start,
)
from helpers.reference import dense_model, dense_nll, dense_update
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import RowLayout, plain_layout, replicate_layout, split_layout, training_layout
from pipeline.adapters.members import MaskKey, Member, MemberPlan
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.encode import Encoded
from pipeline.data.sampler import process_share
from pipeline.loss.objective import SupervisedLM
from pipeline.support.tiny import tiny_llama
from pipeline.training.batch import lay_out

PAD = 2
EVERYTHING = (*LORA_DROPOUT, Site(position="lora_rank", rate=0.3), Site(position="lora_input", rate=0.2))
Gradients = dict[str, Tensor]


def loss_and_gradients(
    adapters: Adapters, rows: list[Encoded], layout: RowLayout, step: int = 3, side: str = "left"
) -> tuple[float, Gradients]:
    """One micro-batch as the training loop runs it: Σ weighted nll, backward inside the plan."""
    built = lay_out(adapters, rows, layout, PAD, MaskKey(1, step), side=side)
    with adapters.axis.active(built.plan):
        loss = SupervisedLM(adapters.model)(**built.tensors, row_weights=built.weights)
        loss.backward()
    return float(loss.detach()), gradients(adapters)


def add(parts: list[tuple[float, Gradients]], weight: float = 1.0) -> tuple[float, Gradients]:
    """Weighted sum of losses and gradients, in float64."""
    total = {name: sum(g[name].double() for _, g in parts) * weight for name in parts[0][1]}
    return sum(loss for loss, _ in parts) * weight, total


def assert_same(ours: tuple[float, Gradients], theirs: tuple[float, Gradients]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert_close_gradients(ours[1], theirs[1])


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=12, unique=True), st.integers(1, 6))
def test_split_gives_every_example_one_draw_by_its_position(positions: list[int], draws: int) -> None:
    layout = split_layout(positions, draws)
    assert len(layout.source) == len(layout.weights) == len(layout.members) * layout.rows
    drawn = Counter(position % draws for position in positions)
    assert [member.draw for member in layout.members] == sorted(drawn)
    assert layout.rows == max(drawn.values())  # no more rows than the fullest draw needs
    for r, (source, weight) in enumerate(zip(layout.source, layout.weights, strict=True)):
        assert layout.members[r // layout.rows].draw == positions[source] % draws  # a filler, too
        assert weight in (0.0, 1.0)
    counted = Counter(source for source, weight in zip(layout.source, layout.weights, strict=True) if weight)
    assert counted == Counter(range(len(positions)))


@given(st.integers(1, 8), st.integers(1, 6))
def test_replicate_gives_every_example_every_draw(count: int, draws: int) -> None:
    layout = replicate_layout(count, draws)
    pairs = [(layout.members[r // layout.rows].draw, source) for r, source in enumerate(layout.source)]
    assert sorted(pairs) == list(itertools.product(range(draws), range(count)))
    assert set(layout.weights) == {1.0 / draws} and layout.rows == count


@pytest.mark.parametrize(("kind", "factor"), [("split", 1), ("replicate", 4), ("none", 1)])
def test_the_cost_of_a_step_in_rows_of_the_base_model(kind: str, factor: int) -> None:
    """`split` runs the base on as many rows as plain LoRA; `replicate` on S times as many. Counted in the base."""
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    seen = []
    layer = adapters.layers["model.layers.0.mlp.up_proj"].base
    layer.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    layout = training_layout(range(8), 4, kind, masked=kind != "none")
    loss_and_gradients(adapters, examples([6] * 8), layout)
    assert seen == [8 * factor]


def test_replicate_in_one_pass_is_the_mean_of_a_pass_for_each_draw() -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([7, 5, 9])
    ours = loss_and_gradients(adapters, rows, replicate_layout(3, 4))
    separate = [
        loss_and_gradients(adapters, rows, RowLayout((Member(0, draw),), 3, (0, 1, 2), (1.0,) * 3)) for draw in range(4)
    ]
    assert_same(ours, add(separate, 1 / 4))
    assert len({loss for loss, _ in separate}) == 4  # the draws differ


def test_replicate_is_the_papers_objective_on_the_dense_model() -> None:
    """L = 1/S Σ_s Σ_x nll(x; W + ΔW(m_s)), each row alone and unpadded through a stock float64 model."""
    base = tiny_llama(layers=1)
    dense, rows = stock_double(base), examples([7, 5])
    adapters = trained_start(attach(base, [AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT)], "all-linear", seed=0))
    ours = loss_and_gradients(adapters, rows, replicate_layout(2, 3))
    masks = adapters.plan([Member(0, draw) for draw in range(3)], 1, MaskKey(1, 3)).masks
    total = torch.zeros((), dtype=torch.float64)
    for draw in range(3):
        updates = {
            name: dense_update(layer.buckets[0].lora_A[0], layer.buckets[0].lora_B[0], 2.0,
                               masks[name]["lora_A"][draw], masks[name]["lora_B"][draw])
            for name, layer in adapters.layers.items()
        }
        for row in rows:
            ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
            logits = dense_model(dense, updates, ids, torch.ones_like(ids), torch.arange(len(row.input_ids))[None])
            total = total + dense_nll(logits, labels).sum() / 3
    total.backward()
    assert_same(ours, (float(total.detach()), gradients(adapters)))


def test_split_equals_replicate_over_all_assignments_of_draws() -> None:
    """Given the draws, the mean over every assignment that `split` can make is `replicate`, exactly."""
    adapters, rows, draws = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([7, 5, 9]), 3
    shifts = [
        loss_and_gradients(adapters, rows, split_layout([p + shift for p in range(3)], draws)) for shift in range(draws)
    ]
    assert_same(add(shifts, 1 / draws), loss_and_gradients(adapters, rows, replicate_layout(3, draws)))


class Squared(nn.Module):
    """Two linears with a tanh between them: a loss that is not linear in the masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).square().sum(-1)


def test_the_expected_gradient_of_split_is_that_of_replicate_by_enumeration() -> None:
    """Every pair of draws of a layer with four mask bits, weighted by its probability (rates 0.5 and 0.25)."""
    torch.manual_seed(0)
    adapters = attach(Squared(), [AdapterSpec(rank=2, sites=LORA_DROPOUT)], ["first"], seed=0)
    nn.init.normal_(adapters.layers["first"].buckets[0].lora_B)
    x = torch.randn(4, 2)
    bits = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    kept = torch.tensor([0.5, 0.5, 0.75, 0.75])
    probability = torch.where(bits == 1, kept, 1 - kept).prod(1)
    masks = bits / kept
    expected: dict[str, Gradients] = {}
    for name, layout in [("split", split_layout(range(4), 2)), ("replicate", replicate_layout(4, 2))]:
        total: dict[str, Tensor] = {}
        for i, j in itertools.product(range(16), range(16)):
            pair = masks[[i, j]]
            plan = MemberPlan(layout.members, layout.rows, {"first": {"lora_A": pair[:, :2], "lora_B": pair[:, 2:]}})
            with adapters.axis.active(plan):
                losses = adapters.model(x[list(layout.source)])
                (losses * torch.tensor(layout.weights)).sum().backward()
            for key, gradient in gradients(adapters).items():
                total[key] = total.get(key, 0.0) + gradient.double() * float(probability[i] * probability[j])
        expected[name] = total
    assert float(probability.sum()) == pytest.approx(1.0)
    assert_close_gradients(expected["split"], expected["replicate"])


def test_fillers_carry_no_loss_and_no_gradient() -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([7, 5, 9])
    layout = split_layout([0, 1, 2], 2)  # draws 0, 1, 0: one filler
    assert sum(weight == 0 for weight in layout.weights) == 1
    parts = [
        loss_and_gradients(adapters, [rows[i]], RowLayout((Member(0, i % 2),), 1, (0,), (1.0,))) for i in range(3)
    ]
    assert_same(loss_and_gradients(adapters, rows, layout), add(parts))


@pytest.mark.parametrize("kind", ["split", "replicate"])
@pytest.mark.parametrize("processes", [1, 2])
def test_accumulation_and_processes_do_not_change_loss_or_gradients(kind: str, processes: int) -> None:
    """Batch 8 at once = micro-batches of 8/4 = two processes with half each: Σ nll and its gradient."""
    adapters, rows, draws = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([7, 5, 9, 4, 6, 8, 5, 7]), 3

    def run(micro_batch: int, worlds: int) -> tuple[float, Gradients]:
        parts = []
        for rank in range(worlds):
            share = process_share(range(8), rank, worlds)
            for start in range(0, len(share), micro_batch):
                part = share[start : start + micro_batch]
                layout = training_layout([position for position, _ in part], draws, kind, masked=True)
                parts.append(loss_and_gradients(adapters, [rows[row] for _, row in part], layout))
        return add(parts)

    whole = run(8, 1)
    for micro_batch in (4, 2, 1):
        assert_same(run(micro_batch, processes), whole)


def test_left_and_right_padding_give_the_same_loss_and_gradients() -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING), layers=2), examples([12, 5, 9])
    for layout in (split_layout(range(3), 2), replicate_layout(3, 2), plain_layout(3)):
        left, right = (loss_and_gradients(adapters, rows, layout, side=side) for side in ("left", "right"))
        assert_same(left, right)


@pytest.mark.parametrize("sites", [*SITES.values(), EVERYTHING], ids=[*SITES, "all"])
def test_activation_checkpointing_changes_no_bit(sites: tuple[Site, ...]) -> None:
    """The plan is read again in the backward pass: recomputed masks are the masks."""
    results = []
    for checkpointing in (False, True):
        adapters = adapted_llama(AdapterSpec(rank=4, sites=sites), layers=2)
        adapters.model.train()
        if checkpointing:
            adapters.model.activation_checkpointing_enable({"use_reentrant": False})
        forwards = []
        layer = adapters.layers["model.layers.1.mlp.up_proj"]
        layer.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        results.append(loss_and_gradients(adapters, examples([7, 5, 9]), split_layout(range(3), 2)))
        assert len(forwards) == 1 + checkpointing  # it was recomputed
    assert results[0][0] == results[1][0]
    assert all(torch.equal(gradient, results[1][1][name]) for name, gradient in results[0][1].items())


def test_a_step_after_a_resume_is_the_step_without_one() -> None:
    """Masks follow from the step alone: fresh objects at step 5 give the same bits, another step gives others."""
    rows = examples([7, 5, 9])
    def run(steps: list[int]) -> tuple[float, Gradients]:
        adapters = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING))
        return [loss_and_gradients(adapters, rows, split_layout(range(3), 2), step) for step in steps][-1]
    straight, resumed, other = run([3, 4, 5]), run([5]), run([6])
    assert straight[0] == resumed[0] != other[0]
    assert all(torch.equal(gradient, resumed[1][name]) for name, gradient in straight[1].items())
