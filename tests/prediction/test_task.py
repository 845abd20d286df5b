"""What a task answers by itself: how long its rows are, whether they can be streamed, what settings it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.adapters.members import MaskKey
from pipeline.config import DataConfig, RunConfig, TrainConfig, build_config
from pipeline.data.encode import Encoded
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError
from pipeline.prediction import task as module
from pipeline.prediction.task import (
    CausalLMTask,
    ClassificationTask,
    RegressionTask,
    Task,
    open_task,
    training_examples,
    training_stream,
)
from pipeline.support.tiny import POSITIONS, write_encoder

ANSWERS = {
    CausalLMTask: {"completion": " x"}, ClassificationTask: {"choices": ["a", "b"], "label": 1},
    RegressionTask: {"score": 2.0},
}
KINDS = list(ANSWERS)


def configured(folder: Path, kind: type[Task], model: Path, **data: object) -> RunConfig:
    rows = [json.dumps({"prompt": f"the film {i}", **ANSWERS[kind]}) + "\n" for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    sizes = {f"{split}_rows": 2 for split in ("validation", "calibration", "test")}
    return build_config({
        "data": {"path": str(folder / "rows.jsonl"), "max_tokens": POSITIONS + 6, **sizes, **data},
        "model": {"path": str(model), "kind": "causal" if kind is CausalLMTask else "classifier"},
        "train": {"label_smoothing": 0.25}, "evaluate": {"batch_tokens": 99}, "ensemble": {"seed": 5},
    })


@pytest.fixture
def model(tmp_path: Path, tiny_folder: Path) -> dict[type[Task], Path]:
    write_encoder(tmp_path / "encoder", "bert")
    encoder = tmp_path / "encoder"
    return {CausalLMTask: tiny_folder / "model", ClassificationTask: encoder, RegressionTask: encoder}


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_holds_the_values_that_it_reads(tmp_path: Path, model: dict[type[Task], Path], kind: type[Task]) -> None:
    config = configured(tmp_path, kind, model[kind])
    task = open_task(config, load_splits(config.data), torch.device("cpu"))
    assert type(task) is kind and task.max_tokens == (POSITIONS + 6 if kind is CausalLMTask else POSITIONS)
    assert (task.label_smoothing, task.passes.budget_tokens, task.passes.key) == (0.25, 99, MaskKey(5, "test"))
    assert task.passes.pad_id == task.base.tokenizer.pad_token_id and task.passes.on_chunk is None


@pytest.mark.parametrize("kind", KINDS)
def test_only_answers_in_words_can_be_streamed(tmp_path: Path, model: dict[type[Task], Path], kind: type[Task]) -> None:
    config = configured(tmp_path, kind, model[kind])
    splits = load_splits(config.data)
    task, streaming = open_task(config, splits, torch.device("cpu")), config.data.model_copy(update={"streaming": True})
    assert training_stream(task, splits, config.data, TrainConfig()) is None
    if kind is CausalLMTask:
        stream = training_stream(task, splits, streaming, TrainConfig(global_batch=4, micro_batch=4))
        assert stream is not None and len(stream.places(0)) == 4
    else:
        with pytest.raises(ConfigError, match="data.streaming = True: a classifier needs to know that all rows"):
            training_stream(task, splits, streaming, TrainConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_kept_tokens_are_named_by_task_and_longest_row(monkeypatch: pytest.MonkeyPatch, kind: type[Task]) -> None:
    named: list[str] = []

    def cached(rows: object, encode: object, tokenizer: object, reading: str) -> list[Encoded]:
        named.append(reading)
        return []

    class Base:
        tokenizer = None

    monkeypatch.setattr(module, "cached_examples", cached)
    training_examples(kind(Base(), 48, 0.0, None), [], DataConfig(cache=True))
    assert named == [f"{kind.__name__} 48"]
