"""The ledger: what was acknowledged survives a kill, and a search can be rebuilt from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from pipeline import ConfigError, UserError
from tune.ledger import Ledger
from tune.sampling import Observation

WRITER = """
import sys
from pathlib import Path
from tune.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
ledger.append("start", trial="t", index=0, values={}, config_sha256="h")
for step in range(100000):
    ledger.append("report", trial="t", step=step, nll=0.5, accuracy=None)
    print(step, flush=True)
"""


def fill(ledger: Ledger) -> None:
    ledger.open_search("id", {"rate": {"uniform": [0.1, 0.6]}})
    for index, name in enumerate(("a", "b", "c", "d")):
        ledger.append("start", trial=name, index=index, values={"rate": index / 10}, config_sha256=name * 3)
        ledger.append("report", trial=name, step=2, nll=(7 - index) / 10, accuracy=0.5)
    ledger.append("report", trial="a", step=4, nll=0.6, accuracy=0.8)
    ledger.append("end", trial="a", state="done", adapter_sha256="w")
    ledger.append("end", trial="b", state="stopped")
    ledger.append("end", trial="c", state="failed", error="it broke")


def test_a_search_is_rebuilt(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(written := Ledger(path))
    read = Ledger(path)
    assert read.trials == written.trials
    assert [(r.name, r.state, r.steps, r.nll, r.accuracy) for r in read.in_order()] == [
        ("a", "done", 4, 0.6, 0.8), ("b", "stopped", 2, 0.6, 0.5), ("c", "failed", 2, 0.5, 0.5),
        ("d", "running", 2, 0.4, 0.5),
    ]  # fmt: skip
    assert read.observations("method") == [
        Observation({"rate": 0.0}, 0.6, 4, complete=True), Observation({"rate": 0.1}, 0.6, 2, complete=False)
    ]  # fmt: skip
    assert (read.trials["a"].adapter_sha256, read.trials["c"].error) == ("w", "it broke")


def test_a_second_attempt_starts_afresh(tmp_path: Path) -> None:
    fill(ledger := Ledger(tmp_path / "ledger.jsonl"))
    ledger.append("start", trial="c", index=2, values={"rate": 0.2}, config_sha256="ccc")
    record = Ledger(tmp_path / "ledger.jsonl").trials["c"]
    assert (record.state, record.reports, record.error) == ("running", [], None)


def test_another_search_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.jsonl").open_search("one", {})
    Ledger(tmp_path / "ledger.jsonl").open_search("one", {})
    with pytest.raises(ConfigError, match="other settings"):
        Ledger(tmp_path / "ledger.jsonl").open_search("two", {})


@pytest.mark.parametrize("torn", ['{"event": "end", "tri', "x"])
def test_half_a_line_at_the_end_is_cut_off(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "ledger.jsonl"
    fill(Ledger(path))
    whole = path.read_text()
    path.write_text(whole + torn)
    ledger = Ledger(path)
    assert path.read_text() == whole
    ledger.append("end", trial="d", state="done", adapter_sha256="x")
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()][-2:] == ["end", "end"]
    assert Ledger(path).trials["d"].state == "done"


@pytest.mark.parametrize("content", ["no json\n", '{"event": "end", "trial": "never started", "state": "done"}\n'])
def test_a_damaged_ledger_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"ledger\.jsonl(:1: is damaged|: is no ledger of a search)"):
        Ledger(tmp_path / "ledger.jsonl")


def test_a_ledger_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("half a line")
    (tmp_path / "ledger.jsonl").symlink_to(other)
    with pytest.raises(UserError, match="is a symbolic link"):
        Ledger(tmp_path / "ledger.jsonl")
    assert other.read_text() == "half a line"


def test_an_event_is_on_disk_before_the_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "ledger.jsonl", []
    ledger = Ledger(path)
    monkeypatch.setattr("tune.ledger.os.fsync", lambda descriptor: synced.append(path.read_text()))
    ledger.open_search("id", {})
    assert synced == [path.read_text()]
    assert synced[0].endswith("\n")


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=_environment())
    assert writer.stdout is not None
    acknowledged = [writer.stdout.readline() for _ in range(50)]
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    steps = [report["step"] for report in Ledger(path).trials["t"].reports]
    assert steps == list(range(len(steps)))
    assert len(steps) > int(acknowledged[-1])


def test_what_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    fill(ledger)
    before = (tmp_path / "ledger.jsonl").read_text()
    with pytest.raises(ValueError, match="JSON"):
        ledger.append("report", trial="d", step=4, nll=float("nan"), accuracy=None)
    assert (tmp_path / "ledger.jsonl").read_text() == before


def _environment() -> dict[str, Any]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}
