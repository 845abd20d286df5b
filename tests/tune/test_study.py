"""The search's decisions without a cluster: what fits, what stops early, what forms the ensemble, what is shown."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import ROOT
from helpers.tune_stub import write_data

import pipeline
from pipeline import (
    ADAPTER_WEIGHTS,
    ConfigError,
    EarlyExitConfig,
    RunConfig,
    RunFolderError,
    RunPaths,
    StageFailed,
    build_config,
    dump_config,
    duration,
    load_splits,
    publish_folder,
    sha256_file,
    write_text,
)
from pipeline.data.rows import Row
from pipeline.run_folder.predictions import (
    ChoicePredictions,
    CompletionPredictions,
    RegressionPredictions,
    write_predictions,
)
from tune import progress as progress_module
from tune.cluster import plan
from tune.dimensions import Space
from tune.ensemble import choose_ensemble, validation_losses
from tune.ledger import Ledger, TrialRecord, pending
from tune.progress import SearchProgress
from tune.space import Arm, load_arms, packing_refusal
from tune.stopping import Stopping
from tune.trial import Assignment, _train


@pytest.mark.parametrize(
    ("search", "resources", "trials", "expected"),
    [
        ({}, {"CPU": 2.0}, 6, (2, 0)),
        ({}, {"CPU": 16.0, "GPU": 4.0}, 6, (4, 1)),
        ({"workers_per_trial": 3}, {"CPU": 16.0, "GPU": 8.0}, 6, (2, 1)),
        ({"concurrent": 1}, {"CPU": 2.0}, 6, (1, 0)),
        ({}, {"CPU": 8.0}, 3, (3, 0)),
    ],
)
def test_as_many_trials_at_once_as_the_cluster_carries(
    search: dict[str, int], resources: dict[str, float], trials: int, expected: tuple[int, int]
) -> None:
    capacity = plan(build_config({"search": search}).search, [resources], trials)
    assert (capacity.concurrent, capacity.gpus) == expected


@pytest.mark.parametrize(
    ("search", "resources", "said"),
    [
        ({"workers_per_trial": 3}, {"CPU": 2.0}, "search.workers_per_trial = 3: exceeds the 2 CPUs"),
        ({"workers_per_trial": 2}, {"CPU": 64.0, "GPU": 1.0}, "search.workers_per_trial = 2: exceeds the 1 GPUs"),
        (
            {"workers_per_trial": 2, "concurrent": 5}, {"CPU": 8.0},
            "search.concurrent = 5: times search.workers_per_trial = 2 needs 10 CPUs, the cluster has 8. "
            "Set at most 4",
        ),
    ],
)  # fmt: skip
def test_what_would_wait_for_ever_is_refused(search: dict[str, int], resources: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(build_config({"search": search}).search, [resources], 6)
    assert said in str(caught.value)


@pytest.mark.parametrize(("search", "resources", "trials", "expected"), [
    ({}, {"CPU": 2.0}, 8, (4, ("pack_0",), 2, 0)),
    ({}, {"CPU": 16.0, "GPU": 2.0}, 30, (16, ("pack_0", "pack_1"), 8, 1)),
    ({"pack": 3}, {"CPU": 4.0}, 8, (3, ("pack_0",), 4, 0)),
    ({"concurrent": 1}, {"CPU": 16.0, "GPU": 2.0}, 8, (1, ("pack_0",), 8, 1)),
    ({}, {"CPU": 1.0}, 2, (2, ("pack_0",), 1, 0)),
])
def test_as_many_packed_trials_at_once_as_the_packs_take(
    search: dict[str, int], resources: dict[str, float], trials: int, expected: tuple[Any, ...]
) -> None:
    found = plan(build_config({"search": search}).search, [resources], trials, packed=True)
    assert (found.concurrent, found.packs, found.threads, found.gpus) == expected
    reserved = found.worker_cpus * len(found.packs) + found.trial_resources()["cpu"] * found.concurrent
    assert reserved <= resources["CPU"] and "gpu" not in found.trial_resources()
    with pytest.raises(ConfigError, match=r"search\.concurrent = 99: exceeds the \d+ runs of the packs"):
        plan(build_config({"search": {**search, "concurrent": 99}}).search, [resources], trials, packed=True)


@pytest.mark.parametrize(("search", "said"), [
    ({"workers_per_trial": 2}, "a trial of 2 processes is no part of a pack"), ({}, "for want of a reason"),
])
def test_what_cannot_be_packed_says_why(
    monkeypatch: pytest.MonkeyPatch, search: dict[str, Any], said: str
) -> None:
    """Every extreme of both arms is asked about."""
    asked: list[tuple[str, int, int]] = []

    def refusal(shared: RunConfig, config: RunConfig) -> str | None:
        asked.append((str(config.adapter.method), config.adapter.rank, config.train.checkpoint_every_steps))
        return said if config.adapter.method == "none" and config.adapter.rank == 16 else None

    monkeypatch.setattr(pipeline, "pack_refusal", refusal, raising=False)
    config = build_config({"search": {"max_steps": 8, **search}, "train": {"validate_every_steps": 2}})
    assert packing_refusal(config, load_arms(config)) == said
    assert all(steps == 2 for *_, steps in asked), "a packed trial is saved at every validation"
    assert packing_refusal(config, load_arms(config)[:1]) == ("" if not search else said)


def reported(scheduler: Any, name: str, step: int, nll: float, finished: bool = False) -> None:
    trial = SimpleNamespace(trial_id=name, config={"name": name})
    if name not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    row = {"step": step, "nll": nll, "accuracy": None, "finished": finished}
    assert scheduler.on_trial_result(None, trial, row) == "CONTINUE"


def asha(trials: int, keep: int) -> tuple[Any, list[str]]:
    from tune.scheduling import EnsembleASHA

    asked: list[str] = []
    return EnsembleASHA((10, 40), trials, keep, asked.append), asked


def test_a_trial_below_the_median_of_its_rung_is_asked_to_stop() -> None:
    scheduler, asked = asha(trials=6, keep=2)
    reported(scheduler, "a", 10, 0.60)
    reported(scheduler, "b", 10, 0.50)
    reported(scheduler, "c", 10, 0.56)  # median of 0.60 and 0.50 is 0.55
    reported(scheduler, "d", 10, 0.54)
    assert asked == ["c"]
    reported(scheduler, "a", 20, 0.40)
    reported(scheduler, "d", 20, 0.45)
    assert asked == ["c", "d"]
    reported(scheduler, "d", 30, 0.9)
    assert asked == ["c", "d"], "asked once"


def test_enough_trials_are_left_for_the_ensemble() -> None:
    scheduler, asked = asha(trials=5, keep=3)
    for index, name in enumerate("abcde"):
        reported(scheduler, name, 10, 0.5 + index / 10)
    assert asked == ["b", "c"]


def test_the_final_result_stops_nothing() -> None:
    scheduler, asked = asha(trials=5, keep=1)
    reported(scheduler, "a", 40, 0.5, finished=True)
    reported(scheduler, "b", 40, 0.9, finished=True)
    assert asked == []


def test_a_restarted_search_remembers_the_rungs(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for index, (name, nll, state) in enumerate((("a", 0.4, "done"), ("b", 0.5, "stopped"))):
        ledger.append("start", trial=name, index=index, values={"x": index}, config_sha256=name)
        ledger.append("report", trial=name, step=10, nll=nll, accuracy=None)
        ledger.append("end", trial=name, state=state)
    scheduler, asked = asha(trials=4, keep=2)
    scheduler.replay(ledger, "method")
    reported(scheduler, "c", 10, 0.48)  # median of 0.4 and 0.5 is 0.45
    reported(scheduler, "d", 10, 0.49)
    assert asked == ["c"], "one of the four was stopped before, so one more may be"


def test_an_arm_is_stopped_by_its_own_trials_alone(tmp_path: Path) -> None:
    """Plain LoRA's trials are all worse than the method's, and the best of them is not stopped for it."""
    from tune.scheduling import ArmScheduler, EarlyExit

    arms = {name: asha(trials=4, keep=1) for name in ("method", "plain")}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    early_exit = EarlyExit(EarlyExitConfig(), ledger, tmp_path, lambda name: None)
    both = ArmScheduler({name: scheduler for name, (scheduler, _) in arms.items()}, ledger, early_exit)
    for name, nll in (("method-a", 0.3), ("plain-a", 0.8), ("method-b", 0.4), ("plain-b", 0.7), ("plain-c", 0.9)):
        ledger.append("start", trial=name, arm=name.split("-")[0], index=0, values={}, config_sha256="h")
        trial = SimpleNamespace(trial_id=name, config={"name": name})
        both.on_trial_add(None, trial)
        row = {"step": 10, "nll": nll, "accuracy": None, "finished": False}
        assert both.on_trial_result(None, trial, row) == "CONTINUE"
    assert [asked for _, asked in arms.values()] == [["method-b"], ["plain-c"]]


def metrics(losses: list[float], nlls: dict[int, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step, loss in enumerate(losses, 1):
        rows.append({"kind": "train", "step": step, "loss": loss})
        rows += [{"kind": "validation", "step": step, "nll": nlls[step]}] if step in nlls else []
    return rows


@pytest.mark.parametrize(("nlls", "expected"), [
    ({2: 0.5, 4: 0.7, 6: 0.7}, True),  # above 1.2 x 0.5 twice
    ({2: 0.5, 4: 0.7, 6: 0.55}, False),  # the last is not
    ({2: 0.5, 4: 0.7}, False),  # once
    ({2: 0.9, 4: 0.8, 6: 0.7}, False),  # a late bloomer: each is a new best
    ({2: 0.5, 3: 0.55, 4: 0.7, 6: 0.7}, True),
])
def test_a_trial_overfits_that_stays_above_its_training_loss_and_gets_no_better(
    nlls: dict[int, float], expected: bool
) -> None:
    from tune.scheduling import overfits

    rule = EarlyExitConfig(factor=1.2, validations=2, smoothing=0.9)
    assert overfits(metrics([0.5] * 6, nlls), rule) is expected
    assert not overfits(metrics([0.5] * 6, nlls), EarlyExitConfig(factor=1.5, validations=2))


def test_the_training_loss_is_smoothed() -> None:
    """Two losses, 1 and 0.2, at weight 0.5: (0.5 x 1 + 0.2) / 1.5 = 0.467, not 0.2 and not 0.6."""
    from tune.scheduling import overfits

    for nll, expected in ((1.1 * 0.467 + 0.01, True), (1.1 * 0.467 - 0.01, False)):
        rows = [{"kind": "validation", "step": 0, "nll": 0.1}, *metrics([1.0, 0.2], {2: nll})]
        assert overfits(rows, EarlyExitConfig(factor=1.1, validations=1, smoothing=0.5)) is expected


def test_a_trial_that_overfits_is_asked_once_and_the_ledger_knows(tmp_path: Path) -> None:
    from tune.scheduling import EarlyExit

    ledger, asked = Ledger(tmp_path / "ledger.jsonl"), list[str]()
    ledger.append("start", trial="a", index=0, values={}, config_sha256="h")
    path = RunPaths(tmp_path / "trials" / "a").metrics
    write_text(path, "".join(json.dumps(row) + "\n" for row in metrics([0.5] * 4, {1: 0.4, 2: 0.9, 4: 0.9})))
    for factor, expected in ((None, []), (5.0, []), (1.2, ["a"]), (1.2, ["a"])):
        EarlyExit(EarlyExitConfig(factor=factor, validations=2), ledger, tmp_path, asked.append).look_at("a")
        assert asked == expected
    assert Ledger(ledger.path).trials["a"].overfits


@pytest.mark.parametrize(("overfitting", "published", "state"), [
    (True, True, "done"), (True, False, "stopped"), (False, True, "stopped"),
])
def test_a_trial_that_was_stopped_because_it_overfits_delivers_its_best_adapter(
    tmp_path: Path, overfitting: bool, published: bool, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tune.study import StudyCallback

    monkeypatch.setattr(progress_module, "tell", lambda line: None)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("start", trial="a", index=0, values={"x": 1}, config_sha256="h")
    ledger.append("report", trial="a", step=4, nll=0.4, accuracy=None)
    if overfitting:
        ledger.append("overfits", trial="a")
    adapter = RunPaths(tmp_path / "trials" / "a").adapter
    if published:
        publish_folder(adapter, lambda folder: write_text(folder / ADAPTER_WEIGHTS, "best"))
    callback = StudyCallback(ledger, SearchProgress(ledger, 1, 8, 1), tmp_path, Stopping())
    callback.on_trial_complete(0, [], SimpleNamespace(config={"name": "a"}))
    record = Ledger(ledger.path).trials["a"]
    assert (record.state, record.nll) == (state, 0.4)
    assert record.adapter_sha256 == (sha256_file(adapter / ADAPTER_WEIGHTS) if state == "done" else None)


def test_the_arms_take_turns(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    arms = [Arm(name, RunConfig(), Space("s", {}), trials) for name, trials in (("method", 4), ("plain", 3))]
    names = [arm.trial_name(index) for arm, index in pending(ledger, arms)]
    assert names == ["trial_000", "plain_000", "trial_001", "plain_001", "trial_002", "plain_002", "trial_003"]
    for arm, index in ((arms[0], 0), (arms[1], 1)):
        name = arm.trial_name(index)
        ledger.append("start", trial=name, arm=arm.name, index=index, values={"x": 1}, config_sha256="h")
        ledger.append("report", trial=name, step=2, nll=0.5, accuracy=None)
        ledger.append("end", trial=name, state="done")
    left = [arm.trial_name(index) for arm, index in pending(Ledger(ledger.path), arms)]
    assert left == ["trial_001", "plain_000", "trial_002", "plain_002", "trial_003"]
    assert len(ledger.observations("plain")) == 1


def train_and_collect(
    tmp_path: Path, rows: list[tuple[int, float]], changed: bool = False, **train: Any
) -> list[dict[str, Any]]:
    """What a trial reports whose training meets the validations `rows` of (step, nll)."""
    config = build_config({"train": {"max_steps": 4, **train}})
    given = Assignment("trial_000", str(tmp_path), str(tmp_path), dump_config(config), config.sha256(), 1, 0)

    def train_run(config: RunConfig, run: Path, on_validation: Any) -> dict[str, Any]:
        written = config.model_copy(update={"label": "another"}) if changed else config
        write_text(RunPaths(run).config, dump_config(written))
        best = float("inf")
        for step, nll in rows:
            published = float(nll < best or not config.train.keep_best)
            best = min(best, nll)
            on_validation({"step": float(step), "nll": nll, "accuracy": nll / 2, "published": published})
        return {"steps": 4, "validation_nll": 0.1, "validation_accuracy": 0.9, "adapter_sha256": "w"}

    reports: list[dict[str, Any]] = []
    _train(given, train_run, reports.append)
    return reports


FINAL = {"step": 4, "nll": 0.1, "accuracy": 0.9, "adapter_sha256": "w", "finished": True}


def test_a_trial_reports_what_it_would_deliver(tmp_path: Path) -> None:
    rows = [(1, 0.6), (2, 0.4), (3, 0.5), (4, 0.1)]
    reports = train_and_collect(tmp_path, rows)
    assert [(r["step"], r["nll"], r["accuracy"]) for r in reports[:-1]] == [(1, 0.6, 0.3), (2, 0.4, 0.2), (3, 0.4, 0.2)]
    assert reports[-1] == FINAL, "the last validation comes with the result, after the adapter is written"
    reports = train_and_collect(tmp_path, rows, keep_best=False)
    assert [r["nll"] for r in reports[:-1]] == [0.6, 0.4, 0.5]


def test_a_trial_that_trains_something_else_fails(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="another configuration than the chosen one was trained"):
        train_and_collect(tmp_path, [], changed=True)


def test_a_trial_that_diverges_fails(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="nan at step 2"):
        train_and_collect(tmp_path, [(1, 0.6), (2, float("nan"))])


def choose(config: RunConfig, folder: Path, finished: list[TrialRecord], by: str = "nll") -> dict[str, Any]:
    """The ensemble of a search."""
    splits, _ = validation_losses(config.data, folder, finished, by)
    names = [record.name for record in finished]
    return choose_ensemble(splits, names, config.ensemble.average, config.search.adapters, by)


def finished_trials(folder: Path, tables: list[np.ndarray], row_ids: tuple[str, ...]) -> list[TrialRecord]:
    records = []
    for index, table in enumerate(tables):
        name = f"trial_{index:03d}"
        write_predictions(
            RunPaths(folder / "trials" / name).predictions, "validation", ChoicePredictions(row_ids, table[None])
        )
        records.append(TrialRecord(name, index, {}, name, "done"))
    return records


@pytest.fixture
def validation(tmp_path: Path) -> tuple[RunConfig, tuple[str, ...], np.ndarray]:
    write_data(tmp_path / "rows.jsonl")
    data = {"path": str(tmp_path / "rows.jsonl"), "validation_rows": 16, "calibration_rows": 8, "test_rows": 8}
    config = build_config({"data": data, "search": {"adapters": 3}})
    rows = load_splits(config.data).validation
    return config, tuple(row.id for row in rows), np.array([row.label for row in rows])


def random_tables(count: int, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    source = np.random.default_rng(seed)
    margin = np.where(labels == 1, 1.0, -1.0) + 2.0 * source.normal(size=(count, len(labels)))
    return [np.stack([-np.logaddexp(0, m), -np.logaddexp(0, -m)], axis=1).astype(np.float32) for m in margin]


def mixture_nll(tables: list[np.ndarray], labels: np.ndarray) -> float:
    return float(-np.log(np.mean([np.exp(t)[np.arange(len(labels)), labels] for t in tables], axis=0)).mean())


def test_the_ensemble_is_the_greedy_choice_from_cached_predictions(tmp_path: Path, validation: Any) -> None:
    config, row_ids, labels = validation
    for seed in range(5):
        tables = random_tables(4, labels, seed)
        chosen = choose(config, tmp_path, finished_trials(tmp_path, tables, row_ids))
        indices = [int(name[-3:]) for name in chosen["adapters"]]
        singles = [mixture_nll([table], labels) for table in tables]
        assert indices[0] == int(np.argmin(singles))
        for size in range(1, len(indices)):
            partner = min(set(range(4)) - set(indices[:size]),
                          key=lambda k, s=size: mixture_nll([tables[i] for i in [*indices[:s], k]], labels))
            assert indices[size] == partner
        assert chosen["size"] == len(indices) <= 3
        mixture = mixture_nll([tables[i] for i in indices], labels)
        assert chosen["by_size"][str(len(indices))] == chosen["validation_loss"] == pytest.approx(mixture, abs=1e-6)
        assert list(chosen["by_size"]) == ["1", "2", "3"] and chosen["selected_by"] == "nll"


def test_an_ensemble_must_be_better_than_one_adapter_by_a_standard_error(tmp_path: Path, validation: Any) -> None:
    """A second adapter that is nearly the first one lowers the loss a little and is not worth its pass."""
    config, row_ids, labels = validation
    first = random_tables(1, labels, 3)[0]
    margin = first[:, 1] - first[:, 0]
    tables = [np.stack([-np.logaddexp(0, m), -np.logaddexp(0, -m)], axis=1).astype(np.float32)
              for m in (margin, 0.99 * margin, margin + np.where(labels == 1, 4.0, -4.0))]
    assert choose(config, tmp_path, finished_trials(tmp_path, tables[:2], row_ids))["size"] == 1
    assert choose(config, tmp_path, finished_trials(tmp_path, tables, row_ids))["adapters"] == ["trial_002"]


def test_what_chooses_trials_is_what_select_by_says(tmp_path: Path, validation: Any) -> None:
    """The sharp trial has the higher accuracy and, as it is, the higher NLL."""
    config, row_ids, labels = validation
    sign = np.where(labels == 1, 1.0, -1.0)
    sharp = 5.0 * sign
    sharp[:2] *= -1.0  # a mistake in each half of the rows
    flat = 0.7 * sign
    flat[:4] *= -1.0
    tables = [np.stack([-np.logaddexp(0, m), -np.logaddexp(0, -m)], axis=1).astype(np.float32) for m in (sharp, flat)]
    records = finished_trials(tmp_path, tables, row_ids)
    best = {by: int(np.argmin(validation_losses(config.data, tmp_path, records, by)[1]))
            for by in ("nll", "nll_scaled", "accuracy")}
    assert best == {"nll": 1, "nll_scaled": 0, "accuracy": 0}
    with pytest.raises(ConfigError, match=r"select\.by"):
        validation_losses(config.data, tmp_path, records, "pearson")


def answered_rows(folder: Path, answers: list[dict[str, Any]]) -> tuple[RunConfig, list[Row]]:
    """A search over rows with these answers, two of which validate it."""
    lines = [json.dumps({"prompt": f"row {i}", **answer}) + "\n" for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    data = {"path": str(folder / "rows.jsonl"), "validation_rows": 2, "calibration_rows": 2, "test_rows": 2}
    config = build_config({"data": data, "search": {"adapters": 3}})
    return config, load_splits(config.data).validation


def test_an_ensemble_of_completions_averages_token_probabilities(tmp_path: Path) -> None:
    config, rows = answered_rows(tmp_path, [{"completion": f" {i}"} for i in range(8)])
    row_ids = tuple(row.id for row in rows)
    tokens = np.log(np.array([[0.5, 0.1, 0.4], [0.1, 0.5, 0.5], [0.01, 0.01, 0.01]], dtype=np.float32))
    records = []
    for index in range(3):
        predictions = CompletionPredictions(row_ids, tokens[index : index + 1], np.array([0, 2, 3]))
        write_predictions(RunPaths(tmp_path / "trials" / f"t{index}").predictions, "validation", predictions)
        records.append(TrialRecord(f"t{index}", index, {}, "h", "done"))
    chosen = choose(config, tmp_path, records)
    assert set(chosen["adapters"]) <= {"t0", "t1"}
    assert chosen["by_size"]["2"] == pytest.approx(-np.log([0.3, 0.3, 0.45]).mean(), abs=1e-6)


def test_an_ensemble_of_numbers_averages_them(tmp_path: Path) -> None:
    """Two trials whose errors cancel beat the better of them; the third is left out."""
    config, rows = answered_rows(tmp_path, [{"score": float(i)} for i in range(8)])
    row_ids, scores = tuple(row.id for row in rows), np.array([row.score for row in rows])
    records = []
    for index, error in enumerate(([1.0, -1.0], [-0.5, 0.75], [9.0, 9.0])):
        values = (scores + error).astype(np.float32)[None]
        place = RunPaths(tmp_path / "trials" / f"t{index}").predictions
        write_predictions(place, "validation", RegressionPredictions(row_ids, values))
        records.append(TrialRecord(f"t{index}", index, {}, "h", "done"))
    chosen = choose(config, tmp_path, records)
    assert chosen["adapters"] == ["t1", "t0"]
    mean_square = (0.25**2 + 0.125**2) / 2
    assert chosen["by_size"]["2"] == chosen["validation_loss"] == pytest.approx(mean_square)


def test_predictions_of_other_rows_are_refused(tmp_path: Path, validation: Any) -> None:
    config, row_ids, labels = validation
    records = finished_trials(tmp_path, random_tables(2, labels, 0), row_ids)
    table = random_tables(1, labels, 1)[0]
    write_predictions(
        RunPaths(tmp_path / "trials" / "trial_001").predictions, "validation",
        ChoicePredictions(row_ids[::-1], table[None]),
    )  # fmt: skip
    with pytest.raises(RunFolderError, match="trial_001"):
        choose(config, tmp_path, records)
    records = finished_trials(tmp_path, random_tables(2, labels[:-1], 0), row_ids[:-1])
    with pytest.raises(RunFolderError, match="trial_000: predictions: has 0 rows that the data lack, and lacks 1 rows"):
        choose(config, tmp_path, records)


def test_the_time_left_is_that_of_the_steps_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four trials at step 10 of 40 after 50 s, two at once: 140 of 160 steps at 0.4 steps/s are 350 s."""
    lines: list[str] = []
    monkeypatch.setattr(progress_module, "tell", lines.append)
    clock = itertools.chain([100.0], itertools.repeat(150.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    shown = SearchProgress(ledger, trials=4, steps=40, concurrent=2)
    for index, name in enumerate("ab"):
        ledger.append("start", trial=name, index=index, values={"adapter.rate": 0.25}, config_sha256="h")
        ledger.append("report", trial=name, step=10, nll=0.5, accuracy=0.75)
    shown.validated(ledger.trials["b"])
    assert lines == [f"  b  step 10/40  NLL 0.5000  accuracy 0.7500  at most about {duration(350)} left"]
    ledger.append("end", trial="a", state="failed", error="it broke")
    shown.ended(ledger.trials["a"])
    assert lines[1].startswith("a failed: it broke  (rate=0.25)  [1/4]")


def test_the_driver_loads_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    write_data(tmp_path / "rows.jsonl")
    code = (
        "import sys, pipeline, tune.__main__, tune.search, tune.study, tune.ensemble\n"
        "config = pipeline.build_config({'data': {'path': sys.argv[1], 'validation_rows': 8, 'calibration_rows': 8,"
        " 'test_rows': 8}})\n"
        "tune.search.load_arms(config); pipeline.load_splits(config.data); pipeline.choose_adapters\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.jsonl")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
