"""Tokens/s and memory of an 8B-shaped NF4 base against transformers, PEFT and bitsandbytes; packs; decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.acceptance import Figures

from benchmarks.cases import CASES, large
from benchmarks.checkout import Checkout
from benchmarks.setting import SCALES, Setting

pytestmark = pytest.mark.gpu
ROUNDS = 5


def test_rows(
    device: torch.device, small: bool, large_model: Path, tmp_path: Path, figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The case `large` of the benchmarks: every row has a figure (in the small form, of the tiny base)."""
    setting = Setting(
        replace(SCALES["small"], rounds=1 if small else ROUNDS), tmp_path, Checkout(ROOT, "here"), device=device.type,
        overrides=(f"model.path={large_model}",),
    )
    if small:
        monkeypatch.setattr(large, "TOKENS", 16)
    rows = list(large.measured(setting))
    figures.rows(rows)
    assert {row.target for row in rows} - {""} == set(large.NAMES) == set(CASES["large"].targets)
    assert all(row.value is not None and row.value.median > 0 for row in rows)
