"""Members in one pass against a pass for each, at every chunk size, and against a stock model row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama, examples, load_tiny, stock_double, trained_start
from helpers.reference import dense_model, dense_update
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.model.head import HEAD_ROWS
from pipeline.prediction import passes
from pipeline.prediction.passes import PassSettings, predict_completions
from pipeline.prediction.sequences import plan_sequences
from pipeline.scores.ensemble import average
from pipeline.support.tiny import tiny_gpt2, tiny_llama

PAD, KEY = 2, MaskKey(4, "test")
MEMBERS = [Member(None), Member(0), Member(0, 0), Member(1), Member(1, 3), Member(0, 1), Member(2, 0)]
SPECS = (
    AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT),
    AdapterSpec(rank=2, alpha=8.0, sites=(Site(position="lora_rank", rate=0.5), Site(position="lora_input", rate=0.3))),
    AdapterSpec(rank=64, alpha=8.0, sites=(Site(position="lora_B", rate=0.5, compensation="none"),)),
)
BUDGETS = [1, 40, 150, 400, 10**9]


def candidate(prompt: list[int], answer: list[int], name: str) -> Encoded:
    return Encoded(name, (*prompt, *answer), (*[IGNORE_INDEX] * len(prompt), *answer))


def candidates() -> list[list[Encoded]]:
    """Rows of one-token answers (they share a sequence), of longer answers, and with two or three choices."""
    random = np.random.default_rng(0)
    rows = []
    for i, length in enumerate([3, 9, 5, 12, 4, 9, 7]):
        prompt = random.integers(3, 60, length).tolist()
        answers = [[7], [8]] if i % 3 else [[7, 9], [8], [9, 4, 5]]
        rows.append([candidate(prompt, answer, f"row-{i}") for answer in answers])
    return rows


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    return adapted_llama(*SPECS)


def predict_choices(*arguments: Any) -> np.ndarray:
    """log p(choice), normalised over the choices of a row."""
    return torch.from_numpy(passes.predict_choices(*arguments)).log_softmax(-1).numpy()


def separately(adapters: Adapters, rows: list[list[Encoded]], members: list[Member] = MEMBERS) -> np.ndarray:
    """A pass of its own for every member and every row."""
    width = max(map(len, rows))
    table = np.full((len(members), len(rows), width), -np.inf)
    for m, member in enumerate(members):
        for n, row in enumerate(rows):
            table[m, n, : len(row)] = predict_choices(adapters, [row], [member], PassSettings(PAD, 1, KEY))[0, 0]
    return table


@pytest.mark.parametrize("budget", BUDGETS)
def test_members_in_one_pass_equal_a_pass_for_each(adapters: Adapters, budget: int) -> None:
    rows = candidates()
    together = predict_choices(adapters, rows, MEMBERS, PassSettings(PAD, budget, KEY))
    alone = separately(adapters, rows)
    assert np.array_equal(np.isneginf(together), np.isneginf(alone))
    finite = np.isfinite(alone)
    assert np.abs(together[finite] - alone[finite]).max() <= 1e-5
    assert np.abs(np.exp(together).sum(-1) - 1).max() < 1e-6
    assert len({together[m].tobytes() for m in range(len(MEMBERS))}) == len(MEMBERS)  # they are different members


@pytest.mark.parametrize(("precision", "tolerance"), [("nf4", 2e-5), ("bf16", 0.2), ("int8", 2e-5)])
def test_members_in_one_pass_on_a_low_precision_base(precision: str, tolerance: float, tmp_path: Path) -> None:
    """No log p differs by more than rounding, and no label flips unless its margin is below that of two log p.

    The quantized bases compute in float32. In bfloat16 this model's logits are below 8, so their ulp is 2^-5 at most.
    Where a processor sums a longer batch in another order, each may be rounded to the neighbour; log p of a choice is
    z_y - log Σ exp z over up to 3 tokens: 3 · 2 · 2^-5 = 0.19. (Seen: 0 with bfloat16 instructions, 0.05 with AVX2.)
    """
    adapters = trained_start(attach(load_tiny(tmp_path, "llama", precision), list(SPECS), "all-linear", seed=0))
    rows = candidates()
    alone = separately(adapters, rows)
    finite = np.isfinite(alone)
    ordered = np.sort(np.where(finite, alone, -1e9), axis=-1)
    margin = ordered[..., -1] - ordered[..., -2]
    for budget in (150, 10**9):
        together = predict_choices(adapters, rows, MEMBERS, PassSettings(PAD, budget, KEY))
        assert np.abs(together[finite] - alone[finite]).max() <= tolerance
        flipped = together.argmax(-1) != alone.argmax(-1)
        assert not (flipped & (margin > 2 * tolerance)).any()


def test_scores_are_those_of_a_stock_model_row_by_row() -> None:
    """log p of every choice's tokens from the dense float64 model, without padding, members or chunks."""
    base = tiny_llama(layers=1)
    dense = stock_double(base)
    adapters = trained_start(attach(base, [SPECS[0]], "all-linear", seed=0))
    members, rows = [Member(None), Member(0), Member(0, 2)], candidates()
    ours = passes.predict_choices(adapters, rows, members, PassSettings(PAD, 200, KEY))
    plan = adapters.plan(members, 1, KEY)
    for m, member in enumerate(members):
        updates = {}
        for name, layer in adapters.layers.items():
            masks = {axis: mask[m] for axis, mask in plan.masks[name].items()}
            A, B = layer.buckets[0].lora_A[0].detach(), layer.buckets[0].lora_B[0].detach()
            scaling = 0.0 if member.adapter is None else 2.0
            updates[name] = dense_update(A, B, scaling, masks["lora_A"], masks["lora_B"])
        for n, row in enumerate(rows):
            scores = []
            for answer in row:
                ids = torch.tensor([answer.input_ids])
                with torch.no_grad():
                    logits = dense_model(dense, updates, ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
                log_probs = logits[0, :-1].log_softmax(-1)
                supervised = [(t, label) for t, label in enumerate(answer.labels) if label != IGNORE_INDEX]
                scores.append(sum(float(log_probs[t - 1, label]) for t, label in supervised))
            assert np.abs(ours[m, n, : len(row)] - scores).max() <= 1e-5 * np.abs(scores).max()


@settings(max_examples=15)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 300))
def test_completions_equal_a_pass_for_each(lengths: list[int], count: int, budget: int) -> None:
    adapters = ADAPTERS
    references = examples(lengths, supervised=1) if min(lengths) < 4 else examples(lengths, supervised=3)
    members = MEMBERS[:count]
    flat, offsets = predict_completions(adapters, references, members, PassSettings(PAD, budget, KEY))
    assert offsets.tolist() == np.cumsum([0, *(row.supervised for row in references)]).tolist()
    for m, member in enumerate(members):
        for n, row in enumerate(references):
            alone, _ = predict_completions(adapters, [row], [member], PassSettings(PAD, 1, KEY))
            assert np.abs(flat[m, offsets[n] : offsets[n + 1]] - alone[0]).max() <= 1e-5


ADAPTERS = adapted_llama(*SPECS)


def test_more_positions_than_the_head_takes_at_once() -> None:
    long = examples([100, 90, 100, 60], supervised=59)
    assert sum(row.supervised for row in long) == 236
    whole, offsets = predict_completions(ADAPTERS, long * 2, [Member(0, 0)], PassSettings(PAD, 10**9, KEY))
    assert whole.shape[1] > HEAD_ROWS
    alone, _ = predict_completions(ADAPTERS, long[:1], [Member(0, 0)], PassSettings(PAD, 10**9, KEY))
    assert np.abs(whole[0, offsets[4] : offsets[5]] - alone[0]).max() <= 1e-5


def test_answers_of_one_token_cost_one_sequence() -> None:
    rows = candidates()
    sequences = plan_sequences(rows)
    assert len(sequences) == sum(1 if len(row) == 2 else 3 for row in rows)


def test_predicting_leaves_no_trace(adapters: Adapters) -> None:
    """Mode, gradient mode and plan are as before, also when a callback raises in the middle."""
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for training in (True, False):
        adapters.model.train(training)
        before = [module.training for module in adapters.model.modules()]
        predict_choices(adapters, candidates(), MEMBERS, PassSettings(PAD, 100, KEY))
        assert [module.training for module in adapters.model.modules()] == before
        with pytest.raises(KeyboardInterrupt):
            predict_choices(adapters, candidates(), MEMBERS, PassSettings(PAD, 100, KEY, on_chunk=stop))
        assert [module.training for module in adapters.model.modules()] == before
        assert torch.is_grad_enabled() and adapters.axis.current is None


def test_predictions_do_not_depend_on_the_mode(adapters: Adapters) -> None:
    outputs = []
    for training in (True, False):
        adapters.model.train(training)
        outputs.append(predict_choices(adapters, candidates(), MEMBERS, PassSettings(PAD, 100, KEY)))
    assert np.array_equal(*outputs)


def test_a_base_with_dropout_of_its_own_predicts_without_it() -> None:
    model = tiny_gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    owner = trained_start(attach(model, [SPECS[0]], "all-linear", seed=0))
    model.train()
    first, again = (predict_choices(owner, candidates(), [Member(0)], PassSettings(PAD, 100, KEY)) for _ in range(2))
    assert np.array_equal(first, again)
    ids = torch.full((1, 4), 9)
    assert not torch.equal(model(ids).logits, model(ids).logits)  # it has dropout where it trains


def test_draws_are_those_of_seed_and_phase(adapters: Adapters) -> None:
    def scores(seed: int, phase: str) -> np.ndarray:
        members = [Member(0, 0), Member(1, 0), Member(0)]
        return predict_choices(adapters, candidates(), members, PassSettings(PAD, 100, MaskKey(seed, phase)))

    first, again, other_seed, other_phase = scores(4, "test"), scores(4, "test"), scores(5, "test"), scores(4, "x")
    assert np.array_equal(first, again)
    for other in (other_seed, other_phase):
        assert all(np.abs(np.exp(other[m]) - np.exp(first[m])).max() > 1e-3 for m in (0, 1))
        assert np.array_equal(other[2], first[2])


def test_the_ensemble_is_the_mean_probability_of_its_draws(adapters: Adapters) -> None:
    """N-draw test-time ensemble (eq. 8), in probability space and in logit space, from separate passes."""
    members = [Member(0, draw) for draw in range(5)]
    rows = [row for row in candidates() if len(row) == 2]
    together = predict_choices(adapters, rows, members, PassSettings(PAD, 300, KEY))
    probabilities = np.exp(separately(adapters, rows, members))
    assert np.abs(np.exp(average(together)) - probabilities.mean(0)).max() <= 1e-5
    geometric = np.prod(probabilities, axis=0) ** (1 / 5)
    assert np.abs(np.exp(average(together, "logit")) - geometric / geometric.sum(-1, keepdims=True)).max() <= 1e-5
