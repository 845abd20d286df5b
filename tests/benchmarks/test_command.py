from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from benchmarks import command
from benchmarks.cases import CASES, Case
from benchmarks.checkout import CommandFailed
from benchmarks.command import main
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Spread


def test_list_names_every_case_and_loads_no_torch() -> None:
    code = "import sys; from benchmarks.command import main; main(['--list']); assert 'torch' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in ended.stdout.splitlines()] == list(CASES)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stpe"], "case = 'stpe': is none. There are step, "),
        (["step", "--repeats", "0"], "--repeats = 0"),
        (["step", "--json", "/nowhere/at/all.json"], "--json = '/nowhere/at/all.json'"),
        (["step", "adapter.rnak=4"], "adapter.rnak = 4: is not a known key. Did you mean adapter.rank"),
        (["step", "--against", "no-such-commit"], "--against = 'no-such-commit': is neither"),
        (["step", "--against", "--upload-pack=x"], "expected one argument"),
        (["step", "--device", "tpu"], "--device = 'tpu'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Case, "run", lambda *_: pytest.fail("something was measured"))
    try:
        code = main(words)
    except SystemExit as error:  # argparse's own
        code = int(str(error.code))
    assert code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["step", "--device", "cuda"]) == 2
    assert "--device = 'cuda'" in capsys.readouterr().err


def a_row(setting: Setting) -> list[Row]:
    return [Row("good", "what", "against", Spread.of([2.0]), note=f"{setting.repeats}, {setting.overrides}")]


def a_failure(_: Setting) -> list[Row]:
    raise CommandFailed("it ended with 1:\nits last words")


def test_a_case_that_fails_does_not_take_the_others_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("benchmarks.cases.made_up")
    module.__dict__.update(a_row=a_row, a_failure=a_failure)
    monkeypatch.setitem(sys.modules, "benchmarks.cases.made_up", module)
    cases = (Case("bad", "fails", "made_up:a_failure"), Case("good", "works", "made_up:a_row"))
    monkeypatch.setattr(command, "CASES", {case.name: case for case in cases} | {"curves": CASES["curves"]})
    file = tmp_path / "found.json"
    assert main(["--markdown", "--repeats", "3", "--json", str(file), "data.max_tokens=32"]) == 1
    shown = capsys.readouterr()
    assert "its last words" in shown.err and "| bad | fails |" in shown.out and "2.00×" in shown.out
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["bad", "good"]
    assert rows[0]["value"] is None and rows[1]["note"] == "3, ('data.max_tokens=32',)"
    facts = json.loads(file.read_text())["facts"]
    assert facts["versions"]["torch"] == torch.__version__ and facts["machine"]["cores"] >= 1
    assert facts["overrides"] == ["data.max_tokens=32"] and "scale full data.max_tokens=32: not what the" in shown.out
    assert isinstance(facts["quiet"], bool) and len(facts["load_average"]) == 3
