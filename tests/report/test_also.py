"""The other data sets of a run in its report: against direct computation, in words, and refused where not its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from pipeline.config import build_config, dump_config
from pipeline.data.rows import Row
from pipeline.data.shapes.also import AlsoRows
from pipeline.errors import RunFolderError
from pipeline.files import write_json, write_text
from pipeline.report.also.tables import format_also
from pipeline.run_folder.chain import Origin, predictions_from
from pipeline.run_folder.mark import claim
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, read_predictions, write_predictions
from pipeline.run_folder.verify import verify_folder
from pipeline.stages.report import print_report, write_report

SIZES = {"validation": 60, "calibration": 80, "test": 90, "also_far": 70, "also_odd": 50}
MEMBERS = [
    PredictedMember("base", "base"), PredictedMember("mean-field", "mean_field", "adapter", "cd"),
    *(PredictedMember(f"draw {draw}", "mask_draw", "adapter", "cd", draw) for draw in range(4)),
]
ALSO = {"far": {"path": "far.jsonl"}, "odd": {"path": "odd.jsonl", "labels": False}}


def write_run(root: Path) -> dict[str, list[Row]]:
    """A run folder with the predictions of its splits and of both sets; the second is answered with less confidence."""
    random, paths, rows = np.random.default_rng(1), RunPaths(root), {}
    claim(root, "run")
    config = build_config({"evaluate": {"bootstrap_samples": 100, "also": ALSO}, "ensemble": {"size": 4}})
    write_text(paths.config, dump_config(config))
    write_members(paths.predictions, MEMBERS)
    for split, count in SIZES.items():
        truth = random.normal(scale=0.3 if split == "also_odd" else 1.5, size=count)
        labels = (random.random(count) < 1 / (1 + np.exp(-truth))).astype(int)
        logits = 2 * truth + random.normal(scale=0.7, size=(len(MEMBERS), count))
        scores = np.stack([np.zeros_like(logits), logits], axis=-1)
        log_probs = (scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)).astype(np.float32)
        ids = tuple(f"{split}-{number}" for number in range(count))
        origin = Origin(config.training_sha256(), split if split in ("also_far", "also_odd") else "rows")
        made_from = predictions_from(origin, MEMBERS)
        write_predictions(paths.predictions, split, ChoicePredictions(ids, log_probs, made_from=made_from))
        units = [f"{split}-{number // 2}" if split == "also_far" else None for number in range(count)]
        rows[split] = [
            Row(id=name, prompt=name, choices=("bad", "good"), label=int(label), unit=unit)
            for name, label, unit in zip(ids, labels, units, strict=True)
        ]
    return rows


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    rows = write_run(tmp_path / "run")
    own = SimpleNamespace(fingerprint="rows", **{name: rows[name] for name in ("validation", "calibration", "test")})
    sets = {name: AlsoRows(rows[name], name, name == "also_far", 3) for name in ("also_far", "also_odd")}
    monkeypatch.setattr("pipeline.report.inputs.load_splits", lambda _: own)
    monkeypatch.setattr("pipeline.report.also.rows.load_also", lambda also, *_: sets if also else {})
    return SimpleNamespace(root=tmp_path / "run", paths=RunPaths(tmp_path / "run"), rows=rows)


def mixture(run: SimpleNamespace, split: str, temperature: float) -> np.ndarray:
    found = read_predictions(run.paths.predictions, split).outputs[2:].astype(np.float64)
    powered = np.exp(found).mean(axis=0) ** (1.0 / temperature)
    return np.asarray(powered / powered.sum(axis=1, keepdims=True))


def entropies(probabilities: np.ndarray) -> np.ndarray:
    return np.asarray(-(probabilities * np.log(probabilities)).sum(axis=1))


def test_scores_are_under_the_temperature_of_the_run_and_beside_the_test_split(run: SimpleNamespace) -> None:
    result = write_report(run.root)
    entry = next(one for one in result["also"]["far"]["systems"] if one["key"] == "masks_4")
    own = next(one for one in result["systems"] if one["key"] == "masks_4")
    scale, labels = own["temperature"]["mean"], [row.label for row in run.rows["also_far"]]
    there = mixture(run, "also_far", scale)
    assert entry["after"]["nll"]["value"] == pytest.approx(log_loss(labels, there))
    assert entry["after"]["accuracy"]["value"] == pytest.approx(accuracy_score(labels, there.argmax(1)))
    for score in ("nll", "accuracy", "ece"):
        found = entry["after"][score]
        assert found["low"] <= found["value"] <= found["high"]
        less = found["minus_test"]
        assert less["value"] == pytest.approx(found["value"] - own["test"]["after"][score]["value"])
        assert less["low"] <= less["value"] <= less["high"]
    assert (result["also"]["far"]["units"], result["also"]["far"]["left_out"]) == (35, 3)
    assert set(result["made_from"]["predictions"]) == set(SIZES)

    tested, odd = mixture(run, "test", scale), mixture(run, "also_odd", scale)
    entry = next(one for one in result["also"]["odd"]["systems"] if one["key"] == "masks_4")
    assert "after" not in entry and set(entry["detection"]) == {"entropy", "mutual_information", "confidence"}
    auroc = roc_auc_score([0] * 90 + [1] * 50, np.concatenate([entropies(tested), entropies(odd)]))
    found = entry["detection"]["entropy"]
    assert found["auroc"]["value"] == pytest.approx(auroc) and found["auroc"]["low"] > 0.5
    assert found["mean"] == pytest.approx(entropies(odd).mean())
    assert entry["detection"]["confidence"]["test_mean"] == pytest.approx(tested.max(1).mean())
    single = next(one for one in result["also"]["odd"]["systems"] if one["key"] == "mean_field")
    assert "mutual_information" not in single["detection"], "one member cannot disagree"


def test_they_stand_on_the_terminal_and_the_page(run: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    result = write_report(run.root)
    print_report(run.root)
    text = format_also(result)
    assert text in capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "also far: 70 rows of far.jsonl, 35 independent units" in text and "odd.jsonl; no labels" in text
    page = run.paths.report.read_text()
    assert "<h2>Other data sets</h2>" in page and "3 left out" in page and "AUROC, mutual information" in page


def test_without_other_sets_nothing_is_said_of_them(run: SimpleNamespace) -> None:
    config = build_config({"evaluate": {"bootstrap_samples": 100}, "ensemble": {"size": 4}})
    write_text(run.paths.config, dump_config(config))
    result = write_report(run.root)
    assert "also" not in result and "Other data sets" not in run.paths.report.read_text()
    assert "also" not in dump_config(config)


def test_predictions_of_other_rows_or_members_are_refused(run: SimpleNamespace) -> None:
    found = read_predictions(run.paths.predictions, "also_far")
    other: dict[str, Any] = {**found.made_from, "data_sha256": "elsewhere"}
    write_predictions(run.paths.predictions, "also_far", replace(found, made_from=other))
    with pytest.raises(RunFolderError, match=r"also_far\.npz: was made from other data"):
        write_report(run.root)
    (run.paths.predictions / "also_far.npz").unlink()
    with pytest.raises(RunFolderError, match=r"also_far\.npz: does not exist"):
        write_report(run.root)


def test_verify_knows_them(run: SimpleNamespace) -> None:
    write_json(run.paths.environment, {"data_fingerprint": "rows"})
    states = {one.name: one.state for one in verify_folder(run.root)}
    assert states["predictions/also_far.npz"] == states["predictions/test.npz"] == "whole"
    write_members(run.paths.predictions, MEMBERS[:-1])
    states = {one.name: one.state for one in verify_folder(run.root)}
    assert states["predictions/also_far.npz"] == "foreign"
