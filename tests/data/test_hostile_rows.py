"""Values that no row can be made of: refused by row and column where one is asked for, passed over where none is."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.check import check_data
from pipeline.data.read import read_file
from pipeline.data.rows import LONGEST_ID, IdRegister, Row
from pipeline.data.sources import open_records, parse, sources_of
from pipeline.data.template import check_template, to_row
from pipeline.errors import EXIT_USER, UserError

HALF = "cut \ud83d"
GOOD = {"prompt": "Q", "choices": ["yes", "no"], "label": 0}


def refusal(path: Path, template: TemplateConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check_data(DataConfig(path=str(path), template=template), classifier=None)
    assert caught.value.exit_code == EXIT_USER and str(caught.value).encode()
    return str(caught.value)


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


HALVES: dict[str, dict[str, Any]] = {
    "prompt": {**GOOD, "prompt": HALF},
    "choices": {**GOOD, "choices": ["yes", HALF]},
    "label": {**GOOD, "label": HALF},
    "second": {**GOOD, "second": HALF},
    "id": {**GOOD, "id": HALF},
    "completion": {"prompt": "Q", "completion": HALF},
    "references": {"prompt": "Q", "completion": "A", "references": ["x", HALF]},
    "messages[0].content": chat(HALF, "A"),
    "messages[1].content": chat("Q", HALF),
}


@pytest.mark.parametrize("column", HALVES)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_half_an_emoji_is_refused_where_it_is_used(tmp_path: Path, column: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    generated = {"prompt": "Q", "completion": "A"}
    good = next(row for row in (GOOD, generated, chat("Q", "A")) if row.keys() <= HALVES[column].keys())
    lines = [json.dumps({**good, "unused": HALF, HALF: 1}), json.dumps(HALVES[column])]
    path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    text = refusal(path)
    assert f"{path}{':2' if suffix == 'jsonl' else ': row 2'}: {column} = " in text
    assert "\\ud83d" in text and ("holds half a character at place 5" in text or column == "label")


def test_half_an_emoji_in_cells_templates_and_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    path = tmp_path / "a.tsv"
    path.write_text('prompt\tchoices\tlabel\nQ\t["yes", "cut \\ud83d"]\t0\n')
    assert f"{path}:2: choices = " in refusal(path)
    with pytest.raises(UserError, match=r"data\.template\.choices = .*half a character"):
        check_template(TemplateConfig(choices=("yes", HALF)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": [{**GOOD, "prompt": HALF}]})
    with pytest.raises(UserError, match=r"owner/set\[train\]: row 1: prompt = .*half a character"):
        parse(open_records(sources_of(DataConfig(path="owner/set"))[0])["train"], None, "owner/set")


def test_a_hub_row_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows() -> Any:
        yield GOOD
        raise ConnectionError("the line broke")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": rows()})
    with pytest.raises(UserError, match=r"owner/set\[train\]: row 2: cannot be read \(the line broke\)"):
        parse(open_records(sources_of(DataConfig(path="owner/set"))[0])["train"], None, "owner/set")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"prompt": "Q", "choices": ["a", "b"], "label": DIGITS}', "label: is a number of 5,000 digits"),
        ('{"prompt": "Q", "choices": ["a", "b"], "label": "DIGITS"}', "label = '999"),
        ('{"prompt": "Q", "choices": ["a", "b"], "label": 99999999999999999999}', "label = 99999999999999999999: must"),
        ('{"prompt": "Q", "choices": ["a", "b"], "label": 1e999}', "label = inf: must be 0 to 1"),
        ('{"prompt": "Q", "choices": ["a", DIGITS], "label": 0}', "choices: is a number of 5,000 digits"),
        ('{"prompt": "Q", "score": DIGITS}', "score: is a number of 5,000 digits"),
        ('{"prompt": "Q", "score": "DIGITS"}', "score = '999"),
        ('{"prompt": "Q", "score": FEWER}', "score = 999"),
        ('{"prompt": "Q", "score": 99999999999999999999}', "score = 99999999999999999999: is beyond"),
        ('{"prompt": "Q", "score": NaN}', "score = nan: is not a number"),
        ('{"prompt": "Q", "score": -Infinity}', "score = -inf: is beyond"),
        ('{"prompt": "Q", "score": "inf"}', "score = 'inf': is beyond"),
        ('{"prompt": DIGITS, "score": 1}', "prompt: is a number of 5,000 digits"),
        ('{"prompt": "Q", "completion": "A", "id": DIGITS}', "id: is a number of 5,000 digits"),
        ('{"messages": DIGITS}', "messages: is a number of 5,000 digits"),
    ],
)
def test_numbers_that_nothing_can_hold(tmp_path: Path, row: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    digits, fewer = "9" * 5000, "9" * 500
    path.write_text(row.replace("DIGITS", digits).replace("FEWER", fewer) + "\n")
    text = refusal(path)
    assert f"{path}:1: {expected}" in text and len(text) < 1000
    path.write_text(f'{{"prompt": "Q", "completion": "A", "unused": [{{"x": {digits}}}]}}\n')
    rows, _ = parse(read_file(path), None, "a")
    assert len(rows) == 1


@pytest.mark.parametrize("given", [{"a": 1}, [1], float("nan"), True, "x" * (LONGEST_ID + 1), "a\0", b"x"])
def test_ids_that_are_no_names_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match=r"f:1: id = .* must be a (text|name)"):
        IdRegister().name(Row("", "Q", completion="A"), given, "f:1")


def test_ids_that_are_names_stay(tmp_path: Path) -> None:
    ids = IdRegister()
    row = Row("", "Q", completion="A")
    given = ("x", 7, 1.5, "x" * LONGEST_ID)
    assert [ids.name(row, one, "f:1").id for one in given] == list(map(str, given))
    assert ids.name(row, "  ", "f").id == IdRegister().name(row, None, "f").id


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def no_text() -> Any:
    """A column of text whose second value is not UTF-8."""
    import numpy as np

    offsets, content = np.array([0, 1, 3], np.int32), np.frombuffer(b"Q\xff\xfe", np.uint8)
    buffers = [None, pyarrow.py_buffer(offsets.tobytes()), pyarrow.py_buffer(content.tobytes())]
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, buffers)


FAR = pyarrow.timestamp("us")
"""In which 2⁶² is far beyond the year 9999."""
UNREADABLE = {
    "text": no_text,
    "time": lambda: pyarrow.array([0, 2**62], FAR),
    "date": lambda: pyarrow.array([0, 2**30], pyarrow.date32()),
    "zone": lambda: pyarrow.array([0, 1], pyarrow.timestamp("us", "No/Where")),
    "nested": lambda: pyarrow.array([[{"at": 0}], [{"at": 2**62}]], pyarrow.list_(pyarrow.struct({"at": FAR}))),
    "struct": lambda: pyarrow.StructArray.from_arrays([pyarrow.array([1, 2])] * 2, ["same", "same"]),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_parquet_values_that_cannot_be_read_count_where_they_are_used(tmp_path: Path, kind: str) -> None:
    column = UNREADABLE[kind]()
    path = parquet(tmp_path / "a.parquet", prompt=["Q", "P"], completion=["A", "B"], unused=column)
    rows, _ = parse(read_file(path), None, "a")
    assert [row.prompt for row in rows] == ["Q", "P"]
    for name in ("prompt", "completion", "id"):
        columns = {"prompt": ["Q", "P"], "completion": ["A", "B"], name: column}
        text = refusal(parquet(path, **columns))
        assert f"a.parquet: row {2 if kind == 'text' else 1}: {name}" in text or f"a.parquet: row 2: {name}" in text
    text = refusal(parquet(path, prompt=["Q", "P"], score=column))
    assert ": score" in text


def test_parquet_values_of_other_types(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", prompt=[b"x", b"y"], completion=["A", "B"])
    assert "row 1: prompt = b'x': must be a text or a number" in refusal(path)
    path = parquet(path, prompt=["Q"], completion=["A"], id=[{"a": 1}], when=[datetime.date(2020, 1, 1)])
    assert "row 1: id = {'a': 1}: must be a text" in refusal(path)
    path = parquet(path, prompt=[["Q"]], completion=["A"])
    assert "row 1: prompt = ['Q']: must be a text or a number" in refusal(path)


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table([["Q"], ["A"], ["P"]], names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(table, path)
    assert f"{path} = ['prompt', 'completion', 'prompt']: names the column 'prompt' twice. Rename" in refusal(path)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", prompt=["Q"] * 100, completion=["A"] * 100)
    content = path.read_bytes()
    for size in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:size])
        assert "a.parquet': is not a Parquet file" in refusal(path)


def test_columns_are_listed_up_to_a_number() -> None:
    with pytest.raises(UserError) as caught:
        to_row({f"c{i}": 1 for i in range(10_000)}, None, "f:1")
    assert "c19, …" in str(caught.value) and "c20" not in str(caught.value)


def test_an_entry_of_a_list_has_a_number_that_can_be_read() -> None:
    with pytest.raises(UserError, match="is not a column"):
        to_row({"a": ["x"], "completion": "A"}, TemplateConfig(prompt=f"{{a[{'9' * 5000}]}}"), "f:1")
