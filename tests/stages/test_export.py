"""The export stage on a run in bfloat16: what is compared is what was exported, not how it is rounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig, load_config
from pipeline.files import read_json
from pipeline.run_folder.paths import RunPaths
from pipeline.stages.export import export_run, precisions
from pipeline.stages.train import train_run
from pipeline.support.tiny import WORDS

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_the_comparison_is_made_in_float32_on_cpus_alone() -> None:
    half = ModelConfig(compute_dtype="bfloat16")
    assert precisions(half, CPU) == (torch.bfloat16, torch.float32)
    assert precisions(half, GPU) == (torch.bfloat16, torch.bfloat16)
    assert precisions(ModelConfig(), CPU) == (torch.float32, torch.float32)


@pytest.mark.slow
def test_a_run_in_bfloat16_is_exported_as_what_it_is(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.export.leave_world", lambda: None)  # the process group serves the next test
    words = ["model.compute_dtype=bfloat16", "data.train_rows=16", "data.validation_rows=8", "train.max_steps=2"]
    config = load_config(None, [*tiny_settings, *words, "train.micro_batch=8", "export.draws=1",
                                "export.forms=[adapter,draws,merged_dequantized]"])
    train_run(config, tmp_path)
    export_run(tmp_path)
    manifest = read_json(RunPaths(tmp_path).export / "manifest.json")
    assert manifest["base"]["compute_dtype"] == "bfloat16" and manifest["compared_in"] == "float32"
    *adapters, merged = manifest["exports"]
    assert len(adapters) == 2 and all(export["ratio"] < 1e-3 for export in adapters)
    assert 1e-4 < merged["ratio"] <= 0.05  # sums are rounded to bfloat16, and still what was evaluated
    reading = read_json(RunPaths(tmp_path).export / "merged_dequantized" / "reading.json")
    assert (reading["compute_dtype"], reading["example"]["dtype"]) == ("bfloat16", "float32")
    assert reading["temperature"] is None and "None: no report" in (
        RunPaths(tmp_path).export / "adapter" / "README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.slow
def test_free_answers_have_a_script_too(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says the log-probability of each token of the reference, its end included; there is no temperature."""
    monkeypatch.setattr("pipeline.stages.export.leave_world", lambda: None)
    data = tmp_path / "rows.jsonl"
    pairs = [(word, other) for word in WORDS for other in WORDS]
    lines = [{"prompt": f"Review: {one} {two} Sentiment:", "completion": f" {one}"} for one, two in pairs]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines[:120]), encoding="utf-8")
    words = [f"data.path={data}", "data.train_rows=16", "data.validation_rows=8", "data.calibration_rows=8"]
    words += ["data.test_rows=8", "train.max_steps=2", "train.micro_batch=8", "export.forms=[adapter]"]
    run = tmp_path / "run"
    train_run(load_config(None, [*tiny_settings, *words]), run)
    export_run(run)
    reading = read_json(RunPaths(run).export / "adapter" / "reading.json")
    assert (reading["kind"], reading["temperature"], len(reading["example"]["values"])) == ("completion", None, 2)
    form = read_json(RunPaths(run).export / "manifest.json")["forms"]["adapter"]
    assert max(form["use"]["values"]) < 0 and form["use"]["max_difference"] < 1e-4
