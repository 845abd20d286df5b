"""`bash launch.sh test`: which commands it runs, and under what."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from pipeline.errors import SetupError
from pipeline.plan.request import Request
from pipeline.stages.reference import test as stage


def test_arithmetic_runs_once_more_on_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both libraries are told, by the names that they read; the other steps run as the machine is."""
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    ran = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        ran.append((command[2], {k: v for k, v in env.items() if k in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert stage.run_tests(Request(fast=True)) == 0
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert ran == [("ruff", {}), ("mypy", {}), ("pytest", {}), ("pytest", narrow)]


def test_an_environment_without_test_tools_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"has no test tools.*launch\.sh test"):
        stage.run_tests(Request())
