"""`bash launch.sh test`: linter, type checker, fast tier, its arithmetic on other kernels, slow tier."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import EXIT_FAILED, EXIT_OK, SetupError
from pipeline.plan.request import Request

ROOT = Path(__file__).resolve().parents[3]
_FAST = ["pytest", "-q", "-m", "not slow and not gpu", "-n", "2"]
STEPS = {
    "ruff": ["ruff", "check", "."],
    "mypy": ["mypy", "pipeline", "tune"],
    "fast tests": _FAST,
    "AVX2 kernels": [*_FAST, "tests/adapters", "tests/loss", "tests/prediction", "tests/training/test_loader.py"],
    # Two at a time, though they wait a third of their time: with three, processes missed their deadlines on two cores.
    "slow tests": ["pytest", "-q", "-m", "(slow or gpu) and not cluster", "-n", "2", "--dist", "loadscope",
                   "--no-loadscope-reorder", "--durations=25"],
}
ENVIRONMENT = {"AVX2 kernels": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}}
"""Step -> what it sets: a machine with wider vectors then sums as one without. A tolerance must hold on both."""


def run_tests(request: Request) -> int:
    """Run every step, also after a failure; returns the exit code.

    Raises:
        SetupError: this is an installed package without its tests, or an environment without test tools.
    """
    if not (ROOT / "tests").is_dir():
        raise SetupError("test", str(ROOT), "holds no tests", "Run it in a checkout of the repository.")
    if find_spec("pytest") is None:
        remedy = f"Run bash {ROOT / 'launch.sh'} test, which adds them."
        raise SetupError("test", sys.prefix, "has no test tools", remedy)
    outcome: dict[str, tuple[bool, float]] = {}
    for name, command in STEPS.items():
        if request.fast and name == "slow tests":
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
