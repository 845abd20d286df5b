"""Consistency terms (arXiv 2403.00812): the equation by hand, dense float64 references, layouts, chunks, settings."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.consistency_reference import FORMS, draws_of, kl
from helpers.families import (
    LORA_DROPOUT,
    adapted_llama,
    assert_close_gradients,
    examples,
    gradients,
    load_tiny,
    stock_double,
    trained_start,
)
from helpers.reference import dense_model, dense_update
from helpers.site_models import Reference, adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import RowLayout, plain_layout, training_layout, weightless
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.adapter import AdapterConfig
from pipeline.config.method import Consistency, Site
from pipeline.data.collate import example_keys
from pipeline.data.encode import Encoded
from pipeline.data.sampler import process_share
from pipeline.errors import ConfigError
from pipeline.loss import terms
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedClassifier, SupervisedLM
from pipeline.loss.terms import bidirectional_kl, divergence, jensen_shannon, representation_log_probs
from pipeline.support.tiny import tiny_llama
from pipeline.training.batch import lay_out

PAD, KEY = 2, MaskKey(1, 3)
HIDDENKEY = tuple(
    site.model_copy(update={"rate": 0.3}) for site in AdapterConfig(method="hiddenkey").resolved_method().sites
)
form = pytest.mark.parametrize("term", FORMS, ids=[f"{t.kind}-{t.branches}" for t in FORMS])
extreme_forms = pytest.mark.parametrize("term", [FORMS[0], FORMS[3]], ids=["kl-one", "js-both"])
"""Two branches of which one moves; three that all move."""
Gradients = dict[str, Tensor]


def run(
    adapters: Adapters, rows: list[Encoded], layout: RowLayout, term: Consistency, side: str = "left"
) -> tuple[float, float, Gradients]:
    """One micro-batch as the training loop runs it: both terms, and the gradient of nll + weight · D."""
    built = lay_out(adapters, rows, layout, PAD, KEY, side)  # type: ignore[arg-type]
    objective = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)
    with adapters.axis.active(built.plan):
        nll, apart = objective(**built.inputs)
        (nll + term.weight * apart).backward()
    return float(nll.detach()), float(apart.detach()), gradients(adapters)


# --- the equation, by hand -------------------------------------------------------------------------------------------

HALF, QUARTER = (0.5, 0.5), (0.25, 0.75)
BY_DRAW = {0: HALF, 1: QUARTER, None: (0.75, 0.25)}
"""What the stub below answers under each draw."""


class Answers(nn.Module):
    """A classifier of two classes whose probabilities depend on the draw alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.axis = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        plan = self.axis.current  # type: ignore[attr-defined]
        table = [torch.tensor(BY_DRAW[m.draw]).log() for m in plan.members for _ in range(plan.rows)]
        return SimpleNamespace(logits=torch.stack(table) + 5.0)


@pytest.mark.parametrize(
    ("kind", "branches", "nll", "apart"),
    [
        # -ln 1/2 = 0.693147, -ln 3/4 = 0.287682. KL(P1‖P2) = 1/2 ln 2 + 1/2 ln 2/3 = 0.143841;
        # KL(P2‖P1) = 1/4 ln 1/2 + 3/4 ln 3/2 = 0.130812; half of both together 0.137327.
        ("kl", "both", 0.490415, 0.137327),
        ("kl", "one", 0.693147, 0.137327),
        # The mean of (1/2, 1/2), (1/4, 3/4), (3/4, 1/4) is (1/2, 1/2): 1/3 (0 + 0.130812 + 0.130812) = 0.087208.
        ("js", "both", 0.490415, 0.087208),
        ("js", "one", 0.693147, 0.087208),
    ],
)
@pytest.mark.parametrize("draw_layout", ["split", "replicate"])
def test_the_loss_is_the_equation_by_hand(kind: str, branches: str, nll: float, apart: float, draw_layout: str) -> None:
    """Three examples of class 1, one pair: every one of them has the loss that was worked out above."""
    adapters = attach(Answers(), [AdapterSpec(rank=1, sites=LORA_DROPOUT)], ["linear"], seed=0)
    adapters.model.axis = adapters.axis  # type: ignore[assignment]
    term = Consistency(kind=kind, branches=branches)  # type: ignore[arg-type]
    rows = [Encoded(f"row-{i}", (5,), (1,)) for i in range(3)]
    built = lay_out(adapters, rows, training_layout(range(3), 2, draw_layout, True, term), PAD, KEY)
    objective = TrainingObjective(SupervisedClassifier(adapters.model), adapters.axis)
    with adapters.axis.active(built.plan):
        found = objective(**built.inputs)
    assert [float(x) for x in found] == pytest.approx([3 * nll, 3 * apart], abs=1e-5)


def test_representations_are_compared_through_a_softmax_over_their_features() -> None:
    """h = (0, ln 3) is (1/4, 3/4), h = (7, 7) is (1/2, 1/2): the numbers above, and the closed form of the gradient."""
    hidden = torch.tensor([[[0.0, math.log(3.0)]], [[7.0, 7.0]]], requires_grad=True)
    log_probs = representation_log_probs(hidden)
    assert float(divergence("kl", log_probs).detach()) == pytest.approx(0.137327, abs=1e-6)
    assert float(divergence("js", log_probs).detach()) == pytest.approx(0.033822, abs=1e-6)  # M = (3/8, 5/8)
    (gradient,) = torch.autograd.grad(divergence("kl", log_probs).sum(), hidden)
    # D = 1/2 (p - q)(logit p - logit q) for two outcomes; at h_1 the slope in logit p is
    # 1/2 [p(1-p)(ln 3) + (3/4 - 1/2)] = 1/2 [0.205990 + 0.25] = 0.227995.
    assert gradient[0, 0].tolist() == pytest.approx([-0.227995, 0.227995], abs=1e-5)


# --- the divergences -------------------------------------------------------------------------------------------------


@given(st.integers(2, 4), st.integers(1, 7), st.floats(0.01, 20.0), st.integers(0, 10_000))
@settings(max_examples=25)
def test_divergences_equal_their_definitions_and_keep_their_bounds(g: int, v: int, spread: float, seed: int) -> None:
    logits = torch.randn(g, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    probabilities = logits.softmax(-1)
    mean = probabilities.mean(0)
    found = jensen_shannon(logits.log_softmax(-1))
    wanted = sum(kl(p, mean) for p in probabilities) / g
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    assert -1e-12 <= float(found) <= math.log(g) + 1e-12
    p, q = probabilities[:2]
    both_ways = bidirectional_kl(logits[0].log_softmax(-1), logits[1].log_softmax(-1))
    torch.testing.assert_close(both_ways, 0.5 * (kl(p, q) + kl(q, p)), rtol=1e-8, atol=1e-10)
    assert float(both_ways) >= 0.0 and float(divergence("kl", logits[:2].log_softmax(-1))) == float(both_ways)


def test_the_extremes() -> None:
    """Equal branches: exactly 0. Branches that share no outcome: ln G for js, far more for kl. Never a NaN."""
    same = torch.randn(5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    assert float(bidirectional_kl(same, same)) == 0.0
    assert abs(float(jensen_shannon(same.expand(3, 5)))) < 1e-7
    for size in (2, 3):
        apart = (torch.eye(size) * 2000.0).log_softmax(-1)
        assert float(jensen_shannon(apart)) == pytest.approx(math.log(size), abs=1e-6)
    assert float(bidirectional_kl(*(torch.eye(2) * 2000.0).log_softmax(-1))) == pytest.approx(2000.0)


# --- layouts ---------------------------------------------------------------------------------------------------------


def branches_of(layout: RowLayout) -> dict[tuple[int, int], list[tuple[int | None, bool]]]:
    """(pair, example) -> its branches as (draw, carries gradient); rows of weight 0 are left out."""
    assert layout.pairing is not None
    pairing, found = layout.pairing, {}
    parts = [(layout, pairing.branches, True)]
    if pairing.reference is not None:
        parts.append((pairing.reference, pairing.reference_branches, False))
    for part, count, moving in parts:
        assert len(part.source) == len(part.weights) == len(part.members) * layout.rows == len(part.members) * part.rows
        assert len(part.members) * pairing.branches == len(layout.members) * count
        for r, source in enumerate(part.source):
            m, row = divmod(r, layout.rows)
            pair, branch = divmod(m, count)
            weight = pairing.weights[(pair * pairing.branches) * layout.rows + row]
            draws = [x.draw for x in part.members[pair * count : (pair + 1) * count] if x.draw is not None]
            if weight:
                found.setdefault((draws[0] // 2, source), []).append((part.members[m].draw, moving))
    return found  # type: ignore[return-value]


@given(st.lists(st.integers(0, 500), min_size=1, max_size=9, unique=True), st.integers(1, 3), st.sampled_from(FORMS))
def test_under_split_every_example_is_in_exactly_one_pair(positions: list[int], pairs: int, term: Consistency) -> None:
    layout = training_layout(positions, 2 * pairs, "split", True, term)
    found = branches_of(layout)
    assert sorted(example for _, example in found) == list(range(len(positions)))
    total: Counter[int] = Counter()
    for source, weight in zip(layout.source, layout.weights, strict=True):
        total[source] += weight  # type: ignore[assignment]
    assert total == Counter(range(len(positions)))  # the supervised loss counts every example once
    for (pair, example), branches in found.items():
        assert pair == positions[example] % pairs  # whatever process and micro-batch it is in
        both = term.branches == "both"
        wanted = [(2 * pair, True), (2 * pair + 1, both)] + [(None, both)] * (term.kind == "js")
        assert branches == wanted


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from(FORMS))
def test_under_replicate_every_example_is_in_every_pair(count: int, pairs: int, term: Consistency) -> None:
    layout = training_layout(range(count), 2 * pairs, "replicate", True, term)
    assert layout.pairing is not None
    assert sorted(branches_of(layout)) == list(itertools.product(range(pairs), range(count)))
    assert set(layout.pairing.weights) == {1.0 / pairs}
    assert sum(layout.weights) == pytest.approx(count)
    free = [w for r, w in enumerate(layout.weights) if layout.members[r // layout.rows].draw is None]
    assert set(free) <= {0.0}  # the mask-free branch has no part in the supervised loss


@pytest.mark.parametrize(
    ("term", "passes"),
    [(FORMS[0], [(4, False), (4, True)]), (FORMS[1], [(8, True)]), (FORMS[2], [(8, False), (4, True)]),
     (FORMS[3], [(12, True)])],
)  # fmt: skip
def test_what_a_step_costs(term: Consistency, passes: list[tuple[int, bool]]) -> None:
    """Rows of the base in forwards with and without gradient, for 4 examples under `split`."""
    adapters = adapted_llama(AdapterSpec(sites=LORA_DROPOUT))
    seen: list[tuple[int, bool]] = []
    layer = adapters.layers["model.layers.0.mlp.up_proj"]
    layer.register_forward_hook(lambda _m, args, _o: seen.append((args[0].shape[0], torch.is_grad_enabled())))
    run(adapters, examples([6] * 4), training_layout(range(4), 4, "split", True, term), term)
    assert seen == passes


# --- against dense float64 references --------------------------------------------------------------------------------


def reference_terms(logits: dict[int | None, Tensor], labels: Tensor, term: Consistency) -> tuple[Tensor, Tensor]:
    """The equation for one example: float64 logits by branch (T, V); the first branch is the one with gradient."""
    places = [t for t in range(len(labels) - 1) if labels[t + 1] != -100]
    first, second, *free = list(logits)
    if term.branches == "one":
        logits = {branch: x if branch == first else x.detach() for branch, x in logits.items()}
    nll = apart = torch.zeros((), dtype=torch.float64)
    for t in places:
        p = {branch: x[t].softmax(-1) for branch, x in logits.items()}
        losses_ = [-p[branch][labels[t + 1]].log() for branch in (first, second)]
        nll = nll + (losses_[0] if term.branches == "one" else sum(losses_) / 2)
        if term.kind == "kl":
            apart = apart + 0.5 * (kl(p[first], p[second]) + kl(p[second], p[first]))
        else:
            mean = sum(p.values()) / 3
            apart = apart + sum(kl(p[branch], mean) for branch in (first, second, *free)) / 3
    return nll, apart


def assert_terms(
    ours: tuple[float, float, Gradients], nll: Tensor, apart: Tensor, wanted: Gradients, tolerance: float
) -> None:
    assert ours[0] == pytest.approx(float(nll.detach()), rel=tolerance)
    assert ours[1] == pytest.approx(float(apart.detach()), rel=tolerance)
    assert_close_gradients(ours[2], wanted, tolerance)


@pytest.mark.parametrize(
    ("term", "draw_layout"), list(zip(FORMS, ("split", "replicate", "replicate", "split"), strict=True))
)
def test_lora_dropout_with_consistency_equals_the_dense_reference(term: Consistency, draw_layout: str) -> None:
    """Two pairs, three padded rows, weight masks with rescale `none`: the mask-free branch is the mean-field update."""
    sites = tuple(s.model_copy(update={"compensation": "none"}) for s in LORA_DROPOUT)
    base, rows = tiny_llama(layers=1), examples([7, 5, 6])
    dense = stock_double(base)
    spec = AdapterSpec(rank=4, alpha=8.0, sites=sites)
    adapters = trained_start(attach(base, [spec], "all-linear", seed=0), size=0.3)
    ours = run(adapters, rows, training_layout(range(3), 4, draw_layout, True, term), term)
    masks = adapters.plan([Member(0, draw) for draw in range(4)], 1, KEY).masks
    nll = apart = torch.zeros((), dtype=torch.float64)
    for pair, i in itertools.product(range(2), range(3)):
        if draw_layout == "split" and i % 2 != pair:
            continue
        ids, labels = torch.tensor([rows[i].input_ids]), torch.tensor(rows[i].labels)
        logits: dict[int | None, Tensor] = {}
        for draw in draws_of(pair, term):
            updates = {}
            for name, layer in adapters.layers.items():
                A, B = layer.buckets[0].lora_A[0], layer.buckets[0].lora_B[0]
                a, b = (masks[name][s][draw] if draw is not None else None for s in ("lora_A", "lora_B"))
                updates[name] = dense_update(A, B, 2.0 if draw is not None else 2.0 * 0.5 * 0.75, a, b)
            positions = torch.arange(ids.shape[1])[None]
            logits[draw] = dense_model(dense, updates, ids, torch.ones_like(ids), positions)[0]
        part = reference_terms(logits, labels, term)
        share = 1.0 if draw_layout == "split" else 0.5
        nll, apart = nll + share * part[0], apart + share * part[1]
    (nll + term.weight * apart).backward()
    assert_terms(ours, nll, apart, gradients(adapters), 2e-5)


@form
def test_hiddenkey_equals_the_dense_reference(term: Consistency) -> None:
    """DropKey and HiddenCut in the latter half of a decoder, masks rebuilt from their keys, attention written out."""
    adapters, stock = adapted("llama", *HIDDENKEY)
    sites = adapters.specs[0].sites
    assert {site.layers for site in sites} == {(0.5, 1.0)}
    rows, names = examples([9, 6], supervised=4), example_keys(["row-0", "row-1"])
    ours = run(adapters, rows, training_layout(range(2), 4, "split", True, term), term)
    reference = Reference(stock, adapters, "llama")
    plan = lay_out(adapters, rows, training_layout(range(2), 4, "split", True), PAD, KEY).plan
    nll = apart = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        ids = torch.tensor([row.input_ids])
        positions = torch.arange(ids.shape[1])[None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        logits = {
            draw: reference.logits(Member(0, draw), plan, alone, names[i : i + 1])[0] for draw in draws_of(i, term)
        }
        part = reference_terms(logits, torch.tensor(row.labels), term)
        nll, apart = nll + part[0], apart + part[1]
    (nll + term.weight * apart).backward()
    wanted = {}
    for name in adapters.layers:
        for side, leaf in zip(("lora_A", "lora_B"), reference.leaves[name], strict=True):
            wanted[f"{name}.buckets.0.{side}"] = leaf.grad[None]
    assert float(apart.detach()) > 1e-3
    assert_terms(ours, nll, apart, wanted, 1e-4)


# --- what must not matter, does not ----------------------------------------------------------------------------------

EVERYTHING = (*LORA_DROPOUT, *(s.model_copy(update={"layers": (0.0, 1.0)}) for s in HIDDENKEY),
              Site(position="lora_input", rate=0.2))  # fmt: skip


def add(parts: list[tuple[float, float, Gradients]]) -> tuple[float, float, Gradients]:
    gradient = {name: sum(part[2][name].double() for part in parts) for name in parts[0][2]}
    return sum(p[0] for p in parts), sum(p[1] for p in parts), gradient  # type: ignore[return-value]


@pytest.mark.parametrize(("term", "draw_layout"), [(FORMS[0], "split"), (FORMS[3], "split"), (FORMS[2], "replicate")])
def test_accumulation_and_processes_change_neither_loss_nor_gradient(term: Consistency, draw_layout: str) -> None:
    """(batch 4 × 1) = (1 × 4) = two processes, with every kind of site and both terms of the loss."""
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([7, 5, 9, 4])

    def total(micro_batch: int, worlds: int) -> tuple[float, float, Gradients]:
        parts = []
        for rank in range(worlds):
            share = process_share(range(4), rank, worlds)
            for start in range(0, len(share), micro_batch):
                part = share[start : start + micro_batch]
                layout = training_layout([position for position, _ in part], 4, draw_layout, True, term)
                parts.append(run(adapters, [rows[row] for _, row in part], layout, term))
        return add(parts)

    whole = total(4, 1)
    assert whole[1] > 1e-3
    for micro_batch, worlds in ((1, 1), (2, 2)):
        found = total(micro_batch, worlds)
        assert found[:2] == pytest.approx(whole[:2], rel=1e-4)
        assert_close_gradients(found[2], whole[2], 1e-4)


@extreme_forms
def test_activation_checkpointing_changes_no_bit(term: Consistency) -> None:
    """What is recomputed in the backward pass follows the plan with gradient, not that of the other branch."""
    results = []
    for checkpointing in (False, True):
        adapters = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING), layers=2)
        adapters.model.train()
        if checkpointing:
            adapters.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        results.append(run(adapters, examples([7, 5, 9]), training_layout(range(3), 4, "split", True, term), term))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(gradient, results[1][2][name]) for name, gradient in results[0][2].items())


@extreme_forms
def test_padding_side_changes_nothing(term: Consistency) -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=EVERYTHING)), examples([9, 4, 6])
    layout = training_layout(range(3), 4, "split", True, term)
    left, right = (run(adapters, rows, layout, term, side) for side in ("left", "right"))
    assert left[:2] == pytest.approx(right[:2], rel=1e-4)
    assert_close_gradients(left[2], right[2], 1e-4)


@extreme_forms
def test_chunks_of_the_head_change_no_value_and_bound_the_logits(
    term: Consistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=LORA_DROPOUT)), examples([9, 7, 8], supervised=5)
    layout = training_layout(range(3), 4, "split", True, term)
    whole = run(adapters, rows, layout, term)
    sizes: list[int] = []
    adapters.model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: sizes.append(out.shape[0]))  # type: ignore[operator]
    monkeypatch.setattr(terms, "CHUNK_TOKENS", 6)
    chunked = run(adapters, rows, layout, term)
    assert max(sizes) <= 6 and len(sizes) > 6
    assert chunked[:2] == pytest.approx(whole[:2], rel=1e-5)
    assert_close_gradients(chunked[2], whole[2])


@form
def test_branches_that_drop_nothing_add_nothing(term: Consistency) -> None:
    """Rate 0: the term is 0 and the gradient that of plain LoRA; the loop then does not even make pairs."""
    sites = tuple(site.model_copy(update={"rate": 0.0}) for site in EVERYTHING)
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=sites)), examples([7, 5, 9])
    plain = run(adapters, rows, plain_layout(3), term)
    paired = run(adapters, rows, training_layout(range(3), 4, "split", True, term), term)
    assert plain[1] == 0.0 and abs(paired[1]) < 1e-5
    assert paired[0] == pytest.approx(plain[0], rel=1e-6)
    assert_close_gradients(paired[2], plain[2])
    assert training_layout(range(3), 4, "split", False, term) == plain_layout(3)


def test_rows_without_supervision_give_no_loss_and_no_gradient() -> None:
    adapters = adapted_llama(AdapterSpec(rank=4, sites=LORA_DROPOUT))
    layout = training_layout(range(2), 2, "split", True, FORMS[0])
    nll, apart, gradient = run(adapters, examples([5, 4], supervised=0), layout, FORMS[0])
    assert nll == apart == 0.0 and all(not g.any() for g in gradient.values())


@extreme_forms
def test_a_pass_that_does_not_count_calls_the_same_modules(term: Consistency) -> None:
    """Under ZeRO-3 every call is a collective: a process without rows must make the others' passes."""
    adapters, rows = adapted_llama(AdapterSpec(rank=4, sites=LORA_DROPOUT)), examples([5])
    layout, calls = training_layout([0], 2, "split", True, term), []
    layer = adapters.layers["model.layers.0.mlp.up_proj"]
    layer.register_forward_hook(lambda _m, args, _o: calls.append(tuple(args[0].shape)))
    run(adapters, rows, layout, term)
    nll, apart, gradient = run(adapters, rows, weightless(layout), term)
    assert nll == apart == 0.0 and all(not g.any() for g in gradient.values())
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :]


def test_the_branch_without_gradient_leaves_a_4_bit_base_as_it_was(tmp_path: Path) -> None:
    """The NF4 base stays in training mode: gradients after the no-grad forward are those without it, bit for bit."""
    spec = AdapterSpec(rank=4, sites=LORA_DROPOUT)
    adapters = trained_start(attach(load_tiny(tmp_path), [spec], "all-linear", seed=0))
    rows, term = examples([7, 5]), Consistency(kind="kl", weight=0.0)
    layout = training_layout(range(2), 2, "split", True, term)
    alone = RowLayout(layout.members, layout.rows, layout.source, layout.weights)
    before = run(adapters, rows, alone, term)
    with_other = run(adapters, rows, layout, term)
    after = run(adapters, rows, alone, term)
    assert with_other[1] > 0.0 and before[0] == after[0] == pytest.approx(with_other[0], rel=1e-6)
    assert all(torch.equal(gradient, after[2][name]) for name, gradient in before[2].items())
    assert_close_gradients(with_other[2], before[2])


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_term_of_a_preset_is_changed_without_writing_the_method() -> None:
    for name in ("hiddenkey", "lora_dropout+hiddenkey"):
        assert AdapterConfig(method=name).resolved_method().consistency == Consistency(kind="kl")
    config = load_config(None, [
        "adapter.method=lora_dropout+hiddenkey", "adapter.consistency.weight=0.05", "adapter.consistency.branches=both",
    ])  # fmt: skip
    wanted = Consistency(kind="kl", weight=0.05, branches="both")
    assert config.adapter.resolved_method().consistency == wanted
    assert AdapterSpec.from_config(config.adapter, config.train.max_steps).consistency == wanted
    assert len(config.adapter.resolved_method().sites) == 4
    added = AdapterConfig.model_validate({"method": "lora_dropout", "consistency": {"kind": "js"}}).resolved_method()
    assert added.consistency == Consistency(kind="js")
    removed = AdapterConfig.model_validate({"method": "hiddenkey", "consistency": {"kind": "none"}}).resolved_method()
    assert removed == AdapterConfig(method="hiddenkey_minus").resolved_method()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["adapter.method=hiddenkey", "train.draws=3"], ["train.draws = 3", "even", "train.draws=4"]),
        (["adapter.method=hiddenkey", "train.draws=1"], ["train.draws = 1", "train.draws=2"]),
        (["adapter.method=lora_dropout", "adapter.consistency.weight=1"], ["adapter.consistency.weight", "hiddenkey"]),
        (["adapter.method=hiddenkey", "adapter.consistency.weight=-1"], ["adapter.consistency.weight = -1"]),
        (["adapter.method=hiddenkey", "adapter.consistency.branches=two"], ["adapter.consistency.branches"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
