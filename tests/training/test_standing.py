"""How far packs have come: what was trained before this start does not make it look fast."""

from __future__ import annotations

import itertools

import pytest

from pipeline.training.packed.standing import Standing, shown


def test_standings_add_up_and_the_time_left_goes_by_this_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = itertools.count(100.0, 100.0)
    monkeypatch.setattr("pipeline.terminal.time.monotonic", lambda: next(seconds))
    show = shown(100)
    show(Standing(30, 2, 1) + Standing(20, 3, 4))  # 50 steps are from before
    show(Standing(20, 2, 1) + Standing(20, 3, 4))  # 10 more after 200 s: 40 are left
    show(Standing(0, 0, 0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("step 50/100 · 5 runs share their passes, 5 wait")
    assert lines[1] == "step 60/100 · 5 runs share their passes, 5 wait · 13 min left"
    assert lines[2].startswith("step 100/100 · 0 runs share their passes, 0 wait")
