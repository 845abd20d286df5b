"""`bash launch.sh test`: linter, type checker, fast tier, its arithmetic on other kernels, slow tier; `--gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, SetupError, UserError
from pipeline.files import read_json
from pipeline.plan.request import Request

ROOT = Path(__file__).resolve().parents[3]
NARROW = "AVX2 kernels"
_FAST = ["pytest", "-q", "-m", "not slow and not gpu", "-n", "2"]
STEPS = {
    "ruff": ["ruff", "check", "."],
    "mypy": ["mypy", "pipeline", "tune"],
    "fast tests": _FAST,
    NARROW: [*_FAST, "tests/adapters", "tests/loss", "tests/prediction", "tests/training/test_loader.py"],
    # Two at a time, though they wait a third of their time: with three, processes missed their deadlines on two cores.
    "slow tests": ["pytest", "-q", "-m", "slow and not cluster", "-n", "2", "--dist", "loadscope",
                   "--no-loadscope-reorder", "--durations=25"],
    "GPU, on CPU": ["pipeline.cli", "test", "--gpu", "--device", "cpu", "--fresh"],
}
SLOW = ("slow tests", "GPU, on CPU")
ENVIRONMENT = {NARROW: {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
"""Step -> what it sets: a machine with wider vectors then sums as one without. A tolerance must hold on both."""
ACCEPTANCE = ["pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
NEEDED = ("torch", "bitsandbytes", "deepspeed", "transformers", "peft", "datasets", "pydantic", "rich", "scipy")
"""What the acceptance imports and a machine with a GPU may lack: tests/gpu/pack_wheels.py carries it there."""


def run_tests(request: Request) -> int:
    """Run every step, also after a failure; returns the exit code.

    Raises:
        SetupError: this is an installed package without its tests, or an environment without test tools.
        UserError: --device without --gpu, or as `run_acceptance`.
    """
    if not (ROOT / "tests").is_dir():
        raise SetupError("test", str(ROOT), "holds no tests", "Run it in a checkout of the repository.")
    if find_spec("pytest") is None:
        remedy = f"Run bash {ROOT / 'launch.sh'} test, which adds them."
        raise SetupError("test", sys.prefix, "has no test tools", remedy)
    if request.gpu:
        return run_acceptance(request)
    for option, given in (("--device", request.device), ("--fresh", request.fresh or None)):
        if given is not None:
            raise UserError(option, given, "belongs to --gpu", "Run test --gpu, or leave it out.")
    outcome: dict[str, tuple[bool, float]] = {}
    for name, command in STEPS.items():
        if (request.fast and name in SLOW) or (name == NARROW and not _has_wider_vectors()):
            continue
        print(f"\n── {name} " + "─" * (66 - len(name)), flush=True)
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ENVIRONMENT.get(name, {})}
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False).returncode
        outcome[name] = (code == 0, time.monotonic() - started)
    print()
    for name, (passed, seconds) in outcome.items():
        print(f"{name:12} {'passed' if passed else 'FAILED'}  {seconds:6.1f} s")
    return EXIT_OK if all(passed for passed, _ in outcome.values()) else EXIT_FAILED


def _has_wider_vectors() -> bool:
    """Whether this machine's kernels are others than those of AVX2: else the fast tests were with these already."""
    from torch.backends.cpu import get_cpu_capability

    return get_cpu_capability() not in ("AVX2", "DEFAULT")


def run_acceptance(request: Request) -> int:
    """Run the pieces of tests/gpu that have not passed yet under this code; returns the exit code, 75 where some are
    left for the next start.

    Raises:
        SetupError: something is missing that the pieces import.
        UserError: there is no such device, or --output is another file.
    """
    device = request.device or "cuda"
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        remedy = "python tests/gpu/pack_wheels.py packs what such a machine lacks (docs/CONTRIBUTING.md)."
        raise SetupError("test --gpu", sys.executable, f"has no {', '.join(lacking)}", remedy)
    _check_device(device)
    results = Path(request.output or f"runs/acceptance-{device}.json").absolute()
    if results.exists():
        _require_own(results)
        if request.fresh:
            results.unlink()
    results.parent.mkdir(parents=True, exist_ok=True)
    packages = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    at_once: list[str] = []
    if device == "cpu":
        at_once = ["-n", "2"]
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *ACCEPTANCE, *at_once, "--device", device, "--results", str(results)]
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    return code if code in (EXIT_OK, EXIT_STOPPED) else EXIT_FAILED


def _check_device(device: str) -> None:
    """Raises `UserError`."""
    if device not in ("cpu", "cuda"):
        remedy = "Give cuda or cpu; CUDA_VISIBLE_DEVICES chooses among several."
        raise UserError("--device", device, "is none that the acceptance knows", remedy)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            remedy = "test --gpu --device cpu runs the same pieces in a small form."
            raise UserError("--device", device, "is not there: torch sees no GPU", remedy)


def _require_own(results: Path) -> None:
    """Raises `UserError`."""
    kept = read_json(results, "Name another file.")
    if not isinstance(kept, dict) or not {"facts", "pieces"} <= kept.keys():
        raise UserError("--output", str(results), "is no file that test --gpu has written", "Name another file.")
