"""Real training on a tiny NF4 model: DeepSpeed engine, checkpoints, resume, several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import adapter_hash, first_moments, gradient_norms, launch, losses
from safetensors.torch import load_file

from pipeline.config import load_config
from pipeline.config.deepspeed import fill_ds_config
from pipeline.errors import EXIT_STOPPED, ConfigError
from pipeline.files import manifest_faults, read_json, write_json
from pipeline.run_folder.paths import RunPaths
from pipeline.training.checkpoint import published_checkpoints


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"train_batch_size": 3}, "contradicts"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.schedule"),
        ({"optimizer": {"type": "Adam"}}, "train.learning_rate"),
        ({"bf16": {"enabled": True}}, "fp32 adapters"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "not decided"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(change: dict[str, object], part: str) -> None:
    source = {"train_batch_size": "auto", "zero_optimization": {"stage": 2}, **change}
    with pytest.raises(ConfigError, match=part):
        fill_ds_config(source, {"train_batch_size": 16}, "x.json")


def test_auto_is_filled() -> None:
    filled = fill_ds_config({"train_batch_size": "auto", "gradient_clipping": 1.0}, {"train_batch_size": 16}, "x.json")
    assert filled == {"train_batch_size": 16, "gradient_clipping": 1.0}


@pytest.mark.slow
def test_two_processes_train_what_one_process_trains(tmp_path: Path, tiny_settings: list[str]) -> None:
    runs = {
        "two": ["launch.processes=2"],
        "one": ["launch.processes=1"],  # accumulation 2
        "large micro batch": ["launch.processes=1", "train.micro_batch=8"],
        "zero0": ["launch.processes=2", "train.deepspeed=zero0"],
        "zero3": ["launch.processes=2", "train.deepspeed=zero3"],
        "checkpointing": ["launch.processes=1", "train.activation_checkpointing=true"],
    }
    for name, extra in runs.items():
        assert launch(tmp_path / name, [*tiny_settings, "train.max_gradient_norm=1e6", *extra]) == 0, name
    reference = losses(tmp_path / "two")
    assert len(reference) == 6 and reference[-1] < reference[0]
    for name in runs:
        assert losses(tmp_path / name) == pytest.approx(reference, rel=2e-4), name
        assert gradient_norms(tmp_path / name) == pytest.approx(gradient_norms(tmp_path / "two"), rel=1e-3), name
        expected, found = first_moments(tmp_path / "two"), first_moments(tmp_path / name)
        assert float((found - expected).norm() / expected.norm()) < 1e-3, name
    assert losses(tmp_path / "checkpointing") == losses(tmp_path / "one")
    assert adapter_hash(tmp_path / "checkpointing") == adapter_hash(tmp_path / "one")
    log = (tmp_path / "two" / "logs" / "train.log").read_text()
    assert "processes    2 (DeepSpeed ZeRO-2, 1 threads each)" in log
    assert "14 NF4 modules" in log and "trainable parameters (fp32)" in log and "supervised" in log
    paths = RunPaths(tmp_path / "two")
    kept = {"step_000004", "step_000006", f"step_{read_json(paths.checkpoints / 'best.json')['step']:06d}"}
    assert {p.name for p in paths.checkpoints.iterdir()} == {*kept, "latest.json", "best.json"}
    assert not manifest_faults(paths.checkpoints / "step_000006") and not manifest_faults(paths.adapter)
    assert json.loads(paths.status.read_text())["train"]["state"] == "done"
    assert paths.environment.exists() and (paths.predictions / "validation.npz").exists()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["zero0", "zero2", "zero0 train.optimizer=adamw_8bit adapter.rank=64"])
def test_stop_and_resume_ends_in_the_same_bytes(tmp_path: Path, tiny_settings: list[str], setting: str) -> None:
    from pipeline.errors import Stopped
    from pipeline.stages.train import train_run

    config = load_config(None, [*tiny_settings, *f"train.deepspeed={setting}".split()])
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    result = train_run(config, whole)

    def ask_to_stop(row: dict[str, float]) -> None:
        write_json(RunPaths(parted).stop_request, {"signal": "TEST"})

    with pytest.raises(Stopped) as caught:
        train_run(config, parted, ask_to_stop)
    assert caught.value.exit_code == EXIT_STOPPED
    assert json.loads(RunPaths(parted).status.read_text())["train"]["state"] == "stopped"
    again = train_run(config, parted)
    assert losses(parted) == losses(whole)
    assert again == result and adapter_hash(parted) == adapter_hash(whole)
    state = load_file(parted / "checkpoints" / "step_000006" / "state.safetensors")
    codes = {name for name, value in state.items() if value.dtype == torch.uint8}
    assert bool(codes) == any(name.startswith("absmax") for name in state) == ("8bit" in setting)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from pipeline.stages.train import train_run

    config = load_config(None, tiny_settings)
    train_run(config, tmp_path / "run")
    expected = adapter_hash(tmp_path / "run")
    newest = published_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[-3] ^= 1
    (newest / "state.safetensors").write_bytes(bytes(content))
    train_run(config, tmp_path / "run")
    shown = capsys.readouterr().err
    assert "step_000006 is damaged" in shown and "continuing from step_000004" in shown
    assert adapter_hash(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_user_error_inside_the_ranks_keeps_its_exit_code(tmp_path: Path, tiny_settings: list[str]) -> None:
    assert launch(tmp_path / "run", [*tiny_settings, "adapter.target_modules=[no_such_layer]"]) == 2
    assert "no_such_layer" in (tmp_path / "run" / "logs" / "train.log").read_text()
