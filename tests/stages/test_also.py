"""Data sets that are given to a finished run afterwards: only what is missing is predicted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config import RunConfig, dump_config
from pipeline.config.load import with_values
from pipeline.files import write_text
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.verify import verify_folder
from pipeline.stages import evaluate
from pipeline.stages.report import write_report
from pipeline.support.tiny import write_tiny_data


@pytest.mark.slow
def test_a_set_that_comes_later_is_all_that_is_predicted(
    finished_run: tuple[RunPaths, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "leave_world", lambda: None)  # the process group serves the next test
    paths = RunPaths(tmp_path / "run")
    shutil.copytree(finished_run[0].root, paths.root)
    far = str(write_tiny_data(tmp_path / "far.jsonl", 400))

    def evaluated(also: dict[str, object]) -> dict[str, int]:
        write_text(paths.config, dump_config(with_values(finished_run[1], {"evaluate.also": also})))
        evaluate.evaluate_run(paths.root)
        return {path.stem: path.stat().st_mtime_ns for path in paths.predictions.glob("*.npz")}

    before = evaluated({})
    first = evaluated({"far": {"path": far, "rows": 30}})
    assert set(first) == {*before, "also_far"} and all(first[name] == made for name, made in before.items())
    assert "× 30 rows" in capsys.readouterr().err
    assert evaluated({"far": {"path": far, "rows": 30}}) == first
    both = evaluated({"far": {"path": far, "rows": 30}, "odd": {"path": far, "rows": 20, "labels": False}})
    assert set(both) == {*first, "also_odd"} and both["also_far"] == first["also_far"]
    result = write_report(paths.root)
    assert [(name, one["rows"], one["labels"]) for name, one in result["also"].items()] == [
        ("far", 30, True), ("odd", 20, False)]
    assert result["also"]["far"]["left_out"] > 0, "the first rows of both files are the same"
    states = {found.name: found.state for found in verify_folder(paths.root)}
    assert states["predictions/also_odd.npz"] == states["result.json"] == "whole"
    assert evaluated({"far": {"path": far, "rows": 29}})["also_far"] > both["also_far"]
