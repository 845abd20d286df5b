"""Whole searches under real Ray, with a training that takes a second: failures, kills, restarts, several workers."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT
from helpers.listeners import allowed, watch
from helpers.searches import ended, run, start, starts, wait_for, write_config

from pipeline import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, dump_config, load_config, sha256_file
from pipeline.stages.run import chosen_configs

pytestmark = pytest.mark.slow


def read_result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "search" / "search.json").read_text())
    return result


def test_a_search_with_a_failing_and_a_dying_trial(tmp_path: Path) -> None:
    write_config(tmp_path, adapters=4)  # as many as there are trials: none may stop early
    code, output = run(tmp_path, STUB_FAIL="trial_001", STUB_DIE="trial_002", STUB_SECONDS="0.05")
    assert code == EXIT_OK, output
    assert "loaded:\n" in output, "the driver has loaded torch or deepspeed"
    assert "left" in output
    assert "Traceback" not in output
    result = read_result(tmp_path)
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert list(trials) == [f"trial_{index:03d}" for index in range(4)]
    assert trials["trial_001"]["error"] == "data.jsonl row 7: label = 9: is out of range. Use 0 or 1."
    assert "process died" in trials["trial_002"]["error"]
    assert [trials[name]["state"] for name in ("trial_000", "trial_003")] == ["done", "done"]

    search = tmp_path / "search"
    for trial in (trials["trial_000"], trials["trial_003"]):
        config = load_config(search / trial["run"] / "config.yaml")
        assert config.sha256() == trial["config_sha256"]
        assert (config.adapter.rate, config.train.max_steps) == (trial["config"]["adapter.rate"], 8)
        assert trial["steps"] == 8
        assert [report["step"] for report in trial["reports"]] == [2, 4, 6, 8]
    best = min((trials["trial_000"], trials["trial_003"]), key=lambda trial: trial["validation_loss"])
    assert (result["best"], result["best_config"]) == (best["name"], best["config"])
    assert result["ensemble"]["adapters"][0] == best["name"]
    assert result["ensemble"]["validation_loss"] <= best["validation_loss"] + 1e-6
    assert set(result["ensemble"]["by_size"]) == {"1", "2"}
    *edges, untuned = result["warnings"]
    assert all(warning.startswith("Chosen at the edge ") for warning in edges), "of an edge, and no other"
    assert "no tuning of its own (search.plain)" in untuned and result["plain"] is None
    assert not (search / ".ray").exists()

    # The same command runs what failed, and nothing else.
    before = starts(tmp_path)
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    assert sorted(name for name, *_ in starts(tmp_path)[len(before) :]) == ["trial_001", "trial_002"]
    assert all(trial["state"] == "done" for trial in read_result(tmp_path)["trials"])
    # Once more, there is nothing left to do.
    begun, before = time.monotonic(), starts(tmp_path)
    code, output = run(tmp_path)
    assert (code, starts(tmp_path)) == (EXIT_OK, before)
    assert "Search:" not in output
    assert time.monotonic() - begun < 10


def test_a_killed_driver_continues_with_the_same_trials(tmp_path: Path) -> None:
    write_config(tmp_path, concurrent=1)
    process = start(tmp_path, STUB_SECONDS="0.3")
    wait_for(tmp_path, "end", 1)
    wait_for(tmp_path, "report", 6)  # in the middle of a trial
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished, begun = ended(tmp_path), starts(tmp_path)
    scratch = Path((tmp_path / "search" / ".ray" / "scratch").read_text().strip())
    assert scratch.exists()
    assert len(finished) >= 1
    assert len(begun) > len(finished)

    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    again = starts(tmp_path)[len(begun) :]
    assert sorted({name for name, *_ in again} | set(finished)) == [f"trial_{index:03d}" for index in range(4)]
    assert not {name for name, *_ in again} & set(finished), "a finished trial ran again"
    interrupted = {name: rest for name, *rest in begun if name not in finished}
    assert interrupted.items() <= {name: rest for name, *rest in again}.items(), "other settings after the kill"
    assert finished.items() <= ended(tmp_path).items()
    assert not scratch.exists()


def test_plain_lora_is_tuned_beside_the_method_and_a_killed_driver_goes_on_with_both(tmp_path: Path) -> None:
    write_config(tmp_path, trials=3, adapters=3, concurrent=1, plain=True)
    process = start(tmp_path, STUB_SECONDS="0.2")
    wait_for(tmp_path, "end", 2)
    wait_for(tmp_path, "report", 10)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = ended(tmp_path)
    assert {"trial_000", "plain_000"} <= finished.keys(), "the arms do not take turns"
    begun = starts(tmp_path)
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    again = starts(tmp_path)[len(begun) :]
    assert not {name for name, *_ in again} & finished.keys(), "a finished trial ran again"
    result = read_result(tmp_path)
    plain = result["plain"]
    assert [trial["name"] for trial in plain["trials"]] == ["plain_000", "plain_001", "plain_002"]
    assert len(result["trials"]) == len(plain["trials"]), "plain LoRA has fewer settings than the method"
    for trial in plain["trials"]:
        assert trial["state"] == "done" and set(trial["config"]) == {"adapter.rank", "train.learning_rate"}
        assert load_config(tmp_path / "search" / trial["run"] / "config.yaml").adapter.method == "none"
    best = min(plain["trials"], key=lambda trial: trial["validation_loss"])
    assert (plain["best"], plain["best_config"]) == (best["name"], best["config"])
    assert set(result["ensemble"]["adapters"]) <= {trial["name"] for trial in result["trials"]}
    assert "Best of plain LoRA: " in output
    chosen, chosen_plain = chosen_configs(load_config(tmp_path / "config.yaml"), tmp_path / "search")
    assert chosen.adapter.rate == result["best_config"]["adapter.rate"]
    assert chosen_plain.train.learning_rate == plain["best_config"]["train.learning_rate"]
    assert chosen_plain.adapter.method == "none" and chosen_plain.adapter.rank == plain["best_config"]["adapter.rank"]


def test_a_stopped_search_says_so_and_continues(tmp_path: Path) -> None:
    write_config(tmp_path)
    process = start(tmp_path, STUB_SECONDS="0.5")
    wait_for(tmp_path, "report", 1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert "the same command continues" in output
    assert "failed" not in output
    assert not (tmp_path / "search" / "search.json").exists()
    process = start(tmp_path, STUB_SECONDS="0.5")
    wait_for(tmp_path, "report", 3)
    os.kill(process.pid, signal.SIGTERM)  # as the command line does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output

    other = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**other, "adapter": {"alpha": 8.0}}))
    code, output = run(tmp_path)
    assert code == EXIT_USER
    assert "other settings" in output
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(other))
    code, output = run(tmp_path)
    assert code == EXIT_OK, output
    assert len(read_result(tmp_path)["trials"]) == 4


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two workers need two cores")
def test_a_trial_of_two_workers_stops_early(tmp_path: Path) -> None:
    """Trials one after the other, each a TorchTrainer; a stopped one must give its workers' places back."""
    best_first = "adapter.rate: {grid: [0.3, 0.59, 0.6]}"
    write_config(tmp_path, best_first, trials=3, workers_per_trial=2, adapters=1)
    code, output = run(tmp_path, STUB_SECONDS="0.5")
    assert code == EXIT_OK, output
    result = read_result(tmp_path)
    assert [trial["state"] for trial in result["trials"]] == ["done", "stopped", "stopped"], output
    assert all(trial["steps"] < 8 for trial in result["trials"][1:])
    assert "process 1/2" in (tmp_path / "search" / "trials" / "trial_000.rank1.log").read_text()
    assert "process 0/2" in (tmp_path / "search" / "trials" / "trial_002.log").read_text()


def test_all_trials_failing_is_a_failure_with_the_first_error(tmp_path: Path) -> None:
    write_config(tmp_path, trials=2)
    code, output = run(tmp_path, STUB_FAIL="all")
    assert code == EXIT_FAILED
    assert "no trial of the search finished" in output
    assert "data.jsonl row 7" in output
    assert "DataError" in (tmp_path / "search" / "trials" / "trial_000.log").read_text()


def test_more_than_the_cluster_carries_is_the_users_error(tmp_path: Path) -> None:
    write_config(tmp_path, workers_per_trial=4096)
    code, output = run(tmp_path)
    assert code == EXIT_USER
    assert "search.workers_per_trial = 4096: exceeds the" in output
    assert not (tmp_path / "search" / "trials").exists()


def test_real_trials_on_the_tiny_model(tmp_path: Path, tiny_settings: list[str]) -> None:
    """Two trials of the real trainer: different adapters, of the rank and at the rate that were chosen; nothing of it
    can be reached from outside."""
    (tmp_path / "space.yaml").write_text("adapter.rank: {grid: [2, 4]}\nadapter.rate: {uniform: [0.2, 0.5]}\n")
    settings = [*tiny_settings, f"search.space={tmp_path / 'space.yaml'}", "train.validate_every_steps=2"]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, settings)))
    command = ["-m", "tune", "--config", str(tmp_path / "config.yaml"), "--folder", str(tmp_path / "search")]
    watched = watch([sys.executable, *command], 400, cwd=ROOT)
    logs = "\n".join(path.read_text() for path in (tmp_path / "search" / "trials").glob("*.log"))
    assert watched.code == EXIT_OK, watched.output + logs
    assert {"gcs_server", "raylet"} <= {one.process for one in watched.seen}
    assert not {one for one in watched.seen if not allowed(one)}, watched.seen
    result = read_result(tmp_path)
    assert len({trial["adapter_sha256"] for trial in result["trials"]}) == 2
    for trial in result["trials"]:
        run_folder = tmp_path / "search" / trial["run"]
        adapter = json.loads((run_folder / "adapter" / "adapter_config.json").read_text())
        assert adapter["r"] == trial["config"]["adapter.rank"]
        assert trial["adapter_sha256"] == sha256_file(run_folder / "adapter" / "adapter_model.safetensors")
        assert load_config(run_folder / "config.yaml").adapter.rate == trial["config"]["adapter.rate"]
        assert not (run_folder / "checkpoints").exists()
    best = min(result["trials"], key=lambda trial: trial["validation_loss"])
    assert result["best"] == best["name"]
