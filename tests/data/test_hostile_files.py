"""Files that would hang, fill the memory or end in a traceback: each is refused by a sentence, in bounded time."""

from __future__ import annotations

import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.check import check_data
from pipeline.data.formats import json_text
from pipeline.data.read import READERS, read_file
from pipeline.data.sources import parse
from pipeline.errors import EXIT_USER, UserError
from pipeline.files import LONGEST_LINE

ROWS = [{"prompt": f"Question {i} ☃", "choices": [" yes", " no"], "label": i % 2, "id": f"row {i}"} for i in range(3)]


def refusal(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        check_data(DataConfig(path=str(path)))
    assert caught.value.exit_code == EXIT_USER and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def pipe(path: Path) -> None:
    """Somebody waits at its other end, and goes when it is opened: a test that fails does not hang."""
    os.mkfifo(path)
    Thread(target=lambda: path.open("wb").close(), daemon=True).start()


def bind(path: Path) -> None:
    os.chdir(path.parent)  # the address of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


NO_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "socket": bind,
    "device": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path),
    "dangling": lambda path: path.symlink_to(path.with_name("nowhere")),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.parquet"])
def test_what_is_no_file_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)  # and back
    NO_FILES[kind](tmp_path / name)
    for path in (tmp_path / name, tmp_path):
        text = refusal(path)
        if kind in ("loop", "dangling"):
            assert "does not exist" in text
        elif kind == "folder" and path != tmp_path:
            assert "has no train file; it holds nothing" in text
        else:
            assert f"{name}': is no regular file" in text
    if kind == "pipe":
        os.close(os.open(tmp_path / name, os.O_RDONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("path", ["/dev/zero", "~nobody-of-this-name/rows.jsonl", "/x/" + "y" * 300 + ".csv"])
def test_names_that_cannot_be_looked_at_are_refused(path: str) -> None:
    assert "data.path" in refusal(path)


BEGINNINGS = {
    "a.jsonl": (b'{"prompt": "', "a.jsonl:1: is a line"),
    "a.csv": (b"prompt,completion\n", "a.csv:2: is a line"),
    "a.tsv": (b"prompt\tcompletion\nQ\t", "a.tsv:2: is a line"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path, name: str) -> None:
    beginning, expected = BEGINNINGS[name]
    with (tmp_path / name).open("wb") as file:
        file.write(beginning)
        file.truncate(2**40)  # a hole of a terabyte
    tracemalloc.start()
    try:
        text = refusal(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 12 * LONGEST_LINE
    finally:
        tracemalloc.stop()
    assert expected in text and "of more than 16 MiB. Cut the text into rows" in text


def test_what_nobody_closes_ends_with_the_longest_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\nQ,A\n"Q' + (b"x" * 4095 + b"\n") * (LONGEST_LINE // 4096 + 100))
    assert "a.csv:3: is a row of more than 16 MiB" in refusal(path)
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"prompt": "Q", "completion": "A"}, {"prompt": "' + b"x" * (3 * LONGEST_LINE) + b'"}]')
    assert "a.json: row 2: is a row of more than 16 MiB" in refusal(path)


def test_the_longest_line_is_read(tmp_path: Path) -> None:
    path, ends = tmp_path / "a.jsonl", b'{"completion": "A", "prompt": ""}\n'
    path.write_bytes(ends.replace(b'""', b'"' + b"x" * (LONGEST_LINE - len(ends)) + b'"'))
    rows, _ = parse(read_file(path), None, "a")
    assert path.stat().st_size == LONGEST_LINE and len(rows[0].prompt) == LONGEST_LINE - len(ends)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_brackets_without_end_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text(f"prompt,choices,label\nQ,{DEEP},0\n")
    else:
        path.write_text(f'{"[" * (name == "a.json")}{{"prompt": "Q", "deep": {DEEP}')
    text = refusal(path)
    where = {"a.jsonl": ":1", "a.json": ": row 1", "a.csv": ":2: choices"}[name]
    assert f"{path}{where}" in text and "is nested too deeply" in text


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_name_twice_in_one_object_is_refused(tmp_path: Path, name: str, place: str) -> None:
    outside = '{"prompt": "Q", "completion": "A", "prompt": "P"}'
    inside = '[{"role": "user", "content": "Q", "role": "x"}]'
    row = outside if place == "outside" else f'{{"messages": {inside}}}'
    good = '{"prompt": "Q", "completion": "A"}'
    contents = {"a.jsonl": f"{good}\n{row}\n", "a.json": f"[{good},\n{row}]"}
    path = tmp_path / name
    if name == "a.csv":
        quoted = inside.replace('"', '""')
        path.write_text(f'messages\n"{quoted}"\n' if place == "inside" else "id,prompt,prompt\n1,Q,Q\n")
    else:
        path.write_text(contents[name])
    text = refusal(path)
    where = {"a.jsonl": ":2", "a.json": ": row 2", "a.csv": ":2: messages" if place == "inside" else ":1"}[name]
    assert f"{path}{where}" in text and "' twice" in text


def test_json_arrays_are_read_as_a_whole_would_be(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in ("[]", " [ ]\n", "", " "):
        path.write_text(text)
        assert list(read_file(path)) == []
    for text, expected in (
        ("[{}", "a.json:1: is not valid JSON (Expecting ',' delimiter, column 4)"),
        ("[{},\n]", "a.json:2: is not valid JSON (Expecting value, column 1)"),
        ("[{}]\n\n x", "a.json:3: is not valid JSON (Extra data, column 2)"),
        ('[\n{"a": "b', "a.json:2: is not valid JSON (Unterminated string starting at, column 7)"),
        ('[{"a": tru}]', "a.json:1: is not valid JSON (Expecting value, column 8)"),
        ('[{"a": "é\udcff"}]', "a.json: is not UTF-8 (byte 11)"),
        ("[1]", "a.json: row 1 = 1: is not a JSON object"),
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError) as caught:
            parse(read_file(path), TemplateConfig(prompt="x", completion="y"), "a.json")
        assert expected in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=20)
@given(st.lists(st.dictionaries(st.text(max_size=4), JSON, max_size=4)), st.integers(1, 40), st.booleans())
def test_json_arrays_may_be_cut_anywhere_while_they_are_read(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]], chunk: int, ascii: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text(json.dumps(records, ensure_ascii=ascii, indent=chunk % 3 or None), "utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_CHUNK", chunk)
        assert [record for _, record in read_file(path)] == json.loads(path.read_text("utf-8"))


def written(folder: Path) -> dict[str, bytes]:
    """The same good rows in every format."""
    texts = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    cells = [[row["prompt"], json.dumps(row["choices"]), str(row["label"]), row["id"]] for row in ROWS]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "good.parquet")
    return {
        ".jsonl": "\n".join(texts).encode(), ".json": f"[{','.join(texts)}]".encode(),
        ".csv": "\n".join(["prompt,choices,label,id", *quoted]).encode(),
        ".tsv": "\n".join(["prompt\tchoices\tlabel\tid", *("\t".join(row) for row in cells)]).encode(),
        ".parquet": (folder / "good.parquet").read_bytes(),
    }


SPECIAL = {"quote": b'"', "break": b"\n", "half": b"\\ud83d", "deep": b"[" * 2000, "nul": b"\0", "digits": b"9" * 5000}


@pytest.mark.parametrize("suffix", READERS)
@settings(max_examples=20)
@given(data=st.data())
def test_damage_of_any_kind_gives_rows_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = bytearray(written(folder)[suffix])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["cut", "repeat", "change", *SPECIAL]))
        if kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + 40]
        elif kind == "change":
            content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
        else:
            content[at:at] = SPECIAL[kind]
    path = folder / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        rows, _ = parse(read_file(path), None, str(path))
        assert rows and all(row.content.encode() and row.id for row in rows)
    except UserError as error:
        assert str(path) in str(error) and len(str(error)) < 25_000
