"""What is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import build_config
from pipeline.config.load import with_values
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


def test_an_optimizer_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = config(tmp_path, {"choices": [" a", " b"], "label": 1}, "accuracy")

    def check(optimizer: str, stage: str) -> None:
        check_inputs(with_values(base, {"train.optimizer": optimizer, "train.deepspeed": stage}))

    monkeypatch.setattr("pipeline.plan.preflight.has_accelerator", lambda: False)
    check("adamw_8bit", "zero0")
    for stage in ("zero1", "zero2", "zero3"):
        with pytest.raises(ConfigError, match=rf"ZeRO-{stage[-1]} of {stage} cuts them .* Set train\.deepspeed=zero0"):
            check("adamw_8bit", stage)
    with pytest.raises(ConfigError, match=r"there is no GPU\. Set train\.optimizer=adamw_8bit"):
        check("paged_adamw_8bit", "zero0")
    monkeypatch.setattr("pipeline.plan.preflight.has_accelerator", lambda: True)
    check("paged_adamw_8bit", "zero0")
