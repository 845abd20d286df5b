"""`loradrop predict`: whole, continued, torn and foreign outputs; faults before a model; several processes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.config.data import TemplateConfig
from pipeline.data.rows import Row
from pipeline.ensemble.ensemble import Ensemble
from pipeline.ensemble.rows import RowForm, checked
from pipeline.errors import ConfigError, DataError, ErrorList, RunFolderError
from pipeline.run_folder.paths import RunPaths
from pipeline.stages import predict as stage

WORDS = (" negative", " positive")


def row(number: int, **values: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "prompt": f"Review: the film was good {number} Sentiment:", **values}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_rows_without_answers_are_read_as_those_with() -> None:
    template = TemplateConfig(prompt="Q: {text}", choices=("no", "yes"), label="gold")
    form = RowForm("choice", template, ("no", "yes"), True)
    records = [("a:1", {"text": "one"}), ("a:2", {"text": "two", "gold": "yes"}), ("a:3", {"text": "two", "gold": ""})]
    rows = list(checked(form.read(iter(records)), "a"))
    assert [(one.prompt, one.label) for one in rows] == [("Q: one", None), ("Q: two", 1), ("Q: two", None)]
    assert stage.made_from("run", rows[1])[:4] != stage.made_from("run", rows[0])[:4]
    own = RowForm("choice", None, WORDS, False)
    assert next(own.read(iter([("a:1", {"prompt": "p"})]))).choices == WORDS
    numbers = RowForm("regression", None, None, True)
    assert next(numbers.read(iter([("a:1", {"prompt": "p"})]))).kind == "regression"
    assert own.example().choices == WORDS and numbers.example().score == 0.0


def test_faults_of_rows_are_named_together() -> None:
    fixed = RowForm("choice", None, WORDS, True)
    records = [
        ("a:1", {"prompt": "p"}), ("a:2", {"text": "p"}), ("a:3", {"prompt": "q", "choices": ["x", "y"]}),
        ("a:4", {"prompt": "q", "label": 7}), ("a:5", DataError("a:5", None, "is no JSON")),
    ]
    with pytest.raises(ErrorList) as found:
        list(checked(fixed.read(iter(records)), "a"))
    lines = str(found.value).splitlines()
    assert len(lines) == 4 and "a:2" in lines[0] and "an output each" in lines[1] and "0 to 1" in lines[2]
    with pytest.raises(DataError, match="a:1: prompt: is not a column; the columns are text, id. Rename"):
        list(checked(fixed.read(("a:1", {"text": "p", "id": n}) for n in range(3)), "a"))
    with pytest.raises(DataError, match="is the id of a:1 too"):
        list(checked(fixed.read(iter([("a:1", {"id": 1, "prompt": "p"}), ("a:2", {"id": 1, "prompt": "q"})])), "a"))
    with pytest.raises(DataError, match="holds no rows"):
        list(checked(iter(()), "empty.jsonl"))


def test_an_output_goes_on_where_it_ends_and_belongs_to_its_rows(tmp_path: Path) -> None:
    rows = [Row(f"r{n}", f"text {n}", WORDS) for n in range(3)]
    lines = [{"id": one.id, "made_from": stage.made_from("run", one)} for one in rows]
    output = tmp_path / "out.jsonl"
    assert stage.compare(iter(rows), output, "run") == (3, 0) and stage.cut_torn_line(output) == 0
    stage._append(output, lines[:2])
    whole = output.read_bytes()
    output.write_bytes(whole + b'{"id": "r2", "made_')
    assert stage.compare(iter(rows), output, "run") == (3, 2)
    assert stage.cut_torn_line(output) == 2 and output.read_bytes() == whole
    for others, identity, line in (
        (rows, "another run", 1), ([rows[0], Row("r1", "another text", WORDS)], "run", 2), (rows[:1], "run", 2),
        ([rows[1], rows[0]], "run", 1),
    ):
        with pytest.raises(RunFolderError, match=rf"out.jsonl:{line}: was made from other rows"):
            stage.compare(iter(others), output, identity)


def test_places_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("")
    for given, says in (
        (tmp_path / "not.jsonl", "does not exist"), (tmp_path, "no regular file"), ("~nobody-here/x", "cannot be used"),
    ):
        with pytest.raises(ConfigError, match=rf"--input = .*{says}"):
            stage._source(str(given), tmp_path, nodes=1)
    assert stage._source(str(tmp_path / "there.jsonl"), tmp_path, nodes=1) == tmp_path / "there.jsonl"
    with pytest.raises(ConfigError, match="another one on each of 2 nodes"):
        stage._source("-", tmp_path, nodes=2)
    for given, says in (("-", "no file"), (tmp_path, "no file"), (tmp_path / "no" / "out.jsonl", "is no folder")):
        with pytest.raises(ConfigError, match=rf"--output = .*{says}"):
            stage._usable(str(given))
    assert stage._usable(str(tmp_path / "out.jsonl")) == tmp_path / "out.jsonl"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["predict", "--input", "rows.jsonl"], "needs --input FILE (or -) and --output FILE"),
        (["predict", "--input", "-", "--output", "out", "--run-dir", "nothing"], "holds no run"),
        (["predict", "--abstain", "many"], "invalid float value"),
    ],
)
def test_a_wrong_command_is_told(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2 and says in capsys.readouterr().err


@pytest.fixture
def run(finished_run: tuple[RunPaths, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in which the stage works in this process."""

    def here(name: str, config: RunConfig, folders: Any) -> int:
        stage.predict_rows(folders.run)
        return 0

    monkeypatch.setattr(stage, "start", here)
    monkeypatch.setattr("pipeline.distributed.world.leave_world", lambda: None)
    monkeypatch.setattr(stage, "CHUNK_ROWS", 4)
    return Path(shutil.copytree(finished_run[0].root, tmp_path / "run"))


@pytest.mark.slow
def test_rows_are_predicted_once(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(n, choices=list(WORDS)) for n in range(10)]
    source, output = write_rows(tmp_path / "new.jsonl", rows), tmp_path / "out.jsonl"
    words = ["predict", "--run-dir", str(run), "--input", str(source), "--output", str(output)]
    assert main(words) == 0 and "10 rows predicted" in capsys.readouterr().err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["id"] for one in answers] == [one["id"] for one in rows]
    asked = Ensemble.load(run).predict(rows)
    for answer, other in zip(answers, asked, strict=True):
        assert answer["choice"] == other.choice in {word.strip() for word in WORDS} and "answered" not in answer
        assert answer["probabilities"] == pytest.approx(other.probabilities, abs=1e-6)
        assert sum(answer["probabilities"]) == pytest.approx(1.0, abs=1e-9)

    content = output.read_bytes()
    assert main(words) == 0 and "10 of 10 rows are in" in capsys.readouterr().err
    half = b"".join(content.splitlines(keepends=True)[:6])
    output.write_bytes(half + b'{"id": "r6", "cho')
    assert main(words) == 0 and "4 rows predicted" in capsys.readouterr().err
    continued = output.read_bytes()
    assert continued.startswith(half) and len(continued.splitlines()) == 10

    assert main([*words, "--abstain", "0.9"]) == 2  # an output of other words
    assert "was made from other rows, another run, or under another --abstain" in capsys.readouterr().err
    assert output.read_bytes() == continued
    spoken = type("Stdin", (), {"buffer": io.BytesIO(source.read_bytes())})
    monkeypatch.setattr("sys.stdin", spoken)
    words[4:] = ["-", "--output", str(tmp_path / "abstained.jsonl"), "--abstain", "0.9"]
    assert main(words) == 0 and "at most 90.0% of answers are wrong" in capsys.readouterr().err
    told = [json.loads(line) for line in (tmp_path / "abstained.jsonl").read_text().splitlines()]
    assert [one["answered"] for one in told] == [True] * 10


@pytest.mark.slow
def test_several_processes_write_what_one_writes(
    finished_run: tuple[RunPaths, RunConfig], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run[0].root, tmp_path / "run")
    rows = [row(n, choices=list(WORDS)) for n in range(7)]
    source = write_rows(tmp_path / "new.jsonl", rows)
    outputs = []
    for processes in (1, 2):
        outputs.append(tmp_path / f"by_{processes}.jsonl")
        words = ["predict", "--run-dir", str(run), "--input", str(source), "--output", str(outputs[-1])]
        assert main([*words, f"launch.processes={processes}"]) == 0, capfd.readouterr().err
    one, two = ([json.loads(line) for line in path.read_text().splitlines()] for path in outputs)
    assert [line["made_from"] for line in one] == [line["made_from"] for line in two]
    for first, second in zip(one, two, strict=True):
        assert first["probabilities"] == pytest.approx(second["probabilities"], abs=1e-5)
