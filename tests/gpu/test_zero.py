"""ZeRO-2 and ZeRO-3 on one device, an NF4 base in bfloat16: trained, stopped, saved, resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures
from helpers.runs import adapter_hash, losses

from pipeline.config import load_config
from pipeline.errors import Stopped
from pipeline.files import manifest_faults, write_json
from pipeline.run_folder.paths import RunPaths
from pipeline.stages.train import train_run
from pipeline.training.checkpoint import published_checkpoints

pytestmark = pytest.mark.gpu


def test_saved_and_resumed(
    device: torch.device, small: bool, tmp_path: Path, run_settings: list[str], figures: Figures
) -> None:
    """A run that was stopped after its first validation ends with the losses of one that was not, under both stages.

    To the bit on a CPU; on a GPU sums may come in another order. Both stages see the same rows and masks.
    """
    whole: dict[str, list[float]] = {}
    for stage in ("zero2", "zero3"):
        config = load_config(None, [*run_settings, f"train.deepspeed={stage}"])
        undisturbed, parted = tmp_path / stage / "whole", tmp_path / stage / "parted"
        train_run(config, undisturbed)

        def ask_to_stop(row: dict[str, float], folder: Path = parted) -> None:
            write_json(RunPaths(folder).stop_request, {"signal": "TEST"})

        with pytest.raises(Stopped):
            train_run(config, parted, ask_to_stop)
        train_run(config, parted)
        whole[stage], again = losses(undisturbed), losses(parted)
        assert len(whole[stage]) == config.train.max_steps == len(again)
        figures.within(f"{stage}: losses after a resume", apart(again, whole[stage]), 0.0 if small else 0.01)
        same = adapter_hash(parted) == adapter_hash(undisturbed)
        figures.add(f"{stage}: adapter after a resume", "same bytes" if same else "other bytes", same=same)
        assert same or not small
        assert not manifest_faults(published_checkpoints(RunPaths(parted).checkpoints)[-1])
    figures.within("losses of zero3, against zero2", apart(whole["zero3"], whole["zero2"]), 0.03)


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
