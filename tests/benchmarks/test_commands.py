from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.checkout import Checkout
from benchmarks.commands import in_turn, predicting_of, row, steps_of
from benchmarks.setting import SCALES, Setting


def test_steps_are_read_without_the_first_one(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "step": step, "seconds": seconds, "tokens_per_second": 100.0, "padding_share": 0.25}
        for step, seconds in enumerate([9.0, 2.0, 1.0, 3.0], start=1)
    ]
    lines = [json.dumps(one) for one in [*rows, {"kind": "validation", "step": 4, "nll": 0.1}]]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "environment.json").write_text(json.dumps({"base_model": {"compute_dtype": "bfloat16"}}))
    assert steps_of(tmp_path) == {"step": 2.0, "tokens": 200.0, "padding": 0.25, "dtype": "bfloat16"}
    (tmp_path / "metrics.jsonl").write_text(lines[0] + "\n")
    assert steps_of(tmp_path)["step"] == 9.0


def test_seconds_of_predictions_are_summed(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    for name, seconds in (("validation", 1.5), ("test", 2.0)):
        np.savez(tmp_path / "predictions" / f"{name}.npz", seconds=seconds)
    assert predicting_of(tmp_path) == 3.5


def test_two_checkouts_give_a_ratio_and_one_its_seconds() -> None:
    here, there = [{"command": 2.0}, {"command": 3.0}], [{"command": 4.0}, {"command": 12.0}]
    both = row("search", "the search", {"here": here, "there": there}, "command", "search")
    assert both.value is not None and (both.value.median, both.value.count, both.unit) == (0.375, 2, "×")
    assert both.seconds == (2.5, 8.0) and both.target == "search"
    alone = row("search", "the search", {"here": here}, "command", "search")
    assert alone.value is not None and (alone.value.median, alone.unit, alone.target) == (2.5, "s", "")


class Told(Checkout):
    """Notes what it is asked to run."""

    def run(self, stage: str, run_dir: Path, overrides: object = ()) -> None:
        calls.append((self.name, stage))
        run_dir.mkdir(parents=True)

    def knows(self, key: str) -> bool:
        return self.name == "new" and key == "search.plain"


calls: list[tuple[str, str]] = []


def test_checkouts_take_turns_in_fresh_folders_on_the_same_work(tmp_path: Path) -> None:
    calls.clear()
    setting = Setting(
        SCALES["small"], tmp_path, Told(tmp_path, "new"), Told(tmp_path, "old"), repeats=2, overrides=("label=x",)
    )
    seen: list[Path] = []

    def measure(checkout: Checkout, run_dir: Path) -> dict[str, float]:
        assert not run_dir.exists()
        checkout.run("search", run_dir)
        seen.append(run_dir)
        return {"command": 1.0}

    found = in_turn(setting, setting.commands, measure)
    assert calls == [("new", "train"), ("old", "train"), *[("new", "search"), ("old", "search")] * 2]
    assert [len(numbers) for numbers in found.values()] == [2, 2]
    assert len(set(seen)) == 4 and not any(path.exists() for path in seen)
    new, old = (setting.work_of_default(checkout, "train.max_steps=9") for checkout in setting.sides.values())
    assert [word for word in new if word != "search.plain=false"] == old
    assert old[-2:] == ["train.max_steps=9", "label=x"]


@pytest.mark.parametrize("scale", sorted(SCALES))
def test_scales_are_settings_of_the_default_recipe(scale: str) -> None:
    from pipeline.config import load_config

    config = load_config("default", [*SCALES[scale].rows, *SCALES[scale].steps])
    assert config.train.max_steps >= config.train.validate_every_steps
    if scale == "full":
        assert len(SCALES[scale].rows) == 4 and config.search.trials == 4
