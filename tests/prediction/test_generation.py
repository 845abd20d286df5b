"""Texts for rows: where the answer begins, what ends a text, and processes that share prompts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.families import LORA_DROPOUT, trained_start

from pipeline.adapters.attach import attach
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.evaluate import GenerateConfig
from pipeline.data.encode import IGNORE_INDEX, Encoded, encode_candidates
from pipeline.data.rows import Row
from pipeline.distributed.world import lone_world
from pipeline.errors import ConfigError, Stopped
from pipeline.prediction import generation
from pipeline.prediction.decode import Decoder
from pipeline.prediction.generation import Writing, end_tokens, prompt_of
from pipeline.prediction.passes import PassSettings
from pipeline.prediction.search import SearchSettings, search
from pipeline.support.tiny import byte_level_tokenizer, tiny_llama, tiny_tokenizer

WORDS = ("the film was good", "a story", "very very bad and so poor", "it is not fine", "the actor was awful")
ROWS = [Row(f"r{n}", f"Review: {text} Sentiment:", completion=" positive") for n, text in enumerate(WORDS)]
SYSTEMS = {"base": [Member(None)], "masks_2": [Member(0, 0), Member(0, 1)]}
SETTINGS = GenerateConfig(max_tokens=6)


@pytest.fixture(scope="module")
def writing() -> Writing:
    spec = AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT)
    adapters = trained_start(attach(tiny_llama(), [spec], "all-linear", seed=0), size=0.5)
    passes = PassSettings(2, 30, MaskKey(4, "test"))  # three passes or more
    task: Any = SimpleNamespace(base=SimpleNamespace(tokenizer=tiny_tokenizer()), max_tokens=64, passes=passes)
    return Writing(task, adapters, SETTINGS, lone_world())


def test_the_prompt_is_what_precedes_the_last_answer() -> None:
    completion = Encoded("a", (5, 6, 7, 2), (IGNORE_INDEX, IGNORE_INDEX, 7, 2))
    assert prompt_of(completion).input_ids == (5, 6)
    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"})
    tokenizer = byte_level_tokenizer()
    chat = prompt_of(encode_candidates(Row("c", messages=turns * 2), tokenizer, 500)[0])
    text = tokenizer.decode(chat.input_ids)
    assert text.endswith("<|im_start|>assistant\n") and text.count("yes") == 1
    assert set(chat.labels) == {IGNORE_INDEX}


def test_a_text_ends_with_what_training_has_put_behind_it_or_the_model_names() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    assert end_tokens(tokenizer, model) == (2,)
    model.generation_config.eos_token_id = [9, 2, 5]  # type: ignore[union-attr]
    assert end_tokens(tokenizer, model) == (2, 9, 5)


@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS.model_copy(update={"beams": 3})])
def test_every_system_writes_for_every_row_in_order(writing: Writing, settings: GenerateConfig) -> None:
    writing = replace(writing, settings=settings)
    texts, seconds = writing.write(ROWS, SYSTEMS)
    assert [(text.system, text.id) for text in texts] == [(key, row.id) for key in SYSTEMS for row in ROWS]
    assert seconds.keys() == SYSTEMS.keys()
    prompts = [prompt_of(encode_candidates(row, tiny_tokenizer(), 64)[0]) for row in ROWS]
    for key, members in SYSTEMS.items():
        wanted = SearchSettings((2,), 6, beams=settings.beams)
        alone = search(Decoder(writing.adapters, members, MaskKey(4, "test"), 2), prompts, wanted)
        own = [text for text in texts if text.system == key]
        for text, found in zip(own, alone, strict=True):
            words = tiny_tokenizer().decode([token for token in found.tokens if token != 2], skip_special_tokens=True)
            assert (text.text, text.tokens, text.ended) == (words.strip(), len(found.tokens), found.ended)
            assert text.log_prob == pytest.approx(found.log_prob, abs=1e-4)


@pytest.mark.parametrize("together", [False, True], ids=["shared", "sharded"])
def test_processes_share_prompts(writing: Writing, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = writing.write(ROWS, SYSTEMS)
    monkeypatch.setattr(generation.zero, "is_sharded", lambda model: together)
    shares: list[Any] = []

    def gathered(value: Any) -> list[Any]:
        shares.append(value)
        return [value]

    monkeypatch.setattr(generation, "gather_objects", gathered)
    for rank in range(2):
        replace(writing, world=replace(lone_world(), process_rank=rank, world_size=2)).write(ROWS, SYSTEMS)
    assert [len(share[0]) for share in shares] == ([10, 10] if together else [6, 4])
    monkeypatch.setattr(generation, "gather_objects", lambda value: shares)
    texts, seconds = writing.write(ROWS, SYSTEMS)
    assert [(one.id, one.system, one.text) for one in texts] == [(one.id, one.system, one.text) for one in whole]
    assert seconds["base"] == max(share[1]["base"] for share in shares)


def test_a_stop_ends_it_on_every_process(writing: Writing, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    stopping = replace(writing, on_chunk=lambda done, total: asked.append(done), stop_asked=lambda: len(asked) == 2)
    with pytest.raises(Stopped):
        stopping.write(ROWS, SYSTEMS)
    assert len(asked) == 2
    monkeypatch.setattr(generation, "gather_objects", lambda value: [value, ([], {}, True)])
    with pytest.raises(Stopped):
        writing.write(ROWS, SYSTEMS)


def test_a_prompt_that_leaves_no_positions_for_the_text_is_refused(writing: Writing) -> None:
    with pytest.raises(ConfigError, match=r"has 128 positions\. Set it to 120 or less"):
        replace(writing, settings=GenerateConfig(max_tokens=200)).write(ROWS, SYSTEMS)
    assert torch.is_grad_enabled()
