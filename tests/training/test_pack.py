"""Runs in a pack are the runs alone: losses, masks, files; whoever joins, leaves or fails beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import Ended, Pack, RunConfig, load_config
from pipeline.files import read_json_lines
from pipeline.run_folder.paths import RunPaths

STEPS = 9
METHODS: dict[str, list[str]] = {
    "dropout": ["adapter.method=lora_dropout", "adapter.rank=4", "train.seed=1", "adapter.rate=0.5"],
    "hidden": [
        "adapter.method=hiddenkey", "adapter.rank=8", "train.seed=2", "train.learning_rate=0.005",
        "train.max_steps=7", "train.lora_plus_ratio=4", "train.weight_decay=0.1", "train.label_smoothing=0.1",
    ],
    "plain": [
        "adapter.method=none", "adapter.rank=4", "train.seed=3", "train.max_steps=11",
        "train.global_batch=4", "adapter.target_modules=[q_proj, v_proj]", "train.max_gradient_norm=0.05",
    ],
}


@pytest.fixture
def configs(tiny_settings: list[str]) -> dict[str, RunConfig]:
    common = [*tiny_settings, f"train.max_steps={STEPS}", "train.draws=2"]
    return {name: load_config(None, [*common, *own]) for name, own in METHODS.items()}


def rows(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [row for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == kind]


def run_all(pack: Pack, at: dict[int, list[Callable[[], None]]] | None = None) -> dict[str, Ended]:
    """Advance until nothing is left; `at`: what is done before which tick."""
    ended: dict[str, Ended] = {}
    for tick in range(100):
        for work in (at or {}).get(tick, []):
            work()
        for one in pack.advance():
            ended[one.run_dir.name] = one
        if not pack.runs and tick >= max(at or {0: []}):
            return ended
    raise AssertionError("endless")


def alone(config: RunConfig, folder: Path) -> Ended:
    pack = Pack(config)
    pack.admit(config, folder)
    return run_all(pack)[folder.name]


def assert_equal_runs(found: Path, expected: Path) -> None:
    for kind in ("train", "validation"):
        ours, theirs = rows(found, kind), rows(expected, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for name in ("loss", "consistency", "gradient_norm", "learning_rate", "supervised_tokens", "nll"):
            assert [r.get(name, 0.0) for r in ours] == pytest.approx([r.get(name, 0.0) for r in theirs], rel=1e-5), name
    assert sorted(p.relative_to(found) for p in found.rglob("*")) == sorted(
        p.relative_to(expected) for p in expected.rglob("*")
    )


@pytest.mark.slow
def test_packed_runs_are_the_runs_alone(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    pack = Pack(configs["dropout"])
    for name in ("dropout", "hidden"):
        pack.admit(configs[name], tmp_path / "pack" / name)
    ended = run_all(pack, {5: [lambda: pack.admit(configs["plain"], tmp_path / "pack" / "plain")]})
    for name, config in configs.items():
        expected = alone(config, tmp_path / "alone" / name)
        assert ended[name].state == expected.state == "done"
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "alone" / name)
        assert ended[name].result is not None and expected.result is not None
        assert ended[name].result["best_step"] == expected.result["best_step"]


@pytest.mark.slow
def test_a_pack_of_one_is_a_run_under_deepspeed(tmp_path: Path, configs: dict[str, RunConfig]) -> None:
    from pipeline.stages.train import train_run

    for name, config in configs.items():
        zero = config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": "zero0"})})
        train_run(zero, tmp_path / "zero" / name)
        alone(config, tmp_path / "pack" / name)
        assert_equal_runs(tmp_path / "pack" / name, tmp_path / "zero" / name)
