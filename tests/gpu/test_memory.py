"""The memory plan of --dry-run beside the peaks of processes that train: reported, never asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.acceptance import Figures

from benchmarks.memory_plan import BASE, ENVIRONMENT, in_children, planned, settings_of

pytestmark = pytest.mark.gpu
WANTED = "0.85 to 1.15"


def test_plan(device: torch.device, small: bool, large_model: Path, figures: Figures) -> None:
    """An 8B-shaped NF4 base with checkpointing, at two sizes of a pass (in the small form the tiny one, at one)."""
    cells = [{**BASE, "batch": 4, "tokens": 512, "rank": 16, "checkpointing": True}]
    cells.append({**cells[0], "batch": 8})
    dtype = "float32" if small else "bfloat16"
    for cell in [{**BASE, "tokens": 32}] if small else cells:
        settings = settings_of(cell, [f"model.path={large_model}", f"model.compute_dtype={dtype}"])
        found, plan = in_children("--measure", cell, settings, ENVIRONMENT), planned(cell, settings)
        for name in ("peak", "loaded"):
            ratio = plan[name] / found[name]
            figures.add(
                f"{cell['batch']} × {cell['tokens']}, {name}: planned / measured",
                f"{ratio:.2f} of {found[name] / 2**30:.2f} GiB", WANTED if name == "peak" else "",
                planned=plan[name], measured_bytes=found[name], reached=abs(ratio - 1) <= 0.15,
            )
            assert plan[name] > 0 and found[name] > 0
