"""Files, folders and names -> rows, and the check that precedes every run."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.check import check_data
from pipeline.data.read import read_file
from pipeline.data.sources import is_local, open_records, parse, sources_of
from pipeline.data.splits import load_splits
from pipeline.data.stream import open_stream
from pipeline.errors import EXIT_USER, DataError, ErrorList, UserError

SMALL: dict[str, Any] = {"validation_rows": 2, "calibration_rows": 2, "test_rows": 2}


def choice(i: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"Question {i}", "choices": [" yes", " no"], "label": i % 2, **changes}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(path: Path | str, **config: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_data(DataConfig(path=str(path), **{**SMALL, **config}))
    assert caught.value.exit_code == EXIT_USER
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    texts = ["plain", 'with "quotes"', "comma, and: colon", "Ünïcode ☃"]
    records = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, records)
    elif suffix == ".json":
        path.write_text(json.dumps(records))
    elif suffix == ".csv":
        cells = ("\"" + text.replace('"', '""') + "\"" for text in texts)
        path.write_text("\ufefftext,label\r\n" + "".join(f"{c},{i % 2}\r\n" for i, c in enumerate(cells)))
    elif suffix == ".tsv":
        path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in records))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    template = TemplateConfig(prompt="{text}:", choices=(" bad", " good"), label="label")
    packed = {} if suffix == ".parquet" else {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    paths = [path, *(path.with_name(f"{path.name}{end}") for end in packed)]
    for one, pack in zip(paths[1:], packed.values(), strict=True):
        one.write_bytes(pack(path.read_bytes()))
    for one in paths:
        rows, whole = parse(read_file(one), template, str(one))
        assert whole and [(row.prompt, row.label) for row in rows] == [(f"{t}:", i % 2) for i, t in enumerate(texts)]


def test_split_files_may_be_compressed_and_torn_ones_are_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        text = "".join(f"{json.dumps(choice(i, prompt=f'{split} {i}'))}\n" for i in range(40))
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    splits = load_splits(DataConfig(path=str(tmp_path)))
    assert len(splits.test) == 40 and splits.test[0].named.endswith(")") and "test.jsonl.gz:" in splits.test[0].named
    whole = (tmp_path / "test.jsonl.gz").read_bytes()
    for content in (whole[:-20], whole[:60] + bytes(20) + whole[80:], b"no gzip"):
        (tmp_path / "test.jsonl.gz").write_bytes(content)
        assert "test.jsonl.gz': cannot be read (" in refusal(tmp_path)
    (tmp_path / "test.jsonl").write_text("")
    assert "holds test.jsonl and test.jsonl.gz: Keep one" in refusal(tmp_path).replace(". Keep", ": Keep")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    assert "(or be text and compressed: .gz, .bz2, .xz behind that)" in refusal(tmp_path / "a.parquet.gz")
    assert is_local("rows.csv.bz2")


def test_csv_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",A\n\nQ,B\nQ,\n')
    assert [where.rpartition(":")[2] for where, _ in read_file(path)] == ["2", "5", "6"]
    assert f"{path}:6: completion = '': is empty" in refusal(path)


def test_long_cells_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\n{'x' * 200_000},A\n")
    rows, _ = parse(read_file(path), None, "rows")
    assert len(rows[0].prompt) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", ["holds no rows", "at least one row"]),
        ("a.csv", b"prompt,completion\n", ["holds no rows", "at least one row"]),
        ("a.json", b"", ["holds no rows", "at least one row"]),
        ("a.txt", b"x", ["must end in .jsonl, .json, .csv, .tsv, .parquet", "Convert"]),
        ("a.jsonl", b'{"prompt": "Q", "completion": "A"}\n{"a": \n', ["a.jsonl:2", "is not valid JSON", "per line"]),
        ("a.jsonl", b"[1]\n", ["a.jsonl:1 = [1]: is not a JSON object", '{"prompt"']),
        ("a.jsonl", b'{"prompt": "caf\xe9"}\n', ["a.jsonl:1 = b'\\xe9", "is not UTF-8 (byte 16", "Save the file"]),
        ("a.csv", b"prompt,completion\nQ,A\ncaf\xe9,B\n", ["a.csv:3 = b'\\xe9", "Save the file as UTF-8"]),
        ("a.csv", b'prompt,completion\n"Q,A\nQ,B\n', ["a.csv:2", "cannot be split into cells", 'inside as ""']),
        ("a.csv", b"prompt,completion\nQ,A,B\n", ["a.csv:2", "has 3 cells, and the header names 2", "Mend the row"]),
        ("a.csv", b"prompt,prompt\nQ,A\n", ["a.csv:1", "names the column 'prompt' twice", "Rename"]),
        ("a.json", b'{"data": []}', ["a.json", "must hold an array of objects", "Pick out"]),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', ["a.json", "must hold an array of objects", "ends in .jsonl"]),
        ("a.json", b'[{"prompt": "Q", "completion": "A"},\n {"a" 2}]', ["a.json:2", "':' delimiter, column 7"]),
        ("a.parquet", b"nonsense", ["a.parquet", "is not a Parquet file", "Write it again"]),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text = refusal(path)
    assert all(part in text for part in expected), text


@pytest.mark.parametrize("path", ["nowhere/rows.jsonl", "./nowhere", "/nowhere/at/all", "rows.cvs", "~/no such"])
def test_missing_local_files_are_not_taken_for_hub_names(path: str) -> None:
    text = refusal(path)
    assert f"data.path = {path!r}: does not exist. Give a local file or folder, or a hub data set" in text


def test_a_missing_file_in_a_local_folder_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in refusal("mine/rows")
    check_data(DataConfig(path="yours/rows"))


def test_hub_and_embedded_names_are_not_opened() -> None:
    for name in ("squad", "nyu-mll/glue:rte", "stanfordnlp/imdb-v1.1", "embedded:movie-reviews"):
        assert not is_local(name)
        check_data(DataConfig(path=name))
    assert "is not embedded. There are embedded:movie-reviews, embedded:amazon-reviews, " in refusal("embedded:movies")


def test_the_first_faults_of_each_kind_are_shown_with_their_lines(tmp_path: Path) -> None:
    rows = [choice(i, label=7) if i % 2 else choice(i) for i in range(30)]
    rows[20]["prompt"], rows[24]["prompt"] = " ", None
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ErrorList) as caught:
        check_data(DataConfig(path=str(path)))
    assert [error.field.rpartition("a.jsonl")[2] for error in caught.value.errors] == [
        ":2: label", ":4: label", ":6: label", "", ":21: prompt", ":25: prompt", ":31"
    ]
    assert "a.jsonl: has 12 more rows with such a fault (label: must be N to N or" in str(caught.value)


def test_faults_of_all_files_come_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [choice(i) for i in range(30)] + [choice(30, label="?")])
    write_jsonl(tmp_path / "test.jsonl", [choice(40, prompt="")])
    text = refusal(tmp_path)
    assert "train.jsonl:31: label = '?'" in text and "test.jsonl:1: prompt = ''" in text


def test_a_wrong_column_is_said_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(9)])
    assert refusal(path).count("\n") == 0


def test_duplicate_ids_and_mixed_kinds(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [choice(0, id="x"), choice(1, id="x")])
    assert "a.jsonl:2: id = 'x': is the id of" in refusal(path)
    path = write_jsonl(tmp_path / "b.jsonl", [choice(0), {"prompt": "Q", "completion": "A"}])
    assert "b.jsonl:2: is a completion row among choice rows. Keep one kind." in refusal(path)


def test_the_check_stops_at_its_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [choice(i) for i in range(20)] + [choice(20, label=9)])
    check_data(DataConfig(path=str(path)), limit=20)
    assert "a.jsonl:21: label = 9" in refusal(path)


def test_too_few_rows_are_found_before_a_run(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [choice(i) for i in range(7)])
    check_data(DataConfig(path=str(path), **SMALL))
    text = refusal(path, test_rows=5)
    assert "data.validation_rows = 2: 7 distinct rows" in text and "5 test + 2 calibration + 2 validation" in text
    suggested = dict(part.split("=") for part in text.partition("for example: ")[2].split())
    sizes = {key.removeprefix("data."): int(value) for key, value in suggested.items()}
    check_data(DataConfig(path=str(path), **sizes))


def test_a_folder_gives_each_split_its_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [choice(i) for i in range(30)])
    write_jsonl(tmp_path / "test.jsonl", [choice(i) for i in range(100, 105)])
    config = DataConfig(path=str(tmp_path), **{**SMALL, "test_rows": 5})
    check_data(config)
    assert {row.prompt for row in load_splits(config).test} == {f"Question {i}" for i in range(100, 105)}
    assert "data.test_rows = 6: the test file has 5 distinct rows. Set data.test_rows=5 or less." in refusal(
        tmp_path, test_rows=6
    )
    with pytest.raises(DataError, match="data.test_rows = 6: the test file has 5 rows. Set data.test_rows=5 or less"):
        check_data(DataConfig(path=str(tmp_path), test_rows=6), limit=10)
    write_jsonl(tmp_path / "test.json", [])
    assert "holds test.jsonl and test.json. Keep one file per split." in refusal(tmp_path)


def test_a_folder_needs_a_train_file(tmp_path: Path) -> None:
    assert "has no train file; it holds nothing. Name the files train, validation" in refusal(tmp_path)
    (tmp_path / "dev.csv").touch()
    assert "it holds dev.csv" in refusal(tmp_path)


def test_hub_data_sets_come_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[str, str | None, bool]] = []

    def fake(name: str, variant: str | None, streaming: bool) -> dict[str, Any]:
        asked.append((name, variant, streaming))
        parts = {"train": range(20), "validation": range(20, 25), "extra": range(3)}
        tables = {split: datasets.Dataset.from_list([choice(i) for i in part]) for split, part in parts.items()}
        return {split: table.to_iterable_dataset() for split, table in tables.items()} if streaming else tables

    monkeypatch.setattr(datasets, "load_dataset", fake)
    splits = load_splits(DataConfig(path="owner/set:variant", **SMALL))
    assert set(asked) == {("owner/set", "variant", False)}
    asked.clear()
    assert {row.prompt for row in splits.validation} <= {f"Question {i}" for i in range(20, 25)}
    assert (len(splits.test), len(splits.calibration), len(splits.train)) == (2, 2, 16)
    streamed = DataConfig(path="owner/set:variant", **SMALL, streaming=True)
    assert load_splits(streamed).validation == splits.validation and set(asked) == {("owner/set", "variant", True)}
    rows = open_stream(streamed, load_splits(streamed), seed=0).from_position(0)
    assert {row.prompt for row in islice(rows, 16)} == {row.prompt for row in splits.train}


def test_a_hub_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(name: str, variant: str | None, streaming: bool) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"data.path = 'no/set': is no local path and cannot be loaded .*no route"):
        open_records(sources_of(DataConfig(path="no/set"))[0])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"test": []})
    with pytest.raises(DataError, match="has no split train; its splits are test. Save the splits"):
        open_records(sources_of(DataConfig(path="no/set"))[0])


def test_checking_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [choice(i) for i in range(1200)])
    code = (
        "import sys; from pipeline.config import DataConfig;"
        "from pipeline.data.check import check_data; from pipeline.data.splits import load_splits;"
        f"check_data(DataConfig(path={str(path)!r})); load_splits(DataConfig(path={str(path)!r}));"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
