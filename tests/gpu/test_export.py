"""What was trained on the device is exported, and stock PEFT says on the device what we say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures

from pipeline.config import dump_config, load_config
from pipeline.export.parity import TOLERANCE
from pipeline.files import MANIFEST, read_json, write_text
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths
from pipeline.stages import export
from pipeline.stages.train import train_run

pytestmark = pytest.mark.gpu


def test_parity(
    device: torch.device, small: bool, tmp_path: Path, tiny_settings: list[str], figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the dtype that the device takes by itself; the stage raises where a tool says something else."""
    monkeypatch.setattr(export, "leave_world", lambda: None)  # the process group serves the next piece
    own = ["launch.processes=1", "train.max_steps=4", "train.learning_rate=0.03", "export.forms=[adapter]"]
    config = load_config(None, [*tiny_settings, *own])
    paths = RunPaths(tmp_path / "run")
    claim(paths.root, "run")
    write_text(paths.config, dump_config(config))
    train_run(config, paths.root)
    export.export_run(paths.root)
    manifest = read_json(paths.export / MANIFEST)
    assert manifest["exports"]
    for entry in manifest["exports"]:
        figures.within(f"{entry['folder']}: off by, share of its effect", entry["ratio"], TOLERANCE)
        effect, noise = entry["max_effect"], entry["base_noise"]
        figures.add("its effect, and what the bare base differs by", f"{effect:.1e}, {noise:.1e}")
    figures.add("compared in", manifest["compared_in"])
