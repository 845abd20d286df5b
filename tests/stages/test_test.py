"""`bash launch.sh test`: which commands it runs, and under what."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, SetupError, UserError
from pipeline.plan.request import Request
from pipeline.stages.reference import test as stage


@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
def test_arithmetic_runs_once_more_on_other_kernels_where_there_are_any(
    vectors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both libraries are told, by the names that they read; the other steps run as the machine is."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: vectors)
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    ran = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        ran.append((command[2], {k: v for k, v in env.items() if k in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    assert stage.run_tests(Request(fast=True)) == 0
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert ran == [("ruff", {}), ("mypy", {}), ("pytest", {}), *([("pytest", narrow)] if vectors == "AVX512" else [])]


def test_an_environment_without_test_tools_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"has no test tools.*launch\.sh test"):
        stage.run_tests(Request())


def test_without_a_gpu_the_acceptance_names_the_way_to_run_it_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device = 'cuda': is not there.*test --gpu --device cpu") as caught:
        stage.run_tests(Request(gpu=True))
    assert caught.value.exit_code == EXIT_USER
    with pytest.raises(UserError, match=r"--device = 'tpu': is none"):
        stage.run_tests(Request(gpu=True, device="tpu"))


@pytest.mark.parametrize(("given", "flag"), [({"device": "cpu"}, "--device"), ({"fresh": True}, "--fresh")])
def test_what_belongs_to_the_acceptance_is_refused_without_it(given: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag}.*belongs to --gpu"):
        stage.run_tests(Request(**given))


def test_a_machine_that_lacks_packages_is_told_how_they_get_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "find_spec", lambda name: None if name in ("bitsandbytes", "deepspeed") else object())
    with pytest.raises(SetupError, match=r"has no bitsandbytes, deepspeed.*pack_wheels"):
        stage.run_tests(Request(gpu=True, device="cpu"))


@pytest.mark.parametrize(("ended", "code"), [(0, EXIT_OK), (75, EXIT_STOPPED), (1, EXIT_FAILED), (4, EXIT_FAILED)])
def test_the_acceptance_is_pytest_over_its_pieces_with_what_has_passed(
    ended: int, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> SimpleNamespace:
        ran.append((command, env))
        return SimpleNamespace(returncode=ended)

    monkeypatch.setattr(subprocess, "run", run)
    results = tmp_path / "new" / "kept.json"
    assert stage.run_tests(Request(gpu=True, device="cpu", output=str(results))) == code
    results.write_text('{"facts": {}, "pieces": {}}')
    assert stage.run_tests(Request(gpu=True, device="cpu", output=str(results), fresh=True)) == code
    assert not results.exists()
    results.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"--output.*no file that test --gpu has written"):
        stage.run_tests(Request(gpu=True, device="cpu", output=str(results), fresh=True))
    assert results.exists()
    (command, env), _ = ran
    assert command[command.index("--results") + 1] == str(results) and "tests/gpu" in command
    assert command[command.index("--device") + 1] == "cpu" and env["CUDA_VISIBLE_DEVICES"] == ""
