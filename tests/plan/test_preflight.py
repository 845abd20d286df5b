"""What is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import build_config
from pipeline.errors import ConfigError
from pipeline.plan.preflight import check_inputs


def config(tmp_path: Path, row: dict[str, Any], by: str) -> Any:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"question {n}", **row}) for n in range(12)]
    path.write_text("\n".join(lines), encoding="utf-8")
    data = {"path": str(path), "validation_rows": 2, "calibration_rows": 2, "test_rows": 2}
    return build_config({"data": data, "select": {"by": by}})


def test_a_score_that_the_rows_do_not_have_cannot_choose(tmp_path: Path) -> None:
    choice = {"choices": [" a", " b", " c"], "label": 1}
    check_inputs(config(tmp_path, choice, "accuracy"))
    with pytest.raises(ConfigError, match=r"select\.by = 'f1': is no score of choice rows with 3 choices"):
        check_inputs(config(tmp_path, choice, "f1"))
    check_inputs(config(tmp_path, {"completion": " a"}, "nll_scaled"))
    with pytest.raises(ConfigError, match=r"is no score of completion rows. Set select\.by to one of nll_scaled, nll"):
        check_inputs(config(tmp_path, {"completion": " a"}, "accuracy"))
