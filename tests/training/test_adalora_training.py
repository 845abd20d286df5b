"""AdaLoRA through the real trainer: ZeRO stages, process counts, resume, evaluation, report and export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import adapter_hash, launch, losses
from safetensors.torch import load_file

from pipeline.adapters.peft_adalora import shown_rank
from pipeline.adapters.peft_format import read_adapter
from pipeline.config import load_config
from pipeline.files import read_json_lines, write_json
from pipeline.run_folder.paths import RunPaths

pytestmark = pytest.mark.slow
ADALORA = [
    "adapter.kind=adalora", "adapter.rank=3", "adapter.adalora.initial_rank=5", "train.max_steps=8",
    "adapter.adalora.warmup=1", "adapter.adalora.final=2", "train.draws=2", "train.learning_rate=0.02",
]


def triplets(folder: Path) -> list[int]:
    return [row["triplets"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]


def kept(folder: Path) -> dict[str, list[bool]]:
    state = load_file(folder / "checkpoints" / "step_000008" / "state.safetensors")
    names = [name for name in state if name.startswith("budget/kept/")]
    for name in names:  # pruned to zero in the fp32 values, and nothing else is
        layer = name.removeprefix("budget/kept/")
        assert torch.equal(state[name], state[f"{layer}.buckets.0.lora_E"] != 0), layer
    return {name: state[name][0].tolist() for name in names}


def test_zero_stages_and_process_counts_prune_alike(tmp_path: Path, tiny_settings: list[str]) -> None:
    """Accumulation over 2 micro-batches or over 2 processes, ZeRO-0, 1, 2: the same losses, the same triplets."""
    from pipeline.stages.train import train_run

    settings = [*tiny_settings, *ADALORA]
    for stage in ("zero0", "zero1", "zero2"):
        train_run(load_config(None, [*settings, f"train.deepspeed={stage}"]), tmp_path / stage)
    assert launch(tmp_path / "two", [*settings, "launch.processes=2", "train.deepspeed=zero2"]) == 0
    reference = losses(tmp_path / "zero0")
    assert triplets(tmp_path / "zero0") == [70, 56, 48, 43, 42, 42, 42, 42]  # 42 + 28 (1 - (t-1)/5)³, 14 matrices
    for name in ("zero1", "zero2", "two"):
        assert losses(tmp_path / name) == pytest.approx(reference, rel=2e-4), name
        assert triplets(tmp_path / name) == triplets(tmp_path / "zero0"), name
        assert kept(tmp_path / name) == kept(tmp_path / "zero0"), name
    assert reference[-1] < reference[0] and len(kept(tmp_path / "zero0")) == 14


def test_stop_and_resume_end_in_the_same_bytes(tmp_path: Path, tiny_settings: list[str]) -> None:
    """Stopped while ranks are being pruned."""
    from pipeline.stages.train import train_run
    from pipeline.training.run import Stopped

    config = load_config(None, [*tiny_settings, *ADALORA, "train.max_gradient_norm=0.3"])
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    result = train_run(config, whole)

    def ask_to_stop(row: dict[str, float]) -> None:
        write_json(RunPaths(parted).stop_request, {"signal": "TEST"})

    with pytest.raises(Stopped):
        train_run(config, parted, ask_to_stop)
    assert len(losses(parted)) == 3
    assert train_run(config, parted) == result
    assert losses(parted) == losses(whole) and triplets(parted) == triplets(whole)
    assert adapter_hash(parted) == adapter_hash(whole)
    newest = [load_file(run / "checkpoints" / "step_000008" / "state.safetensors") for run in (whole, parted)]
    assert newest[0].keys() == newest[1].keys()
    assert all(torch.equal(newest[0][name], newest[1][name]) for name in newest[0])
    assert result["best_step"] in (6, 8), "only an adapter within its budget is published"
    stored = read_adapter(whole / "adapter")
    assert shown_rank(stored.spec) == "3/3"


def test_evaluate_report_and_export_take_an_adalora_run(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.evaluate import evaluate_run
    from pipeline.stages.export import export_run
    from pipeline.stages.report import write_report
    from pipeline.stages.train import train_run

    for stage in ("evaluate", "export"):  # the process group serves the next test, too
        monkeypatch.setattr(f"pipeline.stages.{stage}.leave_world", lambda: None)
    run = tmp_path / "run"
    train_run(load_config(None, [*tiny_settings, *ADALORA, "ensemble.size=2", "export.draws=2"]), run)
    evaluate_run(run)
    write_report(run)
    export_run(run)
    members = json.loads((run / "predictions" / "members.json").read_text())
    assert [m["rank"] for m in members if m["group"] == "mean_field"] == ["3/3"]
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    adapter = manifest["adapter"]
    assert (adapter["kind"], adapter["rank"], adapter["exported_rank"]) == ("adalora", "3/3", 8)
    assert len(manifest["exports"]) == 3 and all(entry["ratio"] < 1e-3 for entry in manifest["exports"])
    exported = json.loads((run / "export" / "adapter" / "adapter_config.json").read_text())
    assert (exported["peft_type"], exported["r"], exported["lora_alpha"]) == ("LORA", 8, 8.0)
