"""Greedy and beam search token by token as transformers' `generate`; of several members, as without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.families import LORA_DROPOUT, trained_start
from torch import nn
from transformers import GenerationConfig

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.prediction.decode import Decoder
from pipeline.prediction.search import Found, SearchSettings, search
from pipeline.support.tiny import tiny_decoder

PAD, ENDS = 2, (2, 17)
"""Random models seldom end a text: two tokens do, and the beams of the tests find them."""
PROMPTS = [[5, 9, 3, 8], [11, 4], [7, 7, 30, 12, 13, 50, 6], [33, 21, 21]]
KEY = MaskKey(7, "test")


def encoded(prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Encoded]:
    return [Encoded(f"row-{n}", tuple(ids), (IGNORE_INDEX,) * len(ids)) for n, ids in enumerate(prompts)]


def stock(model: nn.Module, prompt: Sequence[int], settings: SearchSettings) -> list[int]:
    """What transformers generates for one prompt, given as embeddings: n-grams are then of the generated text alone."""
    config = GenerationConfig(
        max_new_tokens=settings.max_tokens, min_new_tokens=settings.min_tokens or None, num_beams=settings.beams,
        length_penalty=settings.length_penalty, no_repeat_ngram_size=settings.no_repeat_ngram or None,
        early_stopping=settings.early_stopping, eos_token_id=list(settings.ends), pad_token_id=PAD, do_sample=False,
    )
    ids = torch.tensor([prompt])
    given: dict[str, Any] = {
        "inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids),  # type: ignore[operator]
    }
    found: list[int] = model.generate(**given, generation_config=config)[0].tolist()  # type: ignore[operator]
    ends = [place for place, token in enumerate(found) if token in settings.ends]
    return found[: ends[0] + 1] if ends else found


def lively(family: str, seed: int) -> nn.Module:
    """A random model whose next tokens are neither certain nor all alike, and that now and then ends a text."""
    model = tiny_decoder(family, seed)
    with torch.no_grad():
        model.get_output_embeddings().weight[list(ENDS)] *= 1.7  # type: ignore[operator, index]
    return model


CASES = [
    SearchSettings(ENDS, 12),
    SearchSettings(ENDS, 12, min_tokens=5, no_repeat_ngram=2),
    SearchSettings(ENDS, 12, beams=4, length_penalty=0.9, no_repeat_ngram=4),
    SearchSettings(ENDS, 9, beams=3, length_penalty=2.0, early_stopping=True),
    SearchSettings(ENDS, 9, beams=3, length_penalty=-1.0, no_repeat_ngram=1),
    SearchSettings(ENDS, 10, beams=5, length_penalty=0.0, min_tokens=3, early_stopping="never"),
    SearchSettings(ENDS[:1], 10, beams=2, length_penalty=1.5, early_stopping="never"),
    SearchSettings(ENDS, 1, beams=3),
]


@pytest.mark.parametrize("settings", CASES, ids=range(len(CASES)))
def test_one_member_is_transformers_token_by_token(settings: SearchSettings) -> None:
    ended = []
    for family, seed in itertools.product(("llama", "gpt2"), (0, 1)):
        model = lively(family, seed)
        wanted = [stock(model, prompt, settings) for prompt in PROMPTS]
        adapters = attach(model, [AdapterSpec(rank=2, alpha=4.0)], "all-linear", seed=0)
        found = search(Decoder(adapters, [Member(None)], KEY, PAD), encoded(), settings)
        assert [list(one.tokens) for one in found] == wanted
        ended += [one.ended for one in found]
        assert all(one.ended == (one.tokens[-1] in settings.ends) for one in found)
    if settings.max_tokens > 1 and settings.beams > 1:
        assert any(ended), "no text ends: the case tries nothing"


SPECS = (AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT), AdapterSpec(rank=2, alpha=8.0))
MEMBERS = [Member(0, 0), Member(1), Member(0, 1), Member(None)]


def dense(adapters: Adapters, prompt: Sequence[int], settings: SearchSettings) -> tuple[list[int], float]:
    """Beams as plain lists: every member is run by itself over whole sequences, and their probabilities averaged."""

    def expected(text: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prompt, *text]])
        parts = []
        for member in MEMBERS:
            with adapters.axis.active(adapters.plan([member], 1, KEY)), torch.no_grad():
                parts.append(adapters.model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1))
        return torch.stack(parts).mean(0).log()

    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, float, list[int]]] = []
    for length in range(1, settings.max_tokens + 1):
        grown = [
            (total + gain, [*text, token])
            for total, text in running for token, gain in enumerate(expected(text).tolist())
        ]
        grown.sort(key=lambda one: -one[0])
        stops = [length == settings.max_tokens or text[-1] in settings.ends for _, text in grown]
        for (total, text), stop in list(zip(grown, stops, strict=True))[: settings.beams]:
            if stop:
                finished.append((total / length**settings.length_penalty, total, text))
        finished = sorted(finished, key=lambda one: -one[0])[: settings.beams]
        running = [one for one, stop in zip(grown, stops, strict=True) if not stop][: settings.beams]
        if not running or settings.beams == len(finished) == 1:
            break
        if len(finished) == settings.beams and running[0][0] / length**settings.length_penalty <= finished[-1][0]:
            break
    return finished[0][2], finished[0][1]


@pytest.mark.parametrize(
    "settings", [SearchSettings(ENDS, 8), SearchSettings(ENDS, 8, beams=3, length_penalty=0.9)], ids=["greedy", "beam"]
)
def test_several_members_write_one_text_by_their_average(settings: SearchSettings) -> None:
    adapters = trained_start(attach(lively("llama", 0).double(), list(SPECS), "all-linear", seed=0), size=0.5)
    together = search(Decoder(adapters, MEMBERS, KEY, PAD), encoded(), settings)
    alone = [search(Decoder(adapters, [member], KEY, PAD), encoded(), settings) for member in MEMBERS]
    for prompt, found in zip(PROMPTS, together, strict=True):
        tokens, total = dense(adapters, prompt, settings)
        assert list(found.tokens) == tokens
        assert found.log_prob == pytest.approx(total, abs=1e-4)
    assert all(one != together for one in alone), "the members agree: the average is not tried"


def test_rows_of_a_batch_do_not_change_each_other() -> None:
    adapters = trained_start(attach(lively("llama", 3), list(SPECS), "all-linear", seed=0))
    decoder = Decoder(adapters, MEMBERS, KEY, PAD)
    for settings in CASES[:3]:
        whole = search(decoder, encoded(), settings)
        single: list[Found] = [found for row in encoded() for found in search(decoder, [row], settings)]
        assert [one.tokens for one in single] == [one.tokens for one in whole]
