"""The whole line on a tiny random model: every stage is the real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.files import manifest_faults, sha256_file


@pytest.mark.slow
def test_the_whole_line(tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tiny"
    command = ["run", "--run-dir", str(run), *tiny_settings]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for part in ("Base model", "Plain LoRA", "report.html", "adapter", "export"):
        assert part in shown
    for name in (
        "config.yaml",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "related.json",
        "result.json",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints",
        "predictions/validation.npz",
        "predictions/calibration.npz",
        "predictions/test.npz",
        "export/manifest.json",
        "export/adapter/adapter_config.json",
    ):
        assert (run / name).exists(), name

    status = json.loads((run / "status.json").read_text())
    assert {stage: entry["state"] for stage, entry in status.items()} == dict.fromkeys(
        ("train", "evaluate", "report", "export"), "done"
    )
    search = json.loads((tmp_path / "tiny-search" / "search.json").read_text())
    assert len(search["trials"]) == 2 and search["best"] in {trial["name"] for trial in search["trials"]}
    members = json.loads((run / "predictions" / "members.json").read_text())
    groups = [member["group"] for member in members]
    assert groups.count("mask_draw") == 4 and groups.count("searched") == 2 and groups.count("plain") == 1
    with np.load(run / "predictions" / "test.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"row_ids", "kind", "log_probs", "seconds", "made_from"}
        assert arrays["log_probs"].shape == (len(members), 60, 2)
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert all(export["ratio"] <= 0.05 for export in manifest["exports"]) and len(manifest["exports"]) >= 3
    assert not manifest_faults(run / "export")
    page = (run / "report.html").read_text()
    assert "<svg" in page and "http-equiv" in page and "<script" not in page

    adapter = sha256_file(run / "adapter" / "adapter_model.safetensors")
    assert main(command) == 0  # the same command again: nothing is trained twice
    assert sha256_file(run / "adapter" / "adapter_model.safetensors") == adapter
    assert main([*command, "train.seed=9"]) == 2
    assert "another configuration" in capsys.readouterr().err
