"""Sequences that share keys and values, and the last feed-forward network at scored places, against whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import LORA_DROPOUT, trained_start
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.method import Site
from pipeline.data.encode import IGNORE_INDEX, Encoded, encode_candidates
from pipeline.data.rows import Row
from pipeline.model import shared_keys
from pipeline.model.head import last_feed_forward, states_at
from pipeline.model.load import load_base
from pipeline.model.shared_keys import may_share
from pipeline.prediction.causal import worth_padding
from pipeline.prediction.passes import PassSettings, predict_choices, predict_completions
from pipeline.prediction.sequences import common_beginning, plan_sequences
from pipeline.support.tiny import tiny_decoder, tiny_tokenizer

SHARING = ("llama", "qwen2", "qwen3", "gpt2", "mixtral")
WHOLE = PassSettings(2, 400, MaskKey(4, "test"))
SHARED = replace(WHOLE, shares_keys=True)
MEMBERS = [Member(None), Member(0), Member(0, 0), Member(1), Member(0, 1)]
SPECS = (AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT), AdapterSpec(rank=2, alpha=8.0))
BEGINNING = [11, 12, 13, 14, 15, 16]


def adapted(family: str = "llama", specs: tuple[AdapterSpec, ...] = SPECS, double: bool = False) -> Adapters:
    model = tiny_decoder(family)
    targets = "all-linear" if family != "mixtral" else ["q_proj", "v_proj"]
    return trained_start(attach(model.double() if double else model, list(specs), targets, seed=0))


def candidate(prompt: list[int], answer: list[int], name: str = "row") -> Encoded:
    return Encoded(name, (*prompt, *answer), (*[IGNORE_INDEX] * len(prompt), *answer))


def rows(beginning: list[int], answers: list[list[list[int]]]) -> list[list[Encoded]]:
    random = np.random.default_rng(0)
    prompts = [beginning + random.integers(20, 60, length).tolist() for length in (3, 9, 5, 12, 1, 9, 7)]
    return [
        [candidate(prompt, answer, f"row-{i}") for answer in answers[i % len(answers)]]
        for i, prompt in enumerate(prompts)
    ]


ANSWERS = {
    "one token": [[[7], [8]]],
    "several tokens": [[[7, 9], [8], [9, 4, 5]], [[7, 9, 3], [7, 9, 4]]],
    "one begins another, both closed": [[[7, 2], [7, 5, 2]]],
    "one token here, several there": [[[7], [8]], [[7, 9, 3, 3], [8, 4]]],
    "the same answer twice": [[[7, 9], [7, 9], [8]]],
}


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Tokens of every pass."""
    found: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: found.append(args[0].numel())
    )
    yield found
    hook.remove()


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("beginning", [[11], BEGINNING], ids=["none", "common"])
def test_choices_of_sequences_that_share_are_those_of_whole_ones(answers: str, beginning: list[int]) -> None:
    adapters, candidates = adapted(), rows(beginning, ANSWERS[answers])
    with counted(adapters.model) as tokens:
        whole = predict_choices(adapters, candidates, MEMBERS, WHOLE)
        before = sum(tokens)
        shared = predict_choices(adapters, candidates, MEMBERS, SHARED)
    np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-5)
    if len(beginning) > 1:
        assert sum(tokens) - before < 0.8 * before


@pytest.mark.parametrize("family", SHARING)
def test_families_share(family: str) -> None:
    adapters, candidates = adapted(family), rows(BEGINNING, ANSWERS["several tokens"])
    for budget in (1, 100, 10**6):
        with counted(adapters.model) as tokens:
            shared = predict_choices(adapters, candidates, MEMBERS, replace(SHARED, budget_tokens=budget))
        assert max(tokens) <= max(budget, len(MEMBERS) * 14)  # a row at least
        np.testing.assert_allclose(shared, predict_choices(adapters, candidates, MEMBERS, WHOLE), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_differs_is_rounding(family: str) -> None:
    adapters, candidates = adapted(family, double=True), rows(BEGINNING, ANSWERS["several tokens"])
    whole, shared = (predict_choices(adapters, candidates, MEMBERS, settings) for settings in (WHOLE, SHARED))
    np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-12)


def test_completions_share_their_beginning() -> None:
    adapters = adapted()
    references = [row[-1] for row in rows(BEGINNING, [[[7, 9, 2]], [[5, 6, 7, 8, 9, 10, 3, 4, 2]]])]
    whole, offsets = predict_completions(adapters, references, MEMBERS, WHOLE)
    shared, same = predict_completions(adapters, references, MEMBERS, SHARED)
    assert offsets.tolist() == same.tolist()
    np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-5)


def test_rows_of_a_tokenizer_that_closes_choices() -> None:
    """`good` begins `good film`: both end with eos, which is scored behind different tokens."""
    words = ["the film was", "a fine plot", "the actor is", "the story was very very not"]
    given = [Row(f"{i}", f"Review: {text}", (" good", " good film", " bad"), 0) for i, text in enumerate(words)]
    candidates = [encode_candidates(row, tiny_tokenizer(), 64) for row in given]
    assert {answer.input_ids[-1] for row in candidates for answer in row} == {2}
    adapters = adapted()
    whole, shared = (predict_choices(adapters, candidates, MEMBERS, settings) for settings in (WHOLE, SHARED))
    np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["attention_logits", "ffn_hidden", "lora_input"])
def test_masks_of_tokens_want_whole_sequences_and_read_outs_without_a_draw_do_not(position: Any) -> None:
    patterns = {"attention_logits": "column", "ffn_hidden": "element", "lora_input": "element"}
    site = Site(position=position, pattern=patterns[position], rate=0.4)
    adapters = adapted(specs=(AdapterSpec(rank=4, alpha=8.0, sites=(site,)),))
    candidates = rows(BEGINNING, ANSWERS["one token"])
    for members, share in (([Member(0), Member(0, 1)], False), ([Member(None), Member(0)], True)):
        with counted(adapters.model) as tokens:
            whole = predict_choices(adapters, candidates, members, WHOLE)
            before = sum(tokens)
            shared = predict_choices(adapters, candidates, members, SHARED)
        np.testing.assert_allclose(shared, whole, rtol=0, atol=1e-5)
        assert (sum(tokens) - before < before) == share


class _Mixing(nn.Module):
    """A last network that looks at other positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).cumsum(1)


def test_what_does_not_give_the_same_does_not_share() -> None:
    assert all(may_share(tiny_decoder(family)) for family in SHARING)
    assert not may_share(tiny_decoder("mistral")) and not may_share(tiny_decoder("gemma2"))  # sliding windows
    mixing = tiny_decoder("llama")
    mixing.model.layers[-1].mlp = _Mixing(mixing.model.layers[-1].mlp)
    assert not may_share(mixing)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_told_from_a_position_that_is_wrong_by_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_decoder(family).to(dtype) for family in SHARING]
    assert all(may_share(model) for model in models)

    def shifted(model: Any, ids: Tensor, mask: Tensor | None, positions: Tensor, *more: Any) -> Tensor:
        return states_at(model, ids, mask, positions + 1, *more)

    monkeypatch.setattr(shared_keys, "states_at", shifted)
    assert not any(may_share(model) for model in models)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deep_model_shares_in_half_precision_too(dtype: str) -> None:
    """Rounding grows with the layers: a check that is too narrow would turn sharing off, and nobody would see it."""
    config = load_config("default", [f"model.compute_dtype={dtype}"])
    model = load_base(config.model, torch.device("cpu")).model
    assert may_share(attach(model, list(SPECS), "all-linear", seed=0).model)


def test_the_last_network_is_computed_where_something_is_scored() -> None:
    model, seen = tiny_decoder("llama"), []
    ids, places = torch.randint(3, 60, (4, 10)), torch.tensor([[9, 3], [2, 2], [0, 1], [5, 9]])
    positions = torch.arange(10).expand(4, -1)
    network = last_feed_forward(model)
    assert network is model.model.layers[-1].mlp
    network.gate_proj.register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    few = states_at(model, ids, None, positions, places)
    every = states_at(model, ids, None, positions, torch.arange(10).expand(4, -1))
    assert seen == [(4, 2, 64), (4, 10, 64)]
    torch.testing.assert_close(few, torch.stack([row[at] for row, at in zip(every, places, strict=True)]))


def test_much_shorter_tails_go_by_themselves() -> None:
    assert worth_padding([7] * 10, 4) == 10 and worth_padding([3], 4) == 1
    assert worth_padding([7, 5, 5, *[1] * 40], 4) == 3, "40 of them would be padded by 6 tokens under 4 members"
    assert worth_padding([7, 6, 6, 6], 1) == 4, "3 tokens of padding cost less than a pass"


def test_sharing_is_planned_where_it_saves_tokens() -> None:
    (one,) = plan_sequences([[candidate([5, 6, 7], [8, 9]), candidate([5, 6, 7], [4, 3, 2])]], tails=True)
    assert one.input_ids == (5, 6, 7) and [tail.input_ids for tail in one.tails] == [(8,), (4, 3)]
    assert one.positions == (2, 2) and one.targets == (4, 8) and one.choices == (1, 0)
    assert [tail.positions for tail in one.tails] == [(0,), (0, 1)] and one.tails[1].targets == (3, 2)
    apart = plan_sequences([[candidate([5], [8, 9]), candidate([6], [4, 3])]], tails=True)
    assert [one.input_ids for one in apart] == [(5, 8), (6, 4)]
    beginning, rest = common_beginning(plan_sequences([[candidate([5, 6, 7], [8])], [candidate([5, 6], [8])]]))
    assert beginning == (5,) and [one.input_ids for one in rest] == [(6, 7), (6,)]
    assert [one.positions for one in rest] == [(1,), (0,)]  # the last token of the shorter one is scored: it stays
    assert common_beginning(plan_sequences([[candidate([5, 6, 7], [8])], [candidate([6, 6], [8])]]))[0] == ()
