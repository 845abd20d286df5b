"""Own files of any size: how rows are shared out, several sources, tables without a header, what a dry run says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import DataConfig, build_config, dump_config, load_config
from pipeline.data.check import check_data, look_at
from pipeline.data.splits import load_splits
from pipeline.errors import DataError, UserError


def table(path: Path, rows: int, start: int = 0) -> str:
    path.write_text("text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(start, start + rows)))
    return str(path)


def sizes_of(config: DataConfig) -> dict[str, int]:
    splits = load_splits(config)
    return {name: len(getattr(splits, name)) for name in ("train", "validation", "calibration", "test")}


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "asked", "sizes"),
    [
        (20, {}, (12, 2, 2, 4)),
        (500, {}, (300, 50, 50, 100)),
        (2600, {}, (1800, 200, 200, 400)),
        (100, {"test_rows": 50}, (40, 5, 5, 50)),
        (100, {"train_rows": 60}, (60, 10, 10, 20)),
        (4, {"test_rows": 1, "calibration_rows": 1, "validation_rows": 1}, (1, 1, 1, 1)),
    ],
)
def test_sizes_adapt_to_the_rows_there_are(
    tmp_path: Path, rows: int, asked: dict[str, int], sizes: tuple[int, ...]
) -> None:
    config = DataConfig(path=table(tmp_path / "a.csv", rows), **asked)
    assert tuple(sizes_of(config).values()) == sizes
    train, validation, calibration, test = (f"{size:,}" for size in sizes)
    said = look_at(config).lines[1]
    assert said.startswith(f"rows: {train} to train on, {validation} validation") and f"{test} test" in said
    assert f"{calibration} calibration{'' if 'calibration_rows' in asked else ' (drawn)'}" in said


def test_too_few_rows_say_how_many_would_do_and_why(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", 4)
    with pytest.raises(DataError) as caught:
        check_data(DataConfig(path=path))
    text = str(caught.value)
    assert "holds 4 distinct rows, too few to draw test, calibration and validation from" in text
    assert "one row tells nothing" in text and "at least 20 rows" in text
    words = text.partition("how few will do: ")[2].rstrip(".").split()
    check_data(load_config(None, [f"data.path={path}", *words]).data)
    check_data(DataConfig(path=table(tmp_path / "b.csv", 20)))
    with pytest.raises(DataError, match="Give at least 20 rows"):
        check_data(DataConfig(path=table(tmp_path / "c.csv", 19)))


def test_rows_of_a_split_file_are_all_used(tmp_path: Path) -> None:
    table(tmp_path / "train.csv", 30)
    table(tmp_path / "test.csv", 700, start=1000)
    assert sizes_of(DataConfig(path=str(tmp_path))) == {"train": 24, "validation": 3, "calibration": 3, "test": 700}
    assert sizes_of(DataConfig(path=str(tmp_path), test_rows=100))["test"] == 100


# --- sources ----------------------------------------------------------------------------------------------------------


def test_sources_are_pooled_and_weights_count_in_training(tmp_path: Path) -> None:
    first, second = table(tmp_path / "a.csv", 40), tmp_path / "b.jsonl"
    second.write_text("".join(
        json.dumps({"id": i, "sentence": f"sentence {i}", "kind": "ab"[i % 2]}) + "\n" for i in range(40)))
    template = {"prompt": "{sentence}\nLabel:", "choices": [" a", " b"], "label": "kind"}
    sources = [{"path": first, "weight": 2.5}, {"path": str(second), "weight": 0.5, "template": template}]
    config = build_config({"data": {"sources": sources, "test_rows": 8, "validation_rows": 4, "calibration_rows": 4}})
    assert load_config(None, [f"data={json.dumps(config.data.model_dump(mode='json'))}"]) == config
    splits = load_splits(config.data)
    copies = Counter(row.id.partition("#")[0] for row in splits.train)
    counts = {prefix: Counter(n for name, n in copies.items() if name.startswith(prefix)) for prefix in ("0/", "1/")}
    assert set(counts["0/"]) == {2, 3} and set(counts["1/"]) == {1}
    whole = load_splits(build_config({"data": {
        **config.data.model_dump(mode="json", exclude={"sources", "path"}),
        "sources": [{**one, "weight": 1.0} for one in sources]}}).data)
    assert whole.test == splits.test and {row.id for row in splits.train} & {row.id for row in splits.test} == set()
    assert set(copies) <= {row.id for row in whole.train} and splits.fingerprint != whole.fingerprint
    assert 0.3 < counts["1/"][1] / sum(row.id.startswith("1/") for row in whole.train) < 0.7
    assert "a.csv: read as: classification, 40 rows" in look_at(config.data).lines[0]


def test_sources_that_are_read_alike_share_their_template(tmp_path: Path) -> None:
    paths = [table(tmp_path / f"{name}.csv", 20, start=start) for name, start in (("a", 0), ("b", 20))]
    config = look_at(build_config({"data": {"sources": [{"path": path} for path in paths]}}).data).config
    assert config.template == config.sources[0].template == config.sources[1].template is not None


def test_sources_and_a_path_contradict_each_other(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", 40)
    with pytest.raises(UserError, match="data.path and data.sources both say"):
        build_config({"data": {"path": "other.csv", "sources": [{"path": path}]}})
    (tmp_path / "b.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    mixed = build_config({"data": {"sources": [{"path": path}, {"path": str(tmp_path / "b.jsonl")}]}}).data
    with pytest.raises(DataError, match=r"data.sources: bring choice and completion rows \(such as 1/"):
        check_data(mixed)


def test_keys_that_say_nothing_leave_a_configuration_what_it_was() -> None:
    assert not {"sources", "columns"} & build_config({}).model_dump(mode="json")["data"].keys()
    assert "columns" not in dump_config(build_config({}))


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_table_without_a_header_is_read_by_positions(tmp_path: Path) -> None:
    """As CoLA comes: source, label, mark, sentence."""
    lines = [f"gj04\t{i % 2}\t{'*' * (1 - i % 2)}\tThe {i} \"books\" were read.\n" for i in range(30)]
    (tmp_path / "train.tsv").write_text("".join(lines))
    named = DataConfig(path=str(tmp_path / "train.tsv"), columns=("source", "label", "mark", "sentence"))
    found = look_at(named)
    assert len(found.rows) == 30 and found.rows[3].prompt == 'The 3 "books" were read.\nLabel:'
    assert found.rows[3].choices == (" 0", " 1") and found.rows[3].label == 1
    with pytest.raises(DataError, match="a table without a header line needs data.columns"):
        look_at(DataConfig(path=str(tmp_path / "train.tsv")))
    with pytest.raises(UserError, match="train.tsv:1.*has 4 cells, and the header names 2"):
        look_at(named.model_copy(update={"columns": ("text", "label")}))
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="names columns of a .csv or .tsv file, and a.jsonl is none"):
        look_at(named.model_copy(update={"path": str(tmp_path / "a.jsonl")}))


def test_a_pattern_means_all_files_that_it_finds(tmp_path: Path) -> None:
    for part in range(3):
        table(tmp_path / f"part{part}.csv", 10, start=10 * part)
    config = DataConfig(path=str(tmp_path / "part*.csv"))
    assert [row.prompt for row in check_data(config)] == [f"text {i}\nLabel:" for i in range(30)]
    assert sum(sizes_of(config).values()) == 30
    with pytest.raises(DataError, match="does not exist"):
        check_data(DataConfig(path=str(tmp_path / "none*.csv")))


def test_files_behind_a_protocol_are_read_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(name: str, data_files: dict[str, str], streaming: bool) -> datasets.DatasetDict:
        asked.append((name, data_files))
        label = datasets.ClassLabel(names=["no", "si"])
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        rows = {"text": [f"text {i}" for i in range(30)], "label": [i % 2 for i in range(30)]}
        return datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    path = "hf://datasets/owner/name/rows.jsonl.gz"
    splits = load_splits(DataConfig(path=path))
    assert set(map(str, asked)) == {str(("json", {"train": path}))}
    assert splits.train[0].choices == (" no", " si"), "the names that the source itself gives its classes"
    with pytest.raises(DataError, match="must end in .jsonl, .json, .csv or .parquet, perhaps compressed"):
        load_splits(DataConfig(path="https://example.org/rows"))


def test_a_name_with_control_characters_stays_on_its_line(tmp_path: Path) -> None:
    (line, _) = look_at(DataConfig(path=table(tmp_path / "a\x1b[31m\nforged.csv", 40))).lines
    assert "a\\x1b[31m\\nforged.csv: read as: classification, 40 rows" in line and "\n" not in line


# --- commands ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_rows_are_read_as(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--dry-run", f"model.path={tiny_folder / 'model'}", "--run-dir", str(tmp_path / "run")]
    assert main([*command, f"data.path={table(tmp_path / 'a.csv', 60)}"]) == 0
    out, err = capsys.readouterr()
    assert 'read as: classification, 60 rows; template {prompt: "{text}\\nLabel:", choices: [" a", " b"]' in err
    assert "rows: 36 to train on, 6 validation (drawn), 6 calibration (drawn), 12 test (drawn)" in err
    assert "{text}" in out and "- ' a'" in out, "the resolved configuration holds the template"


@pytest.mark.parametrize("fault", ["late", "long"])
def test_a_dry_run_ends_with_2_where_the_run_would(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """A fault beyond the first thousand rows; an answer that data.max_tokens cannot hold."""
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Q {i}", "completion": "the film " * (40 if fault == "long" else 1)})
             for i in range(1200 if fault == "late" else 40)]
    path.write_text("\n".join(lines) + ("\n{" if fault == "late" else "\n"))
    command = ["train", "--dry-run", f"model.path={tiny_folder / 'model'}", "--run-dir", str(tmp_path / "run")]
    assert main([*command, f"data.path={path}", "data.max_tokens=16"]) == 2
    said = "rows.jsonl:1201" if fault == "late" else "data.max_tokens = 16: "
    assert said in capsys.readouterr().err
