"""Machines of a cluster that come and go: how packs are placed, and what becomes of trials that went with one."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import build_config
from tune.cluster import _carried, attached_to, plan
from tune.ledger import Ledger
from tune.progress import SearchProgress
from tune.stopping import Stopping
from tune.trial import NOTHING_MORE, Assignment, failure, run_trial


@pytest.mark.parametrize(("nodes", "expected"), [
    ([{}, {"CPU": 8.0}, {"CPU": 4.0}], (8, ("pack_0", "pack_1"), 4)),  # a head that trains nothing
    ([{"CPU": 64.0}, {"CPU": 8.0, "GPU": 4.0}], (30, ("pack_0", "pack_1", "pack_2", "pack_3"), 2)),
    ([{"CPU": 2.0}], (4, ("pack_0",), 2)),
])
def test_a_worker_of_a_pack_fits_into_a_node(nodes: list[dict[str, float]], expected: tuple[Any, ...]) -> None:
    """With the cores of the whole cluster it would wait for ever for a machine that has them."""
    found = plan(build_config({}).search, nodes, 30, packed=True)
    assert (found.concurrent, found.packs, found.threads) == expected


def test_cores_are_counted_by_node() -> None:
    assert plan(build_config({}).search, [{"CPU": 1.5}, {"CPU": 1.5}], 6).concurrent == 2


def test_nodes_are_told_what_they_cannot_inherit(monkeypatch: pytest.MonkeyPatch) -> None:
    for address, attached in (("", ""), ("local", ""), ("10.0.0.1:6379", "10.0.0.1:6379")):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert attached_to() == attached
    monkeypatch.setenv("PYTHONPATH", "/checkout")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    told = _carried()
    assert (told["PYTHONPATH"], told["HF_HUB_OFFLINE"], told["RAY_CHDIR_TO_TRIAL_DIR"]) == ("/checkout", "1", "0")
    assert "HF_TOKEN" not in told


def trial(name: str) -> Any:
    return SimpleNamespace(trial_id=f"id {name}", config={"name": name}, error_file=None)


def test_a_trial_that_begins_again_can_finish_as_before(tmp_path: Path) -> None:
    from tune.scheduling import EnsembleASHA

    asked: list[str] = []
    scheduler = EnsembleASHA((2, 8), 4, 3, asked.append)
    for name in "abc":
        scheduler.on_trial_add(None, trial(name))
    row = {"step": 2, "accuracy": None, "finished": False}
    scheduler.on_trial_result(None, trial("a"), {**row, "nll": 0.5})
    scheduler.on_trial_error(None, trial("b"))
    scheduler.on_trial_add(None, trial("b"))  # as Tune does
    scheduler.on_trial_result(None, trial("c"), {**row, "nll": 0.9})
    assert asked == ["c"] and scheduler.can_finish == 3
    scheduler.on_trial_error(None, trial("c"))
    scheduler.on_trial_add(None, trial("c"))
    assert scheduler.can_finish == 4, "its run knows of no request any more"
    scheduler.on_trial_error(None, trial("b"))  # for good
    assert scheduler.can_finish == 3


def test_a_lost_trial_begins_again_in_the_ledger_and_one_that_says_why_it_failed_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tune.scheduling import make_scheduler
    from tune.space import load_arms
    from tune.study import StudyCallback

    ledger = Ledger(tmp_path / "ledger.jsonl")
    for index, name in enumerate(("trial_000", "trial_001")):
        ledger.append("start", trial=name, arm="method", index=index, values={"x": index}, config_sha256=name)
        ledger.append("report", trial=name, step=2, nll=0.5, accuracy=None)
    callback = StudyCallback(ledger, SearchProgress(ledger, 2, 8, 2), tmp_path, Stopping())
    callback.on_trial_recover(1, [], trial("trial_000"))
    record = ledger.trials["trial_000"]
    assert (record.state, record.reports, record.values) == ("running", [], {"x": 0}), "its reports come again"

    callback.on_trial_recover(1, [], trial("trial_000"))
    assert record.state == "running"
    callback.on_trial_recover(1, [], trial("trial_000"))
    record = ledger.trials["trial_000"]
    assert (record.state, record.error) == ("failed", "was lost 3 times (its process, or its machine)")
    assert (tmp_path / "trials" / ".trial_000.ended").exists(), "Tune starts it once more, for nothing"

    said = failure("row 7: label = 9: is out of range")
    assert math.isinf(said["nll"]), "it is best at nothing"
    config = build_config({"search": {"plain": False, "trials": 6, "max_steps": 8}})
    scheduler = make_scheduler(config, load_arms(config), ledger, tmp_path)
    scheduler.on_trial_add(None, trial("trial_001"))
    assert scheduler.on_trial_result(None, trial("trial_001"), said) == "CONTINUE"
    callback.on_trial_result(1, [], trial("trial_001"), said)
    callback.on_trial_complete(1, [], trial("trial_001"))
    record = ledger.trials["trial_001"]
    assert (record.state, record.error) == ("failed", "row 7: label = 9: is out of range")

    events = ledger.path.read_text()
    callback.on_trial_recover(1, [], trial("trial_001"))  # its process was lost after its last word
    callback.on_trial_result(1, [], trial("trial_001"), NOTHING_MORE)
    assert ledger.path.read_text() == events


def test_what_tune_gives_up_is_run_again_until_it_has_had_its_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial that was about to be handed to a process which is lost has not begun for Tune: it ends it at once."""
    from tune import study
    from tune.cluster import Capacity
    from tune.space import load_arms

    rounds: list[list[str]] = []

    class Tuner:
        """Every trial but the first is lost; the second begins again by itself once, and is lost again."""

        def __init__(self, _: Any, *, tune_config: Any, run_config: Any) -> None:
            self.searcher, self.samples, self.callback = (
                tune_config.search_alg, tune_config.num_samples, run_config.callbacks[0],
            )

        def fit(self) -> None:
            given = [self.searcher.suggest(str(number)) for number in range(self.samples)]
            rounds.append([one["name"] for one in given])
            for name in rounds[-1]:
                if name == "trial_000":
                    final = {"step": 8, "nll": 0.5, "accuracy": None, "finished": True, "adapter_sha256": "ab"}
                    self.callback.on_trial_result(1, [], trial(name), final)
                    continue
                if name == "trial_001" and len(rounds) == 1:
                    self.callback.on_trial_recover(1, [], trial(name))
                self.callback.on_trial_error(1, [], trial(name))

    monkeypatch.setattr(study.ray_tune, "Tuner", Tuner)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    config = build_config({"search": {"plain": False, "trials": 3, "max_steps": 8}})
    arms, ledger = load_arms(config), Ledger(tmp_path / "ledger.jsonl")
    capacity = Capacity(concurrent=3, workers=1, gpus=0, threads=1)
    made = study.Study(config, arms, ledger, tmp_path, capacity)
    study.run_study(made, SearchProgress(ledger, 3, 8, 3), tmp_path, Stopping(), None, None)
    assert rounds == [["trial_000", "trial_001", "trial_002"], ["trial_001", "trial_002"], ["trial_002"]]
    assert [record.state for record in ledger.in_order()] == ["done", "failed", "failed"]

    monkeypatch.delenv("RAY_ADDRESS")
    ledger = Ledger(tmp_path / "alone.jsonl")
    made = study.Study(config, arms, ledger, tmp_path, capacity)
    rounds.clear()
    study.run_study(made, SearchProgress(ledger, 3, 8, 3), tmp_path, Stopping(), None, None)
    assert len(rounds) == 1, "on one machine it would be killed again"


def test_what_had_ended_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune starts a trial again whose process is lost after its last word; its folder holds the result."""
    import ray.tune

    from tune.pack import run_packed

    reported: list[Any] = []
    monkeypatch.setattr(ray.tune, "report", reported.append)
    given = Assignment("trial_000", str(tmp_path), str(tmp_path), "", "", 1, 0, "pack_0", ("pack_0",))
    given.run.mkdir(parents=True)
    given.ended.touch()
    run_packed(given.to_dict())
    run_trial(given.to_dict())
    assert reported == [NOTHING_MORE] * 2 and given.run.is_dir()
