"""The cache of tokens: the second start reads what the first one made, and never anything else."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import pipeline.data.cache
from pipeline.data.cache import (
    FILE,
    StoredExamples,
    cached_examples,
    entry_name,
    lengths_of,
    remove_old,
    write_examples,
)
from pipeline.data.encode import Encoded, encode_training_rows
from pipeline.data.rows import Row
from pipeline.errors import DataError
from pipeline.support.tiny import byte_level_tokenizer

ROWS = [Row(f"r{i}", prompt=f"Question {i} é 漢", completion="yes " * (1 + i % 3)) for i in range(30)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


class Encoder:
    """Counts how often it is asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        self.calls += 1
        return encode_training_rows(rows, self.tokenizer, 64)


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def test_another_way_to_make_tokens_makes_another_entry(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set()
    for number in (1, pipeline.data.cache.ENCODING):  # 1: when choices were never closed
        monkeypatch.setattr(pipeline.data.cache, "ENCODING", number)
        names.add(entry_name(ROWS, tokenizer, "CausalLMTask 64"))
    assert len(names) == 2


def test_what_is_stored_is_what_was_encoded(tmp_path: Path) -> None:
    examples = [
        Encoded("a", (1, 2, 3), (-100, 2, 3)), Encoded("b é", (4,), (7,), (0,), None),
        Encoded("c", (5, 6), (-100, -100), (0, 1), -1.5), Encoded("d", tuple(range(3000)), (-100,) * 3000),
    ]
    write_examples(examples, tmp_path / FILE)
    stored = StoredExamples(tmp_path / FILE)
    assert list(stored) == examples and stored[1:3] == examples[1:3] and stored[-1] == examples[-1]
    assert [example.supervised for example in stored] == [2, 1, 0, 0]
    assert lengths_of(stored) == lengths_of(examples) == [3, 1, 2, 3000]
    assert not stored._ids.flags.owndata and not stored._ids.flags.writeable  # a view of the mapped file
    with pytest.raises(IndexError):
        stored[4]


def test_the_second_start_encodes_nothing(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    encode = Encoder(tokenizer)
    first = cached_examples(ROWS, encode, tokenizer, "causal 64")
    second = cached_examples(list(ROWS), encode, byte_level_tokenizer(), "causal 64")
    assert encode.calls == 1 and list(first) == list(second) == encode_training_rows(ROWS, tokenizer, 64)
    assert len(entries(cache)) == 1


def test_whatever_decides_the_tokens_makes_another_entry(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    encode = Encoder(tokenizer)
    other_template = byte_level_tokenizer()
    other_template.chat_template = "{{ messages }}"
    other_words = byte_level_tokenizer()
    other_words.add_tokens(["Question"])
    changed = [*ROWS[:-1], Row("r29", prompt=ROWS[-1].prompt, completion="no")]
    for rows, made, reading in [
        (ROWS, tokenizer, "causal 64"), (ROWS, tokenizer, "causal 63"), (ROWS, other_template, "causal 64"),
        (ROWS, other_words, "causal 64"), (changed, tokenizer, "causal 64"), (ROWS[:-1], tokenizer, "causal 64"),
        (ROWS[::-1], tokenizer, "causal 64"),
    ]:
        cached_examples(rows, encode, made, reading)
    assert encode.calls == len(entries(cache)) == 7


@pytest.mark.parametrize("damage", ["flipped", "cut", "no file", "no manifest"])
def test_a_damaged_entry_is_made_again(
    tokenizer: PreTrainedTokenizerFast, cache: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    encode = Encoder(tokenizer)
    expected = list(cached_examples(ROWS, encode, tokenizer, "x"))
    (entry,) = entries(cache)
    content = bytearray((entry / FILE).read_bytes())
    if damage == "no manifest":
        (entry / "manifest.json").unlink()
    elif damage == "no file":
        (entry / FILE).unlink()
    else:
        content[len(content) // 2] ^= 1
        (entry / FILE).write_bytes(content if damage == "flipped" else content[:-9])
    with caplog.at_level(logging.WARNING):
        assert list(cached_examples(ROWS, encode, tokenizer, "x")) == expected
    assert encode.calls == 2 and "damaged" in caplog.text
    assert list(cached_examples(ROWS, encode, tokenizer, "x")) == expected and encode.calls == 2


def test_faults_of_the_data_pass_through_and_leave_no_entry(tokenizer: PreTrainedTokenizerFast, cache: Path) -> None:
    def refuse(rows: Sequence[Row]) -> list[Encoded]:
        raise DataError("data.path", None, "is faulty")

    with pytest.raises(DataError, match="faulty"):
        cached_examples(ROWS, refuse, tokenizer, "x")
    assert not entries(cache)


def test_without_a_writable_folder_rows_are_encoded_every_time(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "file"))
    encode = Encoder(tokenizer)
    with caplog.at_level(logging.WARNING):
        assert list(cached_examples(ROWS, encode, tokenizer, "x")) == encode_training_rows(ROWS, tokenizer, 64)
    assert encode.calls == 1 and "not kept" in caplog.text


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(["new", "middle", "old"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE).write_bytes(bytes(100))
        os.utime(tmp_path / name, times=(time.time() - 100 * age,) * 2)
    remove_old(tmp_path, keep=tmp_path / "old", most_bytes=250)
    assert [path.name for path in entries(tmp_path)] == ["new", "old"]
    remove_old(tmp_path, keep=tmp_path / "old", most_bytes=10)
    assert [path.name for path in entries(tmp_path)] == ["old"]


def _start(log: Path) -> None:
    tokenizer = byte_level_tokenizer()

    def encode(rows: Sequence[Row]) -> list[Encoded]:
        with log.open("a") as file:
            file.write("encoded\n")
        time.sleep(0.3)
        return encode_training_rows(rows, tokenizer, 64)

    assert len(cached_examples(ROWS, encode, tokenizer, "x")) == len(ROWS)


def test_two_processes_encode_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_start, args=(tmp_path / "log",)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "log").read_text() == "encoded\n"


def test_tokens_are_not_copied_into_memory(tmp_path: Path) -> None:
    write_examples([Encoded(str(i), (i,) * 1000, (-100,) * 1000) for i in range(50)], tmp_path / FILE)
    stored = StoredExamples(tmp_path / FILE)
    (tmp_path / FILE).unlink()  # as an eviction by another process
    assert stored[49].input_ids == (49,) * 1000 and np.array_equal(stored.lengths, [1000] * 50)
