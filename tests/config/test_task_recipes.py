"""The recipes of tasks: each passes a dry run on rows in the form that its data set has, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.config.load import RECIPES
from pipeline.data.splits import load_splits
from pipeline.data.template import to_row

TASKS = sorted(path.stem for path in (RECIPES / "tasks").glob("*.yaml"))
RTE_SPLITS = "data.splits={train: train, test: dev}"
SIZES = ("data.train_rows=8", "data.validation_rows=4", "data.calibration_rows=4", "data.test_rows=6")


def instruction(number: int) -> dict[str, str]:
    asked = f"Which is {number}?\n\nAnswer1: a Answer2: b"
    return {"instruction": asked, "input": "", "answer": f"answer{number % 2 + 1}"}


def lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def written(folder: Path, task: str) -> list[str]:
    """Files as the task's data set has them; the overrides that name them."""
    numbers = range(40)
    if task == "rte":
        text = "index\tsentence1\tsentence2\tlabel\n" + "".join(
            f"{n}\tOne {n}.\tTwo.\t{'not_' * (n % 2)}entailment\n" for n in numbers)
        files, more = {"train.tsv": text, "dev.tsv": text.replace("One", "Three")}, [RTE_SPLITS]
    elif task == "trec":
        text = "".join(f"{n % 6}\tWhat is {n} ?\n" for n in numbers)
        files, more = {"train.tsv": text, "test.tsv": text.replace("What", "Who")}, []
    elif task == "banking77":
        text = "text,category\n" + "".join(f"my card {n},card_{n % 7}\n" for n in numbers)
        files, more = {"train.csv": text, "test.csv": text.replace("my", "your")}, []
    elif task == "clinc150":
        def intents(word: str) -> str:
            return lines([{"text": f"{word} {n}", "label": f"intent {n % 9}"} for n in numbers])

        files = {f"{name}.jsonl": intents(name) for name in ("train", "validation", "test")}
        files["oos.jsonl"] = lines([{"text": f"odd {n}", "label": "oos"} for n in numbers])
        more = [f"evaluate.also.oos.path={folder}"]
    elif task == "e2e":
        text = "meaning_representation,human_reference\n" + "".join(f"name[{n}],The {n} is a pub.\n" for n in numbers)
        files, more = {"train.csv": text, "test.csv": text.replace("name", "inn")}, []
    elif task == "arc-easy-letters":
        rows: list[dict[str, object]] = [
            {"question": f"Which {n}?", "choices": {"text": list("xyz"), "label": list("ABC")}, "answerKey": "B"}
            for n in numbers
        ]
        files = {f"{name}.jsonl": lines([{**row, "question": f"{name} {row['question']}"} for row in rows])
                 for name in ("train", "validation", "test")}
        more = []
    else:
        name = {"openbookqa": "openbookqa", "arc-easy": "ARC-Easy"}[task]
        files = {f"{name}.train.json": json.dumps([instruction(n) for n in numbers]),
                 f"{name}.test.json": json.dumps([instruction(n + 100) for n in numbers])}
        more = []
    for name, text in files.items():
        (folder / name).write_text(text)
    return [f"data.path={folder}", *more, *SIZES]


def test_every_task_is_tried_here() -> None:
    assert TASKS == ["arc-easy", "arc-easy-letters", "banking77", "clinc150", "e2e", "openbookqa", "rte", "trec"]
    told = (RECIPES / "tasks" / "README.md").read_text(encoding="utf-8")
    assert all(f"`{task}`" in told for task in TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_recipe_passes_a_dry_run_on_rows_of_its_form(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipeline.plan.memory_table.memory_table", lambda *_: "")  # traces the model for seconds
    data = tmp_path / "data"
    data.mkdir()
    command = ["train", "--config", f"tasks/{task}", "--dry-run", "--run-dir", str(tmp_path / "run")]
    assert main([*command, *written(data, task)]) == 0, capsys.readouterr().err
    told = capsys.readouterr()
    assert "8 to train on" in told.err and "6 test" in told.err


def test_letters_stand_in_the_prompt_and_are_the_answers() -> None:
    template = load_config("tasks/arc-easy-letters").data.template
    arc = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["1", "2"]}, "answerKey": "2"}
    row = to_row(arc, template, "here")
    assert (row.prompt, row.choices, row.label) == ("Question: Why?\n1. so\n2. no\nAnswer:", (" 1", " 2"), 1)
    mmlu = {"question": "Why?", "choices": ["so", "no"], "answerKey": 1}
    row = to_row(mmlu, template, "here")
    assert (row.prompt, row.choices, row.label) == ("Question: Why?\nA. so\nB. no\nAnswer:", (" A", " B"), 1)


SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("task", "folder", "more", "train", "test"),
    [
        ("rte", "glue_rte", [RTE_SPLITS], 1000, 277), ("banking77", "banking77", [], 2000, 400),
        ("openbookqa", "openbookqa", [], 1000, 400), ("arc-easy", "arc_easy", [], 1000, 400),
    ],
)
def test_a_recipe_reads_the_published_files(task: str, folder: str, more: list[str], train: int, test: int) -> None:
    splits = load_splits(load_config(f"tasks/{task}", [f"data.path={SHARED / folder}", *more]).data)
    assert (len(splits.train), len(splits.test)) == (train, test)
