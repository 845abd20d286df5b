"""`loradrop distill`: the rows that are taught, what is refused, and a student that learns what its teacher says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.adapters.members import Member
from pipeline.cli import main
from pipeline.config import RunConfig, load_config
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.data.template import to_row
from pipeline.ensemble.ensemble import Answer, Ensemble
from pipeline.ensemble.readout import Readout
from pipeline.errors import ConfigError
from pipeline.files import ADAPTER_WEIGHTS
from pipeline.run_folder.paths import Folders, RunPaths, load_saved
from pipeline.stages import distill as stage
from pipeline.stages import evaluate, predict, report, train
from pipeline.stages.processes import begin_training

WORDS = (" negative", " positive")


def test_rows_are_taught_in_their_order_with_names_of_their_own() -> None:
    rows = [
        Row("a", "one", WORDS, 1, unit="u"), Row("b", "two", ("x", "y", "z"), 0, second="pair"),
        Row("unlabelled/a", "three", WORDS),
    ]
    said = [[0.25, 0.75], [0.5, 0.0005, 0.4995], [0.9995, 0.0005]]
    lines = list(stage.taught_lines(iter(rows), iter([{"probabilities": one} for one in said])))
    read = [to_row(json.loads(json.dumps(line)), None, "file:1") for line in lines]
    assert [line["id"] for line in lines] == ["a", "b", "unlabelled/a"] and lines[0]["unit"] == "u"
    assert [(one.prompt, one.second, one.choices) for one in read] == [(o.prompt, o.second, o.choices) for o in rows]
    assert read[0].label_probabilities == (0.25, 0.75) and read[0].label == 1
    assert read[1].label_probabilities == pytest.approx((0.5 / 0.9995, 0.0, 0.4995 / 0.9995))
    assert read[2].label_probabilities == (1.0, 0.0) and read[2].label == 0
    with pytest.raises(ValueError, match="shorter"):
        list(stage.taught_lines(iter(rows), iter([{"probabilities": said[0]}])))


def test_the_student_is_the_run_without_dropout_on_other_rows(tmp_path: Path) -> None:
    config = load_config(None, ["adapter.rates.lora_A=0.3", "train.max_steps=70", "adapter.rank=4"])
    student = stage.student_config(config, ["train.max_steps=9", "adapter.rank=8"], tmp_path / "rows.jsonl")
    assert student.adapter.method == "none" and student.data.train_path == str(tmp_path / "rows.jsonl")
    assert (student.train.max_steps, student.adapter.rank, config.train.max_steps) == (9, 8, 70)
    assert student.data.model_copy(update={"train_path": None}) == config.data and student.model == config.model
    assert stage.student_config(config, [], tmp_path).train == config.train
    for word in ("data.path=x", "adapter.method=hiddenkey", "model.path=y", "ensemble.size=3"):
        with pytest.raises(ConfigError, match="teacher and student have it in common"):
            stage.student_config(config, [word], tmp_path)


@pytest.mark.parametrize(("kind", "overrides", "says"), [
    ("completion", [], "the run answers in free text"), ("regression", [], "the run answers with numbers"),
    ("choice", ["data.choice_score=per_token"], "data.choice_score=sum"), ("choice", ["train.packing=true"], "apart"),
    ("choice", ["data.streaming=true"], "at hand"),
])
def test_what_cannot_be_taught_is_refused(kind: Any, overrides: list[str], says: str) -> None:
    config, readout = load_config(None, overrides), Readout((None,), "probability", 1.0, kind)
    with pytest.raises(ConfigError, match=says):
        stage.refuse_untaught(readout, config, config)
    stage.refuse_untaught(replace(readout, kind="choice"), load_config(None), load_config(None))


@pytest.mark.parametrize(("words", "says"), [
    (["--run-dir", "nothing"], "holds no run"), (["--unlabelled"], "expected one argument"),
])
def test_a_wrong_command_is_told(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", *words]) == 2 and says in capsys.readouterr().err


@pytest.fixture
def run(finished_run: tuple[RunPaths, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in which stages work in this process."""

    def here(name: str, config: RunConfig, folders: Folders) -> int:
        if name == predict.ROWS:
            predict.predict_rows(folders.run)
        elif begin_training(config, folders.run):
            train.train_run(config, folders.run)
        return 0

    monkeypatch.setattr(stage, "start", here)
    monkeypatch.setattr("pipeline.distributed.world.leave_world", lambda: None)
    monkeypatch.setattr(evaluate, "leave_world", lambda: None)
    return Path(shutil.copytree(finished_run[0].root, tmp_path / "run"))


def said(ensemble: Ensemble, rows: list[Row]) -> np.ndarray:
    """(N, C) probabilities."""
    answers = ensemble.answers(rows)
    return np.array([answer.probabilities for answer in answers if isinstance(answer, Answer)])


def same_teacher(result: dict[str, Any], its_own: dict[str, Any]) -> None:
    """The student's report scores the teacher as the teacher's own does, and sets the student beside it."""
    teacher = {system["key"]: system for system in result["systems"]}["teacher"]
    chosen = (its_own["ensemble"] or {}).get("chosen", "mean_field")
    there = next(system for system in its_own["systems"] if system["key"] == chosen)
    assert [system["name"] for system in result["systems"][-1:]] == ["Distilled LoRA"]
    assert teacher["name"] == f"Teacher: {there['name']}" and teacher["passes"] == there["passes"]
    for scaling in ("before", "after"):
        for score in ("nll", "accuracy", "ece"):
            scores = [system["test"][scaling][score]["value"] for system in (teacher, there)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-6), (scaling, score)
    assert teacher["temperature"]["mean"] == pytest.approx(there["temperature"]["mean"], rel=1e-5)
    beside = [one for one in result["comparisons"] if one["versus"] == "teacher" and one["split"] == "test"]
    assert {one["system"] for one in beside} == {"mean_field"}
    assert any("its teacher" in line for line in result["reading"])


def divergence(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean KL(teacher ‖ student), in nats."""
    return float((teacher * (np.log(teacher) - np.log(student))).sum(axis=1).mean())


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_says(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_saved(RunPaths(run).config)
    splits = load_splits(config.data)
    more = [{"id": f"n{n}", "prompt": f"Review: good film {n} Sentiment:", "choices": list(WORDS)} for n in range(5)]
    more.append({"id": "owned", "prompt": splits.test[0].prompt, "choices": list(splits.test[0].choices)})
    own = splits.train[0]  # which a file of all there is has, too: it is taught once
    more.append({"id": own.id, "prompt": own.prompt, "choices": list(own.choices)})
    more.append({"id": splits.train[1].id, "prompt": "Review: another Sentiment:", "choices": list(WORDS)})
    source = tmp_path / "more.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in more))
    words = ["distill", "--run-dir", str(run), "--unlabelled", str(source), "train.max_steps=24"]
    words += ["train.validate_every_steps=12"]
    assert main([*words, "--dry-run"]) == 0 and not Folders(run).distilled.exists()
    assert main(words) == 0
    paths = RunPaths(Folders(run).distilled)
    assert "71 rows" in capsys.readouterr().err
    taught = load_splits(load_saved(paths.config).data)
    assert [one.id for one in taught.train[:64]] == [one.id for one in splits.train] and len(taught.train) == 70
    assert taught.test == splits.test and taught.train[-1].id == f"unlabelled/{splits.train[1].id}"

    teacher = Ensemble.load(run)
    told = said(teacher, splits.train)
    shares = np.array([one.label_probabilities for one in taught.train[:64]])
    assert np.abs(told - shares).max() < 1e-6
    evaluate.evaluate_run(paths.root)
    report.write_report(paths.root)
    result = json.loads(paths.result.read_text())
    same_teacher(result, json.loads(RunPaths(run).result.read_text()))
    student = Ensemble.load(paths.root)
    unscaled = replace(student, readout=replace(student.readout, temperature=1.0))
    untrained = replace(unscaled, members=[Member(None)])
    before, after = divergence(told, said(untrained, splits.train)), divergence(told, said(unscaled, splits.train))
    assert student.members == [Member(0)] and after < 0.5 * before, (before, after)

    answers, weights = paths.taught / stage.TEACHER, paths.adapter / ADAPTER_WEIGHTS
    whole, trained = answers.read_bytes(), weights.read_bytes()
    answers.write_bytes(b"".join(whole.splitlines(keepends=True)[:30]) + b'{"row": 31, "id')
    assert main(words) == 0 and "30 of 71 rows" in capsys.readouterr().err
    assert answers.read_bytes() == whole and weights.read_bytes() == trained
    assert main([*words[:3], *words[5:]]) == 2 and "was made from other rows" in capsys.readouterr().err
