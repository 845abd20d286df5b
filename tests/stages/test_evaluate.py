"""The evaluation stage on a tiny run: mask draws that stop, and predictions that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.config import load_config
from pipeline.prediction import rounds
from pipeline.stages import evaluate
from pipeline.stages.report import write_report
from pipeline.stages.train import train_run


def predictions(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(mask draws that members.json names, log-probabilities of each split)."""
    members = json.loads((run / "predictions" / "members.json").read_text())
    tables = {}
    for split in ("validation", "calibration", "test"):
        with np.load(run / "predictions" / f"{split}.npz") as arrays:
            tables[split] = arrays["log_probs"]
        assert len(tables[split]) == len(members)
    return sum(member["group"] == "mask_draw" for member in members), tables


def evaluated(run: Path, **ensemble: object) -> tuple[int, dict[str, np.ndarray]]:
    """The same, after an evaluation under these settings."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"].update(ensemble)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluate.evaluate_run(run)
    return predictions(run)


@pytest.mark.slow
def test_draws_stop_when_validation_is_flat(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "leave_world", lambda: None)  # the process group serves the next test
    for module in (evaluate, rounds):
        monkeypatch.setattr(module, "draws_stop", lambda lineups, made, *rest: made in (2, len(lineups)))
    run = tmp_path / "tiny"
    train_run(load_config(None, tiny_settings), run)
    capsys.readouterr()
    drawn, stopped = evaluated(run, size=12, stop_when_flat=True)
    assert drawn == 8 and "8 of 12 mask draws" in capsys.readouterr().err
    assert evaluated(run)[0] == 8 and "predictions are complete" in capsys.readouterr().err
    (run / "predictions" / "test.npz").unlink()
    kept = (run / "predictions" / "validation.npz").stat().st_mtime_ns
    assert evaluated(run)[0] == 8 and (run / "predictions" / "validation.npz").stat().st_mtime_ns == kept
    write_report(run)
    assert "No more than 8 masks were drawn" in (run / "report.html").read_text()

    assert evaluated(run, size=8, stop_when_flat=False)[0] == 8  # the same eight
    assert "predictions are complete" in capsys.readouterr().err
    drawn, every = evaluated(run, size=12)
    assert drawn == 12
    for split, table in stopped.items():
        np.testing.assert_allclose(every[split][: len(table)], table, rtol=0, atol=1e-5)
