"""Choices of which one begins another: learnt, scored and chosen like any other; the rules of `data.choice_score`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.adapters.attach import attach
from pipeline.adapters.members import Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import build_config
from pipeline.data.encode import IGNORE_INDEX, encode_candidates, encode_training
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError, RunFolderError
from pipeline.plan.preflight import check_inputs
from pipeline.prediction.task import CausalLMTask, open_task
from pipeline.run_folder.predictions import ChoicePredictions, read_predictions, write_predictions
from pipeline.support.tiny import byte_level_tokenizer, tiny_decoder, write_encoder

NUMBERS = (" 1", " 12", " 123")
ROWS = [Row(f"r{label}", f"{word}:", NUMBERS, label) for label, word in enumerate(("few", "some", "many"))]
REVIEWS = [Row(f"s{i}", f"the film {i} is", (" good", " a good film", " bad"), i % 3) for i in range(4)]


def trained(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> PreTrainedModel:
    """A tiny model that has learnt the rows as training sees them."""
    model = tiny_decoder("llama", vocab_size=len(tokenizer))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    examples = [encode_training(row, tokenizer, 64) for row in rows]
    for _ in range(40):
        for example in examples:
            model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def task_of(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **data: Any) -> CausalLMTask:
    """The task of a model folder, as a stage opens it."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": f"film {i}", "choices": ["a", "b"], "label": 0}) for i in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    sizes = {f"{split}_rows": 2 for split in ("validation", "calibration", "test")}
    config = build_config({
        "model": {"path": str(folder / "model"), "quantization": "none", "compute_dtype": "float32"},
        "data": {"path": str(folder / "rows.jsonl"), **sizes, **data},
    })
    task = open_task(config, load_splits(config.data), torch.device("cpu"))
    assert isinstance(task, CausalLMTask)
    return task


def predict(task: CausalLMTask, rows: list[Row]) -> ChoicePredictions:
    """By the base model, and by an adapter that has not learnt anything."""
    adapters = attach(task.base.model, [AdapterSpec(rank=2, alpha=4.0)], "all-linear", seed=0)
    found = task.predict(adapters, rows, [Member(None), Member(0)])
    assert isinstance(found, ChoicePredictions)
    return found


def teacher_forced(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) of the stock model in float64, token by token."""
    logits = model.double()(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


def test_each_of_three_numbers_is_chosen_when_it_is_right(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    model = trained(tokenizer, ROWS)
    open_ends = np.array([
        [teacher_forced(model, tokenizer(row.prompt)["input_ids"], tokenizer(text)["input_ids"]) for text in NUMBERS]
        for row in ROWS
    ])
    assert (np.diff(open_ends, axis=1) < 0).all(), "without an end the shortest wins"
    task = task_of(tmp_path, model.float(), tokenizer)
    found = predict(task, ROWS)
    assert found.log_probs.argmax(-1).tolist() == [[0, 1, 2]] * 2
    assert np.exp(found.log_probs[0, [0, 1, 2], [0, 1, 2]]).min() > 0.9
    assert found.likelihoods is not None
    end = tokenizer.eos_token_id
    for n, row in enumerate(ROWS):
        prompt = tokenizer(row.prompt)["input_ids"]
        wanted = [teacher_forced(model, prompt, [*tokenizer(text)["input_ids"], end]) for text in NUMBERS]
        assert found.likelihoods.log_likelihoods[0, n] == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    assert found.likelihoods.tokens.tolist() == [[3, 4, 5]] * 3  # blank, digits, end
    assert found.likelihoods.characters.tolist() == [[1, 2, 3]] * 3


def test_training_closes_what_scoring_closes() -> None:
    tokenizer = byte_level_tokenizer()
    for row in [*ROWS, *REVIEWS]:
        candidates = encode_candidates(row, tokenizer, 64)
        closed = {answer.labels[-1] == tokenizer.eos_token_id for answer in candidates}
        assert closed == {row.choices == NUMBERS}
        assert encode_training(row, tokenizer, 64) == candidates[row.label or 0]
        assert candidates[0].labels.count(IGNORE_INDEX) == len(tokenizer(row.prompt)["input_ids"])


def test_rows_without_such_choices_are_scored_as_ever(tmp_path: Path) -> None:
    """Bit by bit the normalised sums that predictions were before choices could be closed."""
    tokenizer = byte_level_tokenizer()
    model = tiny_decoder("llama", vocab_size=len(tokenizer))
    task = task_of(tmp_path, model, tokenizer)
    found = predict(task, [*REVIEWS, *ROWS])
    alone = predict(task_of(tmp_path, model, tokenizer), REVIEWS)
    assert found.likelihoods is not None and alone.likelihoods is not None
    scores = alone.likelihoods.log_likelihoods
    peak = scores.max(axis=-1, keepdims=True)
    before = (scores - peak - np.log(np.exp(scores - peak).sum(axis=-1, keepdims=True))).astype(np.float32)
    assert np.array_equal(alone.log_probs, before)
    assert found.log_probs[:, : len(REVIEWS)] == pytest.approx(before, abs=1e-5)  # other rows stand in its passes
    for n, row in enumerate(REVIEWS):
        prompt = tokenizer(row.prompt)["input_ids"]
        wanted = [teacher_forced(model, prompt, tokenizer(text)["input_ids"]) for text in row.choices]
        assert scores[0, n] == pytest.approx(wanted, rel=1e-5)


def test_every_rule_is_served_by_the_predictions_of_one_pass(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    model = tiny_decoder("llama", vocab_size=len(tokenizer))
    rows = [*REVIEWS, *ROWS]
    task = task_of(tmp_path, model, tokenizer, choice_score="per_token")
    assert task.choice_score == "per_token"
    write_predictions(tmp_path, "test", predict(task, rows))
    stored, tables = read_predictions(tmp_path, "test"), []
    for rule in ("sum", "per_token", "per_character"):
        direct = predict(replace(task_of(tmp_path, model, tokenizer), choice_score=rule), rows)
        again = stored.scored_by(rule)
        assert isinstance(again, ChoicePredictions) and np.array_equal(again.log_probs, direct.log_probs)
        assert np.array_equal(again.scored_by("per_token").outputs, stored.outputs)
        tables.append(again.log_probs)
    assert not any(np.array_equal(a, b) for a, b in zip(tables, tables[1:], strict=False))


def test_rules_that_cannot_be_applied_are_refused(tmp_path: Path) -> None:
    heads = ChoicePredictions(("a",), np.log(np.full((1, 1, 2), 0.5, dtype=np.float32)))
    assert heads.scored_by("sum") is heads
    with pytest.raises(RunFolderError, match="data.choice_score = 'per_token': needs log-likelihoods that were not"):
        heads.scored_by("per_token")
    write_encoder(tmp_path / "encoder", "bert")
    rows = [json.dumps({"prompt": f"film {i}", "choices": ["a", "b"], "label": 0}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    config = build_config({
        "model": {"path": str(tmp_path / "encoder"), "kind": "classifier"},
        "data": {"path": str(tmp_path / "rows.jsonl"), "choice_score": "per_character", "validation_rows": 2,
                 "calibration_rows": 2, "test_rows": 2},
    })
    splits = load_splits(config.data)
    for refused in (lambda: check_inputs(config), lambda: open_task(config, splits, torch.device("cpu"))):
        with pytest.raises(ConfigError, match="data.choice_score = 'per_character': .* Set data.choice_score=sum"):
            refused()
