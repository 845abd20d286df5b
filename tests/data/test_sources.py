"""Splits under other names, a source of its own for evaluation, and epochs counted from the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import DataConfig, EvaluationDataConfig, TemplateConfig, TrainConfig, build_config, load_config
from pipeline.data.check import check_data
from pipeline.data.read import read_file
from pipeline.data.sources import parse
from pipeline.data.splits import load_splits
from pipeline.data.template import to_row
from pipeline.errors import ConfigError, DataError, UserError
from pipeline.plan.resolve import resolve_epochs
from pipeline.training.schedule import require_steps


def choice(i: int) -> dict[str, Any]:
    return {"prompt": f"Question {i}", "choices": [" yes", " no"], "label": i % 2}


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def hub(monkeypatch: pytest.MonkeyPatch, **tables: dict[str, list[dict[str, object]]]) -> None:
    """A hub with these data sets: name (`__` for `/`) -> split -> rows."""
    import datasets

    def load(name: str, variant: str | None, streaming: bool) -> datasets.DatasetDict:
        parts = tables[name.replace("/", "__")]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)


GLUE = {
    "train": [{"sentence1": f"A {i}", "sentence2": "B", "label": i % 2, "idx": i} for i in range(40)],
    "validation_matched": [{"sentence1": f"V {i}", "sentence2": "B", "label": i % 2, "idx": i} for i in range(9)],
    "test": [{"sentence1": f"T {i}", "sentence2": "B", "label": -1, "idx": i} for i in range(5)],
}
RTE = TemplateConfig(prompt="{sentence1}", second="{sentence2}", choices=("entailment", "not_entailment"))


def test_splits_are_taken_under_the_names_that_the_hub_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """GLUE's test split has no labels: it is not read, and the development split is our test, whole."""
    hub(monkeypatch, owner__glue=GLUE)
    sizes = {"validation_rows": 4, "calibration_rows": 5, "test_rows": None}
    config = DataConfig(
        path="owner/glue:rte", template=RTE, splits={"train": "train", "test": "validation_matched"}, **sizes
    )
    splits = load_splits(config)
    assert sorted(row.prompt for row in splits.test) == [f"V {i}" for i in range(9)]
    assert [len(splits.validation), len(splits.calibration), len(splits.train)] == [4, 5, 31]
    with pytest.raises(UserError, match="label = -1: must be 0 to 1"):
        load_splits(config.model_copy(update={"splits": None}))
    with pytest.raises(DataError, match="has no split dev, meant to be our test; its splits are train, validation_m"):
        load_splits(config.model_copy(update={"splits": {"train": "train", "test": "dev"}}))
    drawn = load_splits(config.model_copy(update={"validation_rows": None}))
    assert [len(drawn.validation), len(drawn.calibration), len(drawn.train)] == [3, 5, 32]


def test_splits_of_a_folder_may_have_other_names(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [choice(i) for i in range(20)])
    write_jsonl(tmp_path / "dev.jsonl", [choice(i) for i in range(20, 23)])
    named = DataConfig(path=str(tmp_path), splits={"train": "train", "test": "dev"},
                       validation_rows=2, calibration_rows=2, test_rows=None)
    check_data(named)
    assert len(load_splits(named).test) == 3
    with pytest.raises(DataError, match="has no heldout file, meant to be our test; it holds dev.jsonl, train.jsonl"):
        check_data(named.model_copy(update={"splits": {"train": "train", "test": "heldout"}}))
    with pytest.raises(DataError, match="is a single table, and train, test are to come from it"):
        check_data(named.model_copy(update={"path": str(tmp_path / "train.jsonl")}))


def test_training_and_evaluation_may_have_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instructions to train on, lettered questions to be tested on."""
    questions = [{"question": f"Q {i}?", "choices": ["w", "x", "y", "z"], "answer": i % 4} for i in range(12)]
    hub(monkeypatch, a__alpaca={"train": [{"instruction": f"I {i}", "output": f"O {i}"} for i in range(8)]},
        b__mmlu={"dev": questions[:3], "validation": questions[3:7], "test": questions[7:]})
    lettered = TemplateConfig(
        prompt="{question}\nA. {choices[0]}\nD. {choices[3]}\nAnswer:", choices=(" A", " B", " C", " D"), label="answer"
    )
    source = {"path": "b/mmlu:all", "template": lettered,
              "splits": {"validation": "validation", "calibration": "dev", "test": "test"}}
    config = DataConfig(
        path="a/alpaca", template=TemplateConfig(prompt="{instruction}", completion="{output}"),
        evaluation=EvaluationDataConfig(**source), validation_rows=None, calibration_rows=None, test_rows=None,
    )
    splits = load_splits(config)
    assert {row.kind for row in splits.train} == {"completion"} and len(splits.train) == 8
    assert [len(splits.validation), len(splits.calibration), len(splits.test)] == [4, 3, 5]
    row = next(row for row in splits.test if row.prompt.startswith("Q 7?"))
    assert row.prompt == "Q 7?\nA. w\nD. z\nAnswer:" and row.choices[row.label or 0] == " D"
    with pytest.raises(ConfigError, match="must name validation, calibration and test"):
        EvaluationDataConfig(path="b/mmlu", splits={"test": "test"})


def test_an_entry_that_a_list_does_not_have_is_named() -> None:
    template = TemplateConfig(prompt="{choices[4]}", completion="{answer}")
    with pytest.raises(DataError, match=r"f:1: choices\[4\] = \['w'\]: is no entry of a list"):
        to_row({"choices": ["w"], "answer": "x"}, template, "f:1")


# --- epochs -----------------------------------------------------------------------------------------------------------


def settings_of(path: Path, **train: Any) -> dict[str, Any]:
    sizes = {"validation_rows": 4, "calibration_rows": 4, "test_rows": 4}
    return {"data": {"path": str(path), **sizes}, "train": train}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 5), (2, 10), (0.5, 3), (0.01, 1), (3.1, 15)])
def test_epochs_become_steps_of_the_rows_that_are_left_to_train_on(tmp_path: Path, epochs: float, steps: int) -> None:
    """50 rows, 12 of them for the other splits; 38 rows in batches of 8."""
    path = write_jsonl(tmp_path / "rows.jsonl", [choice(i) for i in range(50)])
    config = build_config(settings_of(path, epochs=float(epochs), global_batch=8))
    resolved = resolve_epochs(config)
    assert (resolved.train.max_steps, resolved.train.epochs) == (steps, None)
    assert resolve_epochs(resolved) is resolved
    require_steps(resolved.train)
    with pytest.raises(ConfigError, match="before the training processes start"):
        require_steps(config.train)


def test_epochs_and_steps_contradict_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="keep one of them"):
        TrainConfig(epochs=2.0, max_steps=10)
    path = write_jsonl(tmp_path / "rows.jsonl", [choice(i) for i in range(50)])
    sizes = {"train": "null", "validation": 4, "calibration": 4, "test": 4}
    words = [f"data.path={path}", *(f"data.{split}_rows={size}" for split, size in sizes.items())]
    command = ["train", "--dry-run", "--run-dir", str(tmp_path / "run"), *words]
    assert main([*command, "train.epochs=3.0"]) == 0
    assert "3 epochs (counted in steps when the rows are read)" in capsys.readouterr().out
    assert main([*command, "train.epochs=3.0", "train.max_steps=7"]) == 2
    assert "keep one of them" in capsys.readouterr().err
    assert main(["train", "--quick", "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    assert load_config(None, ["train.epochs=2"]).train.epochs == 2.0


def test_rows_bring_their_units(tmp_path: Path) -> None:
    lines = [{"prompt": f"Q{n}", "completion": " A", "unit": f"document {n // 2}"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    rows, whole = parse(read_file(tmp_path / "rows.jsonl"), None, "rows")
    assert whole and [row.unit for row in rows] == ["document 0", "document 0", "document 1", "document 1"]
