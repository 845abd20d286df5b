"""Runs that share their passes are the runs alone, on the device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures
from helpers.packs import alone, assert_equal_runs, run_all
from helpers.runs import losses

from pipeline import Pack, load_config

pytestmark = pytest.mark.gpu
RUNS = {
    "dropout": ["adapter.method=lora_dropout", "adapter.rate=0.5", "train.seed=1"],
    "hidden": ["adapter.method=hiddenkey", "adapter.rank=8", "train.seed=2", "train.learning_rate=0.005"],
}


def test_pack_is_alone(
    device: torch.device, small: bool, tmp_path: Path, run_settings: list[str], figures: Figures
) -> None:
    """In float32: two methods, ranks, seeds and rates; the second run joins when the first has taken two steps."""
    common = [*run_settings, "model.compute_dtype=float32"]
    configs = {name: load_config(None, [*common, *own]) for name, own in RUNS.items()}
    pack = Pack(configs["dropout"])
    pack.admit(configs["dropout"], tmp_path / "pack" / "dropout")
    ended = run_all(pack, {2: [lambda: pack.admit(configs["hidden"], tmp_path / "pack" / "hidden")]})
    tolerance = 1e-5 if small else 1e-3
    for name, config in configs.items():
        assert ended[name].state == alone(config, tmp_path / "alone" / name).state == "done"
        ours, theirs = (losses(tmp_path / where / name) for where in ("pack", "alone"))
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        figures.within(f"{name}: losses in the pack, against alone", worst, tolerance)
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "alone" / name, tolerance)
