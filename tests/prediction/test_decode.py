"""The averaged step of a decode against members that are run one by one, without a cache, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.decodes import (
    BY_TOKEN,
    FAMILIES,
    HIDDEN_KEY,
    KEY,
    MEAN_FIELD,
    MEMBERS,
    PROMPTS,
    SINGLE,
    SPECS,
    adapted,
    farthest,
    one_by_one,
    prompts,
)

from pipeline.adapters.members import Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.prediction.decode import Decoder, TokenSpace


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
    apart, state = farthest(adapters, members, space)
    assert apart <= (2e-5 if family in SINGLE else 1e-10)
    assert (state.cache is None) == (specs is not SPECS and members is MEMBERS)
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
