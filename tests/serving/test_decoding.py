"""Sequences that join and leave one decode have the distributions that they have alone; how tokens are chosen."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.reference import z_score
from helpers.serving import MEMBERS, SPECS, tiny_ensemble

from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.encode import Encoded
from pipeline.ensemble.ensemble import Ensemble
from pipeline.prediction.decode import Decoder, TokenSpace
from pipeline.scores.ensemble import average
from pipeline.serving.decoding import SharedDecode
from pipeline.serving.writing import BROKEN, Sampling, SequenceWriter, choose

BY_TOKEN = (AdapterSpec(rank=4, alpha=8.0, sites=(Site(position="lora_input", rate=0.4),)), SPECS[1])
PROMPTS = [("a", (5, 9, 3, 8)), ("b", (11, 4)), ("c", (7, 7, 30, 12, 13, 50, 6)), ("d", (9,))]


def decoder_of(ensemble: Ensemble) -> Decoder:
    passes = ensemble.task.passes
    return Decoder(ensemble.adapters, MEMBERS, passes.key, passes.pad_id, "probability")


def alone(decoder: Decoder, name: str, ids: tuple[int, ...]) -> torch.Tensor:
    return decoder.prefill([Encoded(name, ids, (-100,) * len(ids))]).log_probs[0]


@pytest.mark.parametrize("specs", [SPECS, BY_TOKEN])
def test_sequences_come_and_go_without_changing_each_other(specs: tuple[AdapterSpec, ...]) -> None:
    decoder = decoder_of(tiny_ensemble(specs))
    shared, known = SharedDecode(decoder), dict(PROMPTS)

    def check(names: str, found: torch.Tensor) -> None:
        for name, row in zip(names, found, strict=True):
            torch.testing.assert_close(row, alone(decoder, name, known[name]), rtol=0, atol=1e-4)

    def step(names: str, tokens: list[int]) -> None:
        for name, token in zip(names, tokens, strict=True):
            known[name] = (*known[name], token)
        check(names, shared.step(tokens))

    check("ab", shared.begin(PROMPTS[:2]))
    step("ab", [20, 3])
    check("c", shared.begin(PROMPTS[2:3]))  # longer than both
    step("abc", [6, 40, 9])
    shared.keep([0, 1])  # the longest leaves, and its padding
    state = shared._state
    assert state is not None and state.ids.shape == (2, 6) and state.mask[0].all()
    step("ab", [9, 9])
    check("d", shared.begin(PROMPTS[3:]))  # shorter than both
    shared.keep([2, 0])
    step("da", [17, 18])
    shared.keep([])
    known["b"] = (11, 4)
    check("b", shared.begin(PROMPTS[1:2]))


def test_keys_of_a_sliding_window_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be put beside those of other rows."""
    monkeypatch.setattr("pipeline.serving.decoding._is_plain", lambda cache: False)
    decoder = decoder_of(tiny_ensemble())
    shared = SharedDecode(decoder)
    shared.begin(PROMPTS[:2])
    shared.step([20, 3])
    torch.testing.assert_close(shared.begin(PROMPTS[2:3])[-1], alone(decoder, *PROMPTS[2]), rtol=0, atol=1e-4)
    found = shared.step([6, 40, 9])
    for row, (name, ids) in zip(found, [("a", (5, 9, 3, 8, 20, 6)), ("b", (11, 4, 3, 40))], strict=False):
        torch.testing.assert_close(row, alone(decoder, name, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("space", ["probability", "logit"])
@pytest.mark.parametrize("weights", [None, (0.5, 0.3, 0.2), (0.0, 0.25, 0.75)])
def test_members_count_as_the_read_out_says(space: TokenSpace, weights: tuple[float, ...] | None) -> None:
    decoder = replace(decoder_of(tiny_ensemble()), space=space, weights=weights)
    each = [alone(replace(decoder, members=[member], weights=None), *PROMPTS[0]).numpy() for member in MEMBERS]
    wanted = average(np.stack(each)[:, None], space, weights)[0]
    np.testing.assert_allclose(alone(decoder, *PROMPTS[0]).numpy(), wanted, rtol=0, atol=1e-5)


def test_tokens_are_drawn_by_their_tempered_probability_within_top_p() -> None:
    probabilities, random, draws = np.array([0.1, 0.4, 0.2, 0.3]), np.random.default_rng(0), 4000
    logs = np.log(probabilities)
    every = (0, 1, 2, 3)
    for temperature, top_p, kept in ((1.0, 1.0, every), (0.5, 1.0, every), (1.0, 0.65, (1, 3)), (2.0, 0.01, (1,))):
        expected = np.where(np.isin(range(4), kept), probabilities ** (1 / temperature), 0.0)
        found = [choose(logs, Sampling(temperature, top_p, None), random) for _ in range(draws)]
        for token, p in enumerate(expected / expected.sum()):
            if 0.0 < p < 1.0:
                assert abs(z_score(found.count(token), draws, float(p))) < 4.5
            else:
                assert found.count(token) == draws * p
    assert choose(np.log([0.25, 0.25, 0.5, 0.0 + 1e-9]), Sampling(0.0, 0.1, None), random) == 2
    assert choose(np.array([0.0, -np.inf]), Sampling(1.0, 1.0, None), random) == 0


def test_halves_of_characters_and_of_stop_texts_are_not_told() -> None:
    """Tokens 1 and 2 are one character together; 3 is "a", 4 "b", 0 the end."""
    pieces = {1: b"\xc3", 2: b"\xa4", 3: b"a", 4: b"b", 9: b"?"}
    tokenizer = SimpleNamespace(
        all_special_ids=[0],
        decode=lambda ids, **more: b"".join(pieces[one] for one in ids).decode(errors="replace"),
    )

    def told(tokens: list[int], stops: list[str]) -> list[tuple[str, str | None]]:
        writer = SequenceWriter(tokenizer, [9], Sampling(0.0, 1.0, None), 9, stops, {0}, None)  # type: ignore[arg-type]
        found = []
        for token in tokens:
            writer.take(torch.eye(5)[token].log())
            news = writer.news()
            found.append(("-", None) if news is None else (news.text, news.ended))
        return found

    assert told([3, 1, 2, 0], []) == [("a", None), ("-", None), ("ä", None), ("", "stop")]
    assert told([1, 0], []) == [("-", None), (BROKEN, "stop")], "what never was whole is told in the end"
    assert told([3, 3, 4, 4], ["abb"]) == [("-", None), ("a", None), ("-", None), ("", "stop")]
    assert told([3, 4, 3], ["abb"]) == [("-", None), ("-", None), ("ab", None)]
    assert told([3, 4, 0], ["abb"])[-1] == ("ab", "stop"), "a stop text that never ended is text"
