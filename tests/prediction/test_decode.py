"""The averaged step of a decode against members that are run one by one, without a cache, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.families import LORA_DROPOUT, trained_start
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.collate import example_keys
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.prediction.decode import Decoder, TokenSpace
from pipeline.support.tiny import tiny_decoder

KEY = MaskKey(7, "test")
MEMBERS = [Member(None), Member(0), Member(0, 0), Member(1), Member(0, 3)]
SPECS = (AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT), AdapterSpec(rank=2, alpha=8.0))
BY_TOKEN = (AdapterSpec(rank=4, alpha=8.0, sites=(Site(position="lora_input", rate=0.4),)), SPECS[1])
HIDDEN_KEY = (
    AdapterSpec(rank=4, alpha=8.0, sites=(
        Site(position="attention_logits", pattern="column", rate=0.4), Site(position="ffn_hidden", rate=0.3),
    )), SPECS[1],
)  # fmt: skip
MEAN_FIELD = [Member(None), Member(0), Member(1)]
PROMPTS = [[5, 9, 3, 8], [11, 4], [7, 7, 30, 12, 13, 50, 6]]
CHOSEN = [[20, 3], [6, 40], [9, 9]]
"""Tokens that each row goes on with."""


FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "mixtral")
SINGLE = ("gemma2", "mixtral")
"""Families that transformers does not run in float64: padding becomes NaN, or there is no kernel."""


def adapted(family: str = "llama", specs: tuple[AdapterSpec, ...] = SPECS) -> Adapters:
    targets = "all-linear" if family != "mixtral" else ["q_proj", "v_proj"]
    model = tiny_decoder(family)
    return trained_start(attach(model if family in SINGLE else model.double(), list(specs), targets, seed=0))


def prompts(ids: Sequence[Sequence[int]] = PROMPTS) -> list[Encoded]:
    return [Encoded(f"row-{n}", tuple(one), (IGNORE_INDEX,) * len(one)) for n, one in enumerate(ids)]


def one_by_one(
    adapters: Adapters, row: int, ids: Sequence[int], space: TokenSpace = "probability",
    members: Sequence[Member] = MEMBERS,
) -> Tensor:
    """(V,): every member in a pass of its own over one whole sequence, no padding, no cache; then the mean."""
    tokens, positions = torch.tensor([ids]), torch.arange(len(ids))[None]
    logs = []
    for member in members:
        plan = with_row_keys(adapters.plan([member], 1, KEY), example_keys([f"row-{row}"]), positions)
        with adapters.axis.active(plan), torch.no_grad():
            logits = adapters.model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0, -1]
        logs.append(logits.log_softmax(-1))
    stack = torch.stack(logs)
    if space == "logit":
        return stack.mean(0).log_softmax(-1)
    return stack.exp().mean(0).log()


@pytest.mark.parametrize(
    ("family", "specs", "space", "members"),
    [
        *((family, SPECS, "probability", MEMBERS) for family in FAMILIES), ("llama", SPECS, "logit", MEMBERS),
        ("llama", BY_TOKEN, "probability", MEMBERS), ("llama", HIDDEN_KEY, "probability", MEMBERS),
        ("llama", HIDDEN_KEY, "probability", MEAN_FIELD),
    ],
)
def test_steps_are_the_average_of_members_run_one_by_one(
    family: str, specs: tuple[AdapterSpec, ...], space: TokenSpace, members: list[Member]
) -> None:
    adapters = adapted(family, specs)
    state = Decoder(adapters, members, KEY, 2, space).prefill(prompts())
    assert (state.cache is None) == (specs is not SPECS and members is MEMBERS)
    for taken in range(3):
        if taken:
            state.step(torch.tensor([one[taken - 1] for one in CHOSEN]))
        for row, (prompt, more) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
            wanted = one_by_one(adapters, row, [*prompt, *more[:taken]], space, members)
            tolerance = 2e-5 if family in SINGLE else 1e-10
            torch.testing.assert_close(state.log_probs[row], wanted, rtol=0, atol=tolerance)
    assert not adapters.model.training


@pytest.mark.parametrize("specs", [SPECS, BY_TOKEN], ids=["cache", "whole"])
def test_rows_leave_and_branch(specs: tuple[AdapterSpec, ...]) -> None:
    adapters = adapted(specs=specs)
    state = Decoder(adapters, MEMBERS, KEY, 2).prefill(prompts())
    state.select([2, 0, 0])
    state.step(torch.tensor([9, 20, 33]))
    state.select(torch.tensor([1, 2]))
    state.step(torch.tensor([3, 3]))
    for place, middle in enumerate((20, 33)):
        wanted = one_by_one(adapters, 0, [*PROMPTS[0], middle, 3])
        torch.testing.assert_close(state.log_probs[place], wanted, rtol=0, atol=1e-10)


def test_many_members_take_the_head_in_groups_and_a_model_that_trains_goes_on_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapters = adapted()
    decoders = {space: Decoder(adapters, MEMBERS, KEY, 2, space) for space in ("probability", "logit")}
    whole = {space: decoder.prefill(prompts()).log_probs for space, decoder in decoders.items()}
    monkeypatch.setattr("pipeline.prediction.decode.HEAD_ROWS", 7)  # two members at a time
    adapters.model.train()
    for space, decoder in decoders.items():
        torch.testing.assert_close(decoder.prefill(prompts()).log_probs, whole[space], rtol=0, atol=1e-12)
        assert math.isclose(float(whole[space].exp().sum(-1).mean()), 1.0, abs_tol=1e-12)
    assert adapters.model.training
