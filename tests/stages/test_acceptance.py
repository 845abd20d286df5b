"""The acceptance of a GPU between its starts: what is kept, what is run again, what its table and exit code say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import acceptance
from helpers.acceptance import Acceptance, Figures, norm_apart, table

from benchmarks.checkout import ROOT, Checkout
from benchmarks.setting import SCALES, Setting
from benchmarks.table import Row
from benchmarks.timing import Spread
from pipeline.errors import EXIT_OK, EXIT_STOPPED
from pipeline.files import read_json

FACTS = {"commit": "abc", "versions": {"torch": "2"}}


@pytest.fixture(autouse=True)
def fixed_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "facts", lambda setting, scale: FACTS)
    monkeypatch.setattr(acceptance, "code_hash", lambda: "one")
    monkeypatch.setattr(acceptance, "_device", lambda name: "some GPU")


def opened(tmp_path: Path, writes: bool = True) -> Acceptance:
    here = Checkout(ROOT, "abc")
    return Acceptance(tmp_path / "kept.json", Setting(SCALES["small"], tmp_path, here, device="cuda"), writes)


def item(file: str, name: str = "x") -> Any:
    path = Path(f"tests/gpu/test_{file}.py")
    return SimpleNamespace(path=path, nodeid=f"{path}::test_{name}", user_properties=[])


def report(of: Any, outcome: str = "passed", when: str = "call", why: str = "") -> Any:
    return SimpleNamespace(
        nodeid=of.nodeid, when=when, outcome=outcome, duration=1.5, user_properties=of.user_properties,
        passed=outcome == "passed", skipped=outcome == "skipped", longreprtext=why, longrepr=("", 0, why),
    )


def left(plugin: Acceptance, *items: Any) -> list[str]:
    """What a start would run, in order."""
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: None))
    chosen = list(items)
    plugin.pytest_collection_modifyitems(config, chosen)
    return [one.nodeid for one in chosen]


def ended(plugin: Acceptance, status: int = 0) -> int:
    session: Any = SimpleNamespace(exitstatus=status)
    plugin.pytest_sessionfinish(session)
    return int(session.exitstatus)


def test_what_has_passed_is_not_run_again_under_the_same_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, layer, zero = item("large"), item("layer"), item("zero")
    first = opened(tmp_path)
    assert left(first, large, zero, layer) == [layer.nodeid, zero.nodeid, large.nodeid]
    Figures(layer, small=False).within("off", 0.5, 1.0)
    first.pytest_runtest_logreport(report(layer))
    first.pytest_runtest_logreport(report(layer, when="teardown"))
    first.pytest_runtest_logreport(report(zero, "failed", why="E  it broke"))
    first.pytest_runtest_logreport(report(large, "skipped", "setup", "out of time"))
    kept = read_json(tmp_path / "kept.json")["pieces"]
    assert {name: piece["outcome"] for name, piece in kept.items()} == {
        layer.nodeid: "passed", zero.nodeid: "failed", large.nodeid: "not run",
    }
    assert kept[layer.nodeid]["figures"][0]["apart"] == 0.5 and "it broke" in kept[zero.nodeid]["detail"]

    second = opened(tmp_path)
    assert left(second, large, zero, layer) == left(opened(tmp_path, False), large, zero, layer) == [
        zero.nodeid, large.nodeid,
    ]
    second.pytest_runtest_logreport(report(zero))
    assert second.pieces[zero.nodeid]["detail"] == "" and ended(second) == EXIT_STOPPED
    second.pytest_runtest_logreport(report(large))
    assert ended(second) == EXIT_OK and ended(second, status=1) == 1
    assert left(opened(tmp_path), large, zero, layer) == [] and ended(opened(tmp_path), status=5) == EXIT_OK
    monkeypatch.setattr(acceptance, "code_hash", lambda: "other")
    assert len(left(opened(tmp_path), large, zero, layer)) == 3


def test_late_pieces_are_left_to_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = opened(tmp_path)
    plugin.pytest_runtest_setup(item("large"))
    monkeypatch.setattr(acceptance, "LAST_START", -1.0)
    with pytest.raises(pytest.skip.Exception, match="the same command goes on"):
        opened(tmp_path).pytest_runtest_setup(item("large"))


def test_a_worker_of_xdist_writes_nothing(tmp_path: Path) -> None:
    plugin = opened(tmp_path, writes=False)
    plugin.pytest_runtest_logreport(report(item("layer")))
    assert not (tmp_path / "kept.json").exists()


def test_targets_are_beside_what_is_measured_and_decide_nothing() -> None:
    rows = [Row("large", "speed", value=Spread.of([v]), unit="tokens/s", target="8B tokens") for v in (9000.0, 8000.0)]
    found = item("large", "rows[a]")
    Figures(found, small=False).rows(rows)
    Figures(found, small=True).rows(rows[1:])
    wanted = [value["wanted"] for _, value in found.user_properties]
    assert wanted == ["≥ 8,600 tokens/s, reached", "≥ 8,600 tokens/s, missed", "≥ 8,600 tokens/s on a GPU"]
    pieces = {found.nodeid: {
        "outcome": "passed", "seconds": 3.0, "detail": "", "figures": [value for _, value in found.user_properties],
    }}  # fmt: skip
    shown = table(pieces, {"device": "some GPU", "commit": "abc"})
    assert "large_rows[a]" in shown and "8,000 tokens/s" in shown and "some GPU, commit abc" in shown


def test_a_difference_beyond_the_tolerance_fails_and_is_reported() -> None:
    found = item("layer")
    figures = Figures(found, small=True)
    ours = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([0.0, 4.0])}
    figures.close("same", ours, ours, 0.0)
    other = {**ours, "y": torch.tensor([0.2, 4.0])}
    with pytest.raises(AssertionError, match="y 5.00e-02 beyond 1.00e-02"):
        figures.close("other", other, ours, 0.01)
    nan = {**ours, "x": torch.tensor([1.0, torch.nan])}
    with pytest.raises(AssertionError, match="inf"):
        figures.close("nan", nan, ours, 1e9)
    assert [value["where"] for _, value in found.user_properties] == ["x", "y", "x"]
    assert norm_apart(ours, ours) == 0.0 and norm_apart(nan, ours) == float("inf")
    assert norm_apart(other, ours) == pytest.approx(0.2 / 21**0.5)
