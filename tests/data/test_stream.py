"""Streamed rows: the row at a position depends on nothing but seed and position, and only blocks are in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.adapters.spec import AdapterSpec
from pipeline.config import DataConfig, RunConfig, load_config
from pipeline.config.method import Site
from pipeline.data.encode import encode_training_rows
from pipeline.data.read import Record
from pipeline.data.rows import Row
from pipeline.data.shapes.reading import SEEN
from pipeline.data.splits import load_splits
from pipeline.data.stream import RowStream, StreamedBatches, open_stream
from pipeline.errors import ConfigError, DataError
from pipeline.plan.preflight import check_inputs
from pipeline.support.tiny import tiny_tokenizer
from pipeline.training.loader import open_loader

SIZES = {"validation_rows": 5, "calibration_rows": 4, "test_rows": 6}


def record(i: int) -> dict[str, Any]:
    return {"prompt": f"the film {i}", "choices": [" good", " bad"], "label": i % 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "rows.jsonl"
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(57)))
    return path


def config_of(file: Path, **changes: Any) -> DataConfig:
    return DataConfig(path=str(file), streaming=True, shuffle_rows=10, **{**SIZES, **changes})


def stream_of(file: Path, seed: int = 0, **changes: Any) -> RowStream:
    config = config_of(file, **changes)
    return open_stream(config, load_splits(config), seed)


def prompts(rows: Iterator[Row], count: int) -> list[str]:
    return [row.prompt for row in islice(rows, count)]


def test_every_epoch_has_every_row_once_and_none_of_the_other_splits(file: Path) -> None:
    splits = load_splits(config_of(file))
    others = {row.prompt for rows in (splits.validation, splits.calibration, splits.test) for row in rows}
    assert len(others) == 15
    train = {f"the film {i}" for i in range(57)} - others
    chain = prompts(stream_of(file).from_position(0), 3 * 42)
    epochs = [chain[42 * e : 42 * (e + 1)] for e in range(3)]
    assert all(Counter(epoch) == Counter(train) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    place = {name: i for i, name in enumerate(name for name in (f"the film {i}" for i in range(57)) if name in train)}
    assert [sorted(place[name] // 10 for name in epochs[0][i : i + 10]) for i in range(0, 40, 10)] == [
        [block] * 10 for block in range(4)
    ]  # a block is shuffled in itself
    assert [place[name] for name in epochs[0]] != sorted(place[name] for name in epochs[0])
    assert prompts(stream_of(file, seed=1).from_position(0), 42) != epochs[0]


def test_units_of_the_other_splits_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**record(i), "unit": f"U{i // 3}"}) + "\n" for i in range(57)))
    splits = load_splits(config_of(path))
    others = {row.unit for rows in (splits.validation, splits.calibration, splits.test) for row in rows}
    seen = {row.unit for row in islice(stream_of(path).from_position(0), 57)}
    assert len(seen) == 19 - len(others) and not seen & others


@settings(max_examples=12)
@given(st.integers(0, 130))
def test_any_position_is_found_again(file: Path, position: int) -> None:
    stream = stream_of(file)
    assert prompts(stream.from_position(position), 9) == prompts(stream.from_position(0), position + 9)[position:]


def test_train_rows_end_an_epoch_early(file: Path) -> None:
    chain = prompts(stream_of(file, train_rows=12).from_position(0), 36)
    assert len(set(chain)) == 12 and Counter(chain) == Counter(chain[:12] * 3)


def test_splits_come_from_the_first_rows_of_a_source_without_end(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = 0

    def endless(path: Path) -> Iterator[Record]:
        nonlocal read
        while True:
            yield f"row {read}", record(read)
            read += 1

    monkeypatch.setattr("pipeline.data.sources.read_file", endless)
    config = config_of(file)
    splits = load_splits(config)
    assert (len(splits.validation), len(splits.calibration), len(splits.test)) == (5, 4, 6) and read <= 2001 + SEEN
    read = 0
    rows = prompts(open_stream(config, splits, 0).from_position(0), 30)
    assert len(set(rows)) == 30 and read <= 50 + SEEN  # whole blocks, and the rows of other splits


def test_a_fault_in_the_middle_names_its_line(file: Path, tmp_path: Path) -> None:
    lines = file.read_text().splitlines()
    for number, (line, part) in enumerate([("{}", "columns"), ('{"prompt"', "JSON")]):
        faulty = tmp_path / f"{number}.jsonl"
        config = config_of(faulty)
        faulty.write_text("\n".join(lines))
        splits = load_splits(config)
        faulty.write_text("\n".join([*lines[:40], line, *lines[40:]]))
        with pytest.raises(DataError, match=f"{faulty}:41.*{part}"):
            prompts(open_stream(config, splits, 0).from_position(0), 42)


def batches(file: Path, global_batch: int = 4) -> StreamedBatches:
    tokenizer = tiny_tokenizer()
    return StreamedBatches(stream_of(file), lambda rows: encode_training_rows(rows, tokenizer, 64), global_batch)


def test_steps_are_the_same_one_after_another_and_from_the_middle(file: Path) -> None:
    whole = batches(file)
    names = []
    for step in range(25):
        names.append([whole.row(*place).example for place in whole.places(step)])
    assert [whole.row(*place).example for place in whole.places(3)] == names[3]  # and back
    for step in (0, 7, 24):
        again = batches(file)
        assert [again.row(*place).example for place in again.places(step)] == names[step]
        assert [again.row(*place).example for place in again.places(step + 1)][:1] != names[step][:1]


def test_processes_share_a_streamed_global_batch(file: Path) -> None:
    config = load_config(None, ["train.global_batch=4", "train.micro_batch=1", "train.draws=2"])
    spec = AdapterSpec(rank=4, sites=(Site(position="lora_A", rate=0.5),))

    def rows(processes: int, *more: str) -> Counter[tuple[str, int | None]]:
        found: Counter[tuple[str, int | None]] = Counter()
        wanted = load_config(None, [*more, "train.global_batch=4", "train.micro_batch=1", "train.draws=2"])
        for rank in range(processes):
            loader = open_loader(wanted.train, wanted.data.max_tokens, [], spec, rank, processes, batches(file))
            assert "streamed rows" in loader.describe(1) and loader.rows is None
            for micro in loader.of_step(3).micros:
                for row, (source, weight) in enumerate(zip(micro.layout.source, micro.layout.weights, strict=True)):
                    if weight:
                        draw = micro.layout.members[row // micro.layout.rows].draw
                        found[micro.examples[source].example, draw] += 1
        return found

    assert config.train.global_batch == rows(1).total()
    assert rows(1) == rows(2) == rows(4) == rows(1, "train.micro_tokens=20") == rows(2, "train.micro_tokens=20")


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        (["data.streaming=true", "train.packing=true"], "train.packing.*lengths"),
        (["data.streaming=true", "train.epochs=2"], "data.streaming.*max_steps"),
        (["train.packing=true", "train.epochs=2"], "train.packing.*epochs"),
        (["data.streaming=true", "model.kind=classifier"], "data.streaming.*choices"),
        (["train.packing=true", "model.kind=classifier"], "train.packing.*one text"),
    ],
)
def test_what_does_not_go_together_is_refused(file: Path, wanted: list[str], part: str) -> None:
    sizes = [f"data.{name}={value}" for name, value in SIZES.items()]
    config: RunConfig = load_config(None, [f"data.path={file}", *sizes, *wanted])
    with pytest.raises(ConfigError, match=part):
        check_inputs(config)
