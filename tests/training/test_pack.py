"""Runs in a pack are the runs alone: losses, masks, files; whoever joins, leaves or fails beside them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.packs import alone, assert_equal_runs, rows, run_all
from helpers.runs import losses
from safetensors.torch import load_file

from pipeline import Pack, RunConfig, dump_config, load_config, pack_refusal
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, Stopped
from pipeline.files import read_json, write_json, write_text
from pipeline.plan.pack import runs_that_fit
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths, read_status
from pipeline.stages.pack import write_plan
from pipeline.stages.train import train_run
from pipeline.support.tiny import write_encoder
from pipeline.training.checkpoint import published_checkpoints
from pipeline.training.guards import NotFinite

STEPS = 9
METHODS: dict[str, list[str]] = {
    "dropout": ["adapter.method=lora_dropout", "adapter.rank=4", "train.seed=1", "adapter.rate=0.5"],
    "hidden": [
        "adapter.method=hiddenkey", "adapter.rank=8", "train.seed=2", "train.learning_rate=0.005",
        "train.max_steps=7", "train.lora_plus_ratio=4", "train.weight_decay=0.1", "train.label_smoothing=0.1",
    ],
    "plain": [
        "adapter.method=none", "adapter.rank=4", "train.seed=3", "train.max_steps=11",
        "train.global_batch=4", "adapter.target_modules=[q_proj, v_proj]", "train.max_gradient_norm=0.05",
    ],
}


@pytest.fixture
def configs(tiny_settings: list[str]) -> dict[str, RunConfig]:
    common = [*tiny_settings, f"train.max_steps={STEPS}", "train.draws=2"]
    return {name: load_config(None, [*common, *own]) for name, own in METHODS.items()}


@pytest.mark.slow
def test_packed_runs_are_the_runs_alone(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    pack = Pack(configs["dropout"])
    for name in ("dropout", "hidden"):
        pack.admit(configs[name], tmp_path / "pack" / name)
    ended = run_all(pack, {5: [lambda: pack.admit(configs["plain"], tmp_path / "pack" / "plain")]})
    for name, config in configs.items():
        expected = alone(config, tmp_path / "alone" / name)
        assert ended[name].state == expected.state == "done"
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "alone" / name)
        assert ended[name].result is not None and expected.result is not None
        assert ended[name].result["best_step"] == expected.result["best_step"]


@pytest.mark.slow
def test_a_pack_of_one_is_a_run_under_deepspeed(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    for name, config in configs.items():
        zero = config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": "zero0"})})
        train_run(zero, tmp_path / "zero" / name)
        alone(config, tmp_path / "pack" / name)
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "zero" / name)


def with_train(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


@pytest.mark.slow
def test_a_failure_and_a_stop_are_a_runs_own(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    """One run breaks, one is asked to stop and continues alone; the others do not notice."""
    broken, folder = with_train(configs["dropout"], learning_rate=1e30, seed=9), tmp_path / "pack"
    pack = Pack(broken)
    for name, config in {"dropout": configs["dropout"], "broken": broken, "hidden": configs["hidden"]}.items():
        pack.admit(config, folder / name)

    def stop_hidden() -> None:
        write_json(RunPaths(folder / "hidden").stop_request, {"by": "the scheduler"})

    ended = run_all(pack, {4: [stop_hidden], 5: [lambda: pack.admit(configs["plain"], folder / "plain")]})
    assert {name: one.state for name, one in ended.items()} == {
        "dropout": "done", "broken": "failed", "hidden": "stopped", "plain": "done",
    }
    for name in ("dropout", "plain"):
        alone(configs[name], tmp_path / "alone" / name)
        assert_equal_runs(folder / name, tmp_path / "alone" / name)

    status = read_json(RunPaths(folder / "broken").status)["train"]
    expected = alone(broken, tmp_path / "alone" / "broken")
    assert isinstance(expected.error, NotFinite) and isinstance(ended["broken"].error, NotFinite)
    message = str(expected.error).replace(str(tmp_path / "alone"), str(folder))
    assert (status["state"], status["detail"]) == ("failed", message) and str(ended["broken"].error) == message
    assert_equal_runs(folder / "broken", tmp_path / "alone" / "broken")
    assert (folder / "broken" / "diagnosis").is_dir()

    assert read_json(RunPaths(folder / "hidden").status)["train"]["detail"] == "at step 5"
    assert not RunPaths(folder / "hidden").stop_request.exists()
    assert alone(configs["hidden"], folder / "hidden").state == "done"
    alone(configs["hidden"], tmp_path / "alone" / "hidden")
    assert losses(folder / "hidden") == pytest.approx(losses(tmp_path / "alone" / "hidden"), rel=1e-5)


@pytest.mark.slow
def test_runs_move_between_packs_and_deepspeed(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    """Stopped all together, one goes on under DeepSpeed, one in another pack beside a run that DeepSpeed began."""
    folder = tmp_path / "moved"
    pack = Pack(configs["plain"])
    for name in ("dropout", "hidden"):
        pack.admit(configs[name], folder / name)

    def stop_all() -> None:
        for name in ("dropout", "hidden"):
            write_json(RunPaths(folder / name).stop_request, {})

    assert {one.state for one in run_all(pack, {3: [stop_all]}).values()} == {"stopped"}
    train_run(configs["dropout"], folder / "dropout")

    def stop_plain(row: dict[str, float]) -> None:
        write_json(RunPaths(folder / "plain").stop_request, {})

    with pytest.raises(Stopped):
        train_run(configs["plain"], folder / "plain", stop_plain)
    other = Pack(configs["plain"])
    for name in ("plain", "hidden"):
        other.admit(configs[name], folder / name)
    assert {one.state for one in run_all(other).values()} == {"done"}
    for name, config in configs.items():
        alone(config, tmp_path / "alone" / name)
        assert_equal_runs(folder / name, tmp_path / "alone" / name)


def test_what_cannot_share_a_pass_is_refused(tiny_settings: list[str]) -> None:
    shared = load_config(None, tiny_settings)
    refused = {
        "adapter.kind": ["adapter.kind=adalora"], "data.streaming": ["data.streaming=true"],
        "model.quantization": ["model.quantization=none"], "data.seed": ["data.seed=4"],
        "data.max_tokens": ["data.max_tokens=32"], "train.deepspeed": ["train.deepspeed=zero3"],
        "train.optimizer": ["train.optimizer=adamw_8bit", "train.deepspeed=zero0"],
    }
    for field, change in refused.items():
        reason = pack_refusal(shared, load_config(None, [*tiny_settings, *change]))
        assert reason is not None and reason.startswith(field), (field, reason)
    for field, change in {
        "model.quantization = int8": "model.quantization=int8", "model.compute_dtype": "model.compute_dtype=float16",
    }.items():
        same = load_config(None, [*tiny_settings, change])
        assert (pack_refusal(same, same) or "").startswith(field)
    fine = ["train.max_steps=3", "adapter.rank=8", "adapter.method=hiddenkey", "data.cache=false"]
    assert pack_refusal(shared, load_config(None, [*tiny_settings, *fine])) is None


@pytest.mark.slow
def test_how_many_runs_fit_follows_from_memory(tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(gigabytes: float, *change: str) -> int:
        monkeypatch.setattr("pipeline.plan.memory.machine_memory", lambda: int(gigabytes * 1e9))
        found = runs_that_fit(load_config(None, [*tiny_settings, *change]))
        assert found is not None
        return found

    assert fit(0.1) == 1 and 1 < fit(1.0) < fit(2.0)
    assert fit(2.0, "adapter.rank=64") < fit(2.0, "train.micro_batch=8") < fit(2.0)
    assert abs((fit(3.0) - fit(2.0)) - (fit(2.0) - fit(1.0))) <= 1, "the base is there once"


@pytest.mark.slow
def test_heads_are_each_runs_own(tmp_path: Path, tiny_settings: list[str]) -> None:
    """A classifier's head is drawn, trained, saved and published with its run; the second takes the slot of a third."""
    write_encoder(tmp_path / "encoder")
    common = [*tiny_settings, f"model.path={tmp_path / 'encoder'}", "train.draws=2"]
    pair = {
        name: load_config(None, [*common, "adapter.method=lora_dropout", f"train.seed={seed}", *own])
        for name, seed, own in (("first", 5, []), ("second", 6, ["adapter.rank=2", "train.weight_decay=0.1"]))
    }
    pack = Pack(pair["first"])
    for name in ("gone", "first"):
        pack.admit(pair["first"], tmp_path / "pack" / name)
    write_json(RunPaths(tmp_path / "pack" / "gone").stop_request, {})
    ended = run_all(pack, {2: [lambda: pack.admit(pair["second"], tmp_path / "pack" / "second")]})
    assert [ended[name].state for name in ("gone", "first", "second")] == ["stopped", "done", "done"]
    assert len(pack.adapters.specs) == 2
    for name, config in pair.items():
        alone(config, tmp_path / "alone" / name)
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "alone" / name)
        states = [load_file(last_checkpoint(tmp_path / where / name)) for where in ("pack", "alone")]
        assert states[0].keys() == states[1].keys() and any(".copies.0." in key for key in states[0])
        for key, value in states[1].items():
            torch.testing.assert_close(states[0][key], value, rtol=1e-3, atol=1e-5)


def last_checkpoint(folder: Path) -> Path:
    return published_checkpoints(RunPaths(folder).checkpoints)[-1] / "state.safetensors"


def start_stage(folder: Path, threads: int = 1) -> subprocess.Popen[bytes]:
    """The hidden stage `pack` as a comparison starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pipeline.stages", "pack", "--run-dir", str(folder)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait_for(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until it exists."""
    for _ in range(3000):
        if path.exists():
            return
        assert process.poll() is None, "ended by itself"
        time.sleep(0.05)
    raise AssertionError(f"{path} does not appear")


def planned_runs(folder: Path, configs: dict[str, RunConfig]) -> dict[str, RunConfig]:
    """Forty steps of each in folders as a comparison leaves them to the stage."""
    length = {"max_steps": 40, "validate_every_steps": 10, "checkpoint_every_steps": 4}
    runs = {name: with_train(config, **length) for name, config in configs.items()}
    folder.mkdir()
    write_text(RunPaths(folder).config, dump_config(configs["plain"]))
    for name, config in runs.items():
        claim(folder / name, "run")
        write_text(RunPaths(folder / name).config, dump_config(config))
    write_plan(folder, [Path(name) for name in runs], at_once=2)
    return runs


@pytest.mark.slow
def test_parts_of_a_pack_train_side_by_side(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    """SIGTERM, kill -9 of one of the two processes, then to the end: every run as if it had been alone."""
    folder = tmp_path / "comparison"
    runs = planned_runs(folder, configs)
    process = start_stage(folder, threads=2)
    wait_for(process, RunPaths(folder / "hidden").checkpoints / "step_000008")
    process.terminate()  # the one that the command knows
    assert process.wait() == EXIT_STOPPED
    left = {name: read_json(RunPaths(folder / name).status)["train"]["state"] for name in runs}
    assert set(left.values()) <= {"stopped", "done"} and left["hidden"] == "stopped"

    process = start_stage(folder, threads=2)
    wait_for(process, RunPaths(folder / "hidden").checkpoints / "step_000020")
    parts = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    workers = [pid for pid in parts if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    assert process.wait() == EXIT_FAILED, "the other process has ended its part"
    done = [name for name, config in runs.items() if is_trained(RunPaths(folder / name), config)]
    assert 0 < len(done) < len(runs)

    assert start_stage(folder, threads=2).wait() == EXIT_OK
    for name, config in runs.items():
        alone(config, tmp_path / "alone" / name)
        assert losses(folder / name) == pytest.approx(losses(tmp_path / "alone" / name), rel=1e-5)
    assert "pack" in read_status(RunPaths(folder))


@pytest.mark.slow
def test_a_killed_pack_continues_from_its_checkpoints(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    """kill -9, then SIGTERM, then to the end: as if nothing had happened, in the folders of runs that were alone."""
    folder = tmp_path / "comparison"
    runs = planned_runs(folder, configs)
    process = start_stage(folder)
    wait_for(process, RunPaths(folder / "hidden").checkpoints / "step_000008")
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    process = start_stage(folder)
    wait_for(process, RunPaths(folder / "hidden").checkpoints / "step_000020")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == EXIT_STOPPED
    states = {name: read_json(RunPaths(folder / name).status)["train"]["state"] for name in ("dropout", "hidden")}
    assert states == {"dropout": "stopped", "hidden": "stopped"}
    assert "train" not in read_status(RunPaths(folder / "plain"))

    assert start_stage(folder).wait() == EXIT_OK
    for name, config in runs.items():
        alone(config, tmp_path / "alone" / name)
        assert losses(folder / name) == pytest.approx(losses(tmp_path / "alone" / name), rel=1e-5)
        ours, theirs = (rows(where / name, "validation") for where in (folder, tmp_path / "alone"))
        assert [row["nll"] for row in ours] == pytest.approx([row["nll"] for row in theirs], rel=1e-5)
    assert start_stage(folder).wait() == EXIT_OK, "nothing is left to do"
