"""Packs that are advanced by hand, and runs that are compared by what their folders hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import Ended, Pack, RunConfig
from pipeline.files import read_json_lines
from pipeline.run_folder.paths import RunPaths


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


def assert_equal_runs(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    for kind in ("train", "validation"):
        ours, theirs = rows(found, kind), rows(expected, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for name in ("loss", "consistency", "gradient_norm", "learning_rate", "supervised_tokens", "nll"):
            wanted = pytest.approx([r.get(name, 0.0) for r in theirs], rel=tolerance)
            assert [r.get(name, 0.0) for r in ours] == wanted, name
    assert sorted(p.relative_to(found) for p in found.rglob("*")) == sorted(
        p.relative_to(expected) for p in expected.rglob("*")
    )
