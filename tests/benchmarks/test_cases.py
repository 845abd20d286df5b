"""Every case on the tiny model, once: figures mean nothing, rows and targets do."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cases import CASES
from benchmarks.checkout import ROOT, Checkout
from benchmarks.setting import SCALES, Setting


@pytest.fixture
def setting(tiny_folder: Path, tmp_path: Path) -> Setting:
    overrides = (
        f"model.path={tiny_folder / 'model'}", f"data.path={tiny_folder / 'rows.jsonl'}", "data.max_tokens=64",
        "train.global_batch=8", "train.micro_batch=4", "evaluate.bootstrap_samples=200",
    )
    return Setting(SCALES["small"], tmp_path, Checkout(ROOT, "here"), repeats=1, overrides=overrides)


def check(name: str, setting: Setting) -> None:
    rows = list(CASES[name].run(setting))
    assert rows and {row.case for row in rows} == {name}
    for row in rows:
        if row.value is None:
            assert row.note.startswith("skipped: ")
            continue
        assert math.isfinite(row.value.median) and row.value.median > 0 and row.value.count == 1
        assert row.limit is None or (row.limit.gflops > 0 and row.limit.share.median > 0)
    of_ratios = {target for target in CASES[name].targets if not CASES[name].commands or setting.against}
    assert {row.target for row in rows} - {""} >= of_ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.commands])
def test_passes(name: str, setting: Setting) -> None:
    check(name, setting)


@pytest.mark.slow
def test_commands(setting: Setting) -> None:
    check("compare", setting)


@pytest.mark.slow
def test_commands_against_another_checkout(setting: Setting) -> None:
    from dataclasses import replace

    check("evaluate", replace(setting, against=Checkout(ROOT, "there")))


class Recorded(Checkout):
    """Leaves at once what a command leaves, as far as it is read."""

    def run(self, stage: str, run_dir: Path, overrides: Sequence[str] = ()) -> None:
        run_dir.mkdir(parents=True)
        rows = [
            {"kind": "train", "step": step, "seconds": 0.001, "tokens_per_second": 3e4, "padding_share": 0.0}
            for step in (1, 2, 3)
        ]
        (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (run_dir / "environment.json").write_text(json.dumps({"base_model": {"compute_dtype": "float32"}}))
        (run_dir / "predictions").mkdir()
        np.savez(run_dir / "predictions" / "test.npz", seconds=1.5)
        time.sleep(0.01)

    def start(self, stage: str, run_dir: Path, overrides: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        self.run(stage, run_dir, overrides)
        return subprocess.Popen(["true"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first-step", "trainer", "search", "factors", "line"])
def test_cases_whose_commands_other_cases_run(name: str, setting: Setting) -> None:
    from dataclasses import replace

    check(name, replace(setting, here=Recorded(ROOT, "here"), against=Recorded(ROOT, "there")))
