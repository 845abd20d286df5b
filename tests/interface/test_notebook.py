"""docs/quickstart.ipynb from top to bottom, as it stands: on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

CELLS = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_kept_without_what_a_run_of_it_printed() -> None:
    assert len(CODE) == 6
    for number, cell in enumerate(cell for cell in CELLS if cell["cell_type"] == "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile(CODE[number], f"cell {number + 1}", "exec")


@pytest.mark.slow
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(CODE):
        exec(compile(cell, f"cell {number + 1}", "exec"), names)
    assert sorted(names["losses"].by_step) == list(range(1, 7)) and sorted(names["losses"].validations) == [3, 6]
    assert len(names["answers"]) == 2 and names["answers"][0].probabilities[0] > 0
    assert Path("runs/notebook/report.html").is_file() and names["exported"].readout.temperature > 0
