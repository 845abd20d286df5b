"""Packed searches under real Ray, with a pack of milliseconds: kills of worker, trial and driver, failures, stops."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.searches import PATIENCE_SECONDS, end, ended, run, start, starts, wait_for, write_config

from pipeline import EXIT_OK

pytestmark = pytest.mark.slow

GRID = "adapter.rate: {grid: [0.1, 0.2, 0.3, 0.4]}"


def packed(folder: Path, **search: Any) -> None:
    write_config(folder, GRID, **{"trials": 4, "adapters": 4, "pack": 3, **search})


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "search" / "search.json").read_text())
    return found


def steps_of(folder: Path) -> dict[str, list[int]]:
    """Steps taken of each trial, those that were taken again included."""
    return {
        path.parent.name: [int(line.split()[0]) for line in path.read_text().splitlines()]
        for path in sorted((folder / "search" / "trials").glob("*/steps.txt"))
    }


def packs_of(folder: Path) -> list[str]:
    """The worker processes that there have been."""
    lines = (folder / "search" / "trials" / "pack_0.log").read_text().splitlines()
    return [line.split()[2].rstrip(",") for line in lines if line.startswith("pack in ")]


def requires_the_undisturbed_best(folder: Path) -> None:
    found = result_of(folder)
    assert (found["best_config"], found["best"]) == ({"adapter.rate": 0.3}, "trial_002")
    assert [trial["state"] for trial in found["trials"]] == ["done"] * 4


def test_trials_share_a_worker_and_the_driver_loads_no_torch(tmp_path: Path) -> None:
    packed(tmp_path)
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    assert "loaded:\n" in output and "3 at once, packed on one base" in output
    requires_the_undisturbed_best(tmp_path)
    assert len(packs_of(tmp_path)) == 1 and steps_of(tmp_path) == {f"trial_00{k}": [*range(1, 9)] for k in range(4)}
    assert [[r["step"] for r in trial["reports"]] for trial in result_of(tmp_path)["trials"]] == [[2, 4, 6, 8]] * 4


def test_a_worker_that_is_killed_is_replaced_and_its_runs_go_on_from_their_checkpoints(tmp_path: Path) -> None:
    packed(tmp_path)
    code, output = run(tmp_path, STUB_DIE="trial_001", STUB_SECONDS="0.2")
    assert code == EXIT_OK, output
    requires_the_undisturbed_best(tmp_path)
    assert len(packs_of(tmp_path)) == 2 and len(starts(tmp_path)) == 4, "the ledger has noticed"
    for steps in steps_of(tmp_path).values():
        again = [step for step in set(steps) if steps.count(step) > 1]
        assert sorted(set(steps)) == [*range(1, 9)] and len(again) <= 1, "more was lost than since the last checkpoint"


def test_a_worker_that_dies_again_and_again_fails_its_trials(tmp_path: Path) -> None:
    packed(tmp_path, concurrent=1)
    code, output = run(tmp_path, STUB_DIE="trial_001", STUB_DEATHS="always")
    assert code == EXIT_OK, output
    trials = {trial["name"]: trial for trial in result_of(tmp_path)["trials"]}
    assert "the worker that trains it died 3 times" in trials["trial_001"]["error"]
    assert [trials[name]["state"] for name in ("trial_000", "trial_002", "trial_003")] == ["done"] * 3


def test_a_run_that_fails_does_not_disturb_its_neighbours(tmp_path: Path) -> None:
    packed(tmp_path)
    code, output = run(tmp_path, STUB_FAIL="trial_001")
    assert code == EXIT_OK, output
    trials = {trial["name"]: trial for trial in result_of(tmp_path)["trials"]}
    assert trials["trial_001"]["error"] == "data.jsonl row 7: label = 9: is out of range. Use 0 or 1."
    assert len(packs_of(tmp_path)) == 1 and trials["trial_000"]["state"] == trials["trial_002"]["state"] == "done"


def test_a_driver_that_is_killed_repeats_no_finished_trial_and_no_step_before_a_checkpoint(tmp_path: Path) -> None:
    packed(tmp_path, pack=2)
    process = start(tmp_path, STUB_SECONDS="0.4")
    try:
        wait_for(tmp_path, "end", 2)
        wait_for(tmp_path, "report", 10)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finished, begun = ended(tmp_path), len(starts(tmp_path))
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    requires_the_undisturbed_best(tmp_path)
    assert not {name for name, *_ in starts(tmp_path)[begun:]} & finished.keys(), "a finished trial ran again"
    for steps in steps_of(tmp_path).values():
        assert sorted(set(steps)) == [*range(1, 9)] and len(steps) <= 8 + 2, "more was lost than since a checkpoint"
    for trial in result_of(tmp_path)["trials"]:  # a report that was on its way to the ledger dies with the driver
        reported = [r["step"] for r in trial["reports"]]
        assert reported == sorted({*reported}) and reported[-1] == 8 and {*reported} <= {2, 4, 6, 8}
        assert len(reported) >= 3, "more than the one report that was on its way is missing"


def test_a_trial_that_is_killed_fails_alone_and_the_same_command_ends_it(tmp_path: Path) -> None:
    packed(tmp_path)
    process = start(tmp_path, STUB_SECONDS="0.4")
    try:
        wait_for(tmp_path, "report", 3)
        os.kill(client_of(process.pid), signal.SIGKILL)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        end(process)
    assert process.returncode == EXIT_OK, output
    states = [trial["state"] for trial in result_of(tmp_path)["trials"]]
    assert sorted(states) == ["done", "done", "done", "failed"] and "process died" in output
    begun = len(starts(tmp_path))
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    assert len(starts(tmp_path)) == begun + 1
    requires_the_undisturbed_best(tmp_path)


def client_of(driver: int) -> int:
    """A process of Ray that runs a trial, of those that the driver started."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < patience:
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ImplicitFunc" in " ".join(process.cmdline()):  # Tune's name of a trial that is a function
                    return process.pid
        time.sleep(0.1)
    raise AssertionError("no trial is running")


def test_a_packed_trial_is_stopped_early(tmp_path: Path) -> None:
    """Two at a time: the last and worst one comes when the others have been there."""
    write_config(tmp_path, "adapter.rate: {grid: [0.3, 0.59, 0.6]}", trials=3, adapters=1, pack=2)
    code, output = run(tmp_path, STUB_SECONDS="0.5")
    assert code == EXIT_OK, output
    trials = result_of(tmp_path)["trials"]
    assert trials[0]["state"] == "done" and "stopped" in {trial["state"] for trial in trials[1:]}
    assert all(trial["steps"] < 8 for trial in trials if trial["state"] == "stopped")
