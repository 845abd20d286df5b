"""A pack's worker without Ray: how many runs it lets in, what it tells of them, what a pack that breaks leads to."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline import RunConfig, RunPaths, build_config, dump_config, write_text
from pipeline.errors import DataError, Stopped
from pipeline.run_folder.mark import claim
from tune import pack as pack_module
from tune.pack import PackWorker
from tune.trial import Assignment

STEPS = 4


class FakePack:
    """One step of each run at a time; validates every second one."""

    fails: dict[str, Exception] = {}
    """Name of a run -> what ends it; "pack": what breaks all."""
    made: list[FakePack] = []
    go = threading.Event()
    """It advances from then on."""

    def __init__(self, config: RunConfig, trusted: bool) -> None:
        self.members: dict[Path, tuple[list[int], Callable[[dict[str, Any]], None]]] = {}
        self.most = 0
        FakePack.made.append(self)

    @property
    def runs(self) -> int:
        return len(self.members)

    def admit(self, config: RunConfig, run_dir: Path, on_validation: Callable[[dict[str, Any]], None]) -> None:
        self.members[run_dir] = ([0], on_validation)
        self.most = max(self.most, self.runs)

    def advance(self) -> list[Any]:
        self.go.wait(30)
        if "pack" in self.fails:
            raise self.fails.pop("pack")
        ended = []
        for folder, (step, tell) in list(self.members.items()):
            step[0] += 1
            error = self.fails.get(folder.name)
            if error is None and step[0] % 2 == 0:
                tell({"step": float(step[0]), "nll": 1.0 / step[0], "published": 1.0})
            if error is not None or step[0] == STEPS:
                del self.members[folder]
                result = None if error else {"steps": STEPS}
                state = "stopped" if isinstance(error, Stopped) else "failed" if error else "done"
                ended.append(Ended(folder, state, result, error))
        return ended


class Ended:
    """As `pipeline.Ended`."""

    def __init__(self, run_dir: Path, state: str, result: dict[str, Any] | None, error: Exception | None) -> None:
        self.run_dir, self.state, self.result, self.error = run_dir, state, result, error


@pytest.fixture
def make_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PackWorker]:
    def make(**search: Any) -> PackWorker:
        shared = dump_config(build_config({"search": search}))
        return PackWorker(shared, False, os.getcwd(), str(tmp_path / "log"), 1, None)

    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(pack_module, "print_to", lambda path: None)
    monkeypatch.setitem(vars(pipeline), "Pack", FakePack)
    monkeypatch.setitem(vars(pipeline), "runs_that_fit", lambda config: 2)
    monkeypatch.setattr(FakePack, "fails", {})
    monkeypatch.setattr(FakePack, "made", [])
    FakePack.go.set()
    return make


def assignment(folder: Path, name: str) -> Assignment:
    config = build_config({"train": {"max_steps": STEPS}, "label": name})
    return Assignment(name, str(folder), str(folder), dump_config(config), config.sha256(), 1, 0, "pack_0")


def end_of(worker: PackWorker, name: str) -> tuple[list[int], tuple[str, Any]]:
    """(steps of the validations, how it ended)."""
    seen, steps = -1, list[int]()
    for _ in range(100):
        found = worker.reports(name, seen)
        assert found is not None
        rows, ended = found
        steps += [int(row["step"]) for row in rows]
        seen = steps[-1] if steps else seen
        if ended is not None:
            return steps, ended
    raise AssertionError("endless")


@pytest.mark.parametrize(("pack", "most"), [("auto", 2), (1, 1), (3, 3)])
def test_as_many_runs_are_let_in_as_fit_and_the_others_follow(
    tmp_path: Path, make_worker: Callable[..., PackWorker], pack: Any, most: int
) -> None:
    worker, names = make_worker(pack=pack), ["a", "b", "c", "d"]
    FakePack.go.clear()
    for name in names:
        assert worker.admit(assignment(tmp_path, name).to_dict()) == os.getpid()
        worker.admit(assignment(tmp_path, name).to_dict())  # again: it is there
    FakePack.go.set()
    assert [end_of(worker, name) for name in names] == [([2, 4], ("done", {"steps": STEPS}))] * 4
    assert len(FakePack.made) == 1 and FakePack.made[0].most == most
    assert worker.reports("e", -1) is None


def test_a_run_that_fails_or_is_stopped_says_how(tmp_path: Path, make_worker: Callable[..., PackWorker]) -> None:
    FakePack.fails = {"a": DataError("row 7", None, "is empty", "Fill it."), "b": Stopped("stopped at step 1")}
    worker = make_worker(pack=3)
    for name in "abc":
        worker.admit(assignment(tmp_path, name).to_dict())
    assert end_of(worker, "a")[1] == ("failed", "row 7: is empty. Fill it.")
    assert end_of(worker, "b")[1] == ("stopped", None) and end_of(worker, "c")[1][0] == "done"


def test_a_pack_that_breaks_fails_its_runs_and_the_next_run_finds_a_new_one(
    tmp_path: Path, make_worker: Callable[..., PackWorker]
) -> None:
    FakePack.fails = {"pack": MemoryError("no room")}
    worker = make_worker(pack=3)
    worker.admit(assignment(tmp_path, "a").to_dict())
    assert end_of(worker, "a") == ([], ("failed", "MemoryError: no room"))
    worker.admit(assignment(tmp_path, "b").to_dict())
    assert end_of(worker, "b")[1][0] == "done" and len(FakePack.made) == 2


def test_a_folder_is_gone_on_with_only_where_it_holds_this_run(
    tmp_path: Path, make_worker: Callable[..., PackWorker]
) -> None:
    """What it has told before it tells again; another run's folder is emptied."""
    worker = make_worker(pack=3)
    for name, label in (("mine", "mine"), ("other", "another")):
        paths = RunPaths(tmp_path / "trials" / name)
        claim(paths.root, "run")
        paths.checkpoints.mkdir()
        config = build_config({"train": {"max_steps": STEPS}, "label": label})
        write_text(paths.config, dump_config(config))
        write_text(paths.metrics, '{"kind": "validation", "step": 1, "nll": 0.7}\n')
        worker.admit(assignment(tmp_path, name).to_dict())
    assert end_of(worker, "mine")[0] == [1, 2, 4]
    assert end_of(worker, "other")[0] == [2, 4] and not RunPaths(tmp_path / "trials" / "other").metrics.exists()


def test_another_configuration_than_the_chosen_one_is_not_trained(
    tmp_path: Path, make_worker: Callable[..., PackWorker]
) -> None:
    worker = make_worker(pack=3)
    worker.admit({**assignment(tmp_path, "a").to_dict(), "config_sha256": "another"})
    _, (state, said) = end_of(worker, "a")
    assert state == "failed" and "another configuration than the chosen one reached the worker" in said
