"""What can only be found out by doing it, each in a process of its own: a crash or a hang is a finding, not an end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.doctor.finding import Finding
from pipeline.doctor.machine import pip_install
from pipeline.errors import one_line
from pipeline.plan.request import Request

ROOT = Path(__file__).resolve().parents[2]
AT_ONCE = 2
"""Steps that run together: most of each is importing."""


@dataclass(frozen=True)
class Step:
    """A program that tries something."""

    name: str
    program: tuple[str, ...]
    """Words behind `python`. Findings come from the file named by the last word, which is added; where the program
    writes none, its exit code is the finding."""
    done: str
    """What has been shown where the program ends well."""
    remedy: str
    """Of a crash, a hang or an error without one of its own."""
    seconds: float = 180.0
    """Time it may take: the first import from a network disk takes minutes."""


def machine_steps() -> tuple[Step, ...]:
    """Those that need no configuration."""
    ours = ("-m", "pipeline.doctor.trials")
    return (
        Step("torch", (*ours, "torch"), "multiplies", pip_install("--force-reinstall", "torch")),
        Step("bitsandbytes", (*ours, "bitsandbytes"), "trains through a 4-bit layer",
             f"{pip_install('--force-reinstall', '--no-deps', 'bitsandbytes')} (or model.quantization=none)"),
        Step("deepspeed", (*ours, "deepspeed"), "takes a step under ZeRO-2",
             pip_install("--force-reinstall", "--no-deps", "deepspeed")),
        Step("nccl", (*ours, "nccl"), "sums over the devices",
             "NCCL_DEBUG=INFO loradrop doctor says why; NCCL_P2P_DISABLE=1 or docker run --ipc=host often mends it"),
        Step("ray", ("-m", "tune.cluster"), "starts, runs a task and ends",
             pip_install("--force-reinstall", "--no-deps", "ray")),
    )


def configuration_step(request: Request) -> Step:
    """Model and data of the configuration that the command line names."""
    remedy = "loradrop data shows the rows, --dry-run the configuration"
    program = ("-m", "pipeline.doctor.trials", "configuration", json.dumps(asdict(request)))
    return Step("configuration", program, "is read", remedy, seconds=900.0)


def run_steps(steps: Sequence[Step]) -> Iterator[Finding]:
    """Findings in the order of the steps, each as soon as those before it are there. An interruption ends them all."""
    ended = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for found in pool.map(lambda step: run_step(step, ended), steps):
                yield from found
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)


def run_step(step: Step, ended: threading.Event) -> list[Finding]:
    """Try one step, until it is over or nobody waits for it any more; never raises for what its process does."""
    with tempfile.TemporaryDirectory(prefix="loradrop-doctor-") as folder:
        out = Path(folder) / "findings.json"
        # What the user has put first stays first: it is what the other stages import, too.
        paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
        environment = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        with (Path(folder) / "output").open("w+b") as output:
            process = subprocess.Popen(
                [sys.executable, *step.program, str(out)], stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )
            code, deadline = None, time.monotonic() + step.seconds
            while code is None and time.monotonic() < deadline and not ended.is_set():
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(0.2)
            end_tree(process)
            output.seek(0)
            said = output.read().decode("utf-8", "replace")
        if code == 0:
            return findings_in(out, step)
    if code is None:
        return [Finding(step.name, "FAIL", f"has not ended after {step.seconds:g} s", step.remedy)]
    if code < 0:
        with suppress(ValueError):
            return [Finding(step.name, "FAIL", f"was ended by {signal.Signals(-code).name}", step.remedy)]
    return [Finding(step.name, "FAIL", last_words(said) or f"ended with exit code {code}", step.remedy)]


def findings_in(file: Path, step: Step) -> list[Finding]:
    """What a step has written down."""
    if not file.exists():
        return [Finding(step.name, "ok", step.done)]
    found = [Finding(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    return [
        Finding(one.check, one.state, one.detail, one.remedy or (step.remedy if one.state == "FAIL" else ""))
        for one in found
    ]


def last_words(output: str) -> str:
    """The line that names an error, which others may follow, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.partition(":")[0] or "Exception" in line.partition(":")[0]]
    return one_line((errors or lines or [""])[-1])[:300]


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End what a step has started, also where it lives in sessions of its own, as Ray's processes do."""
    descendants: list[Any] = []
    if process.poll() is None:
        with suppress(ImportError):
            import psutil

            with suppress(psutil.Error):
                descendants = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for one in descendants:
        with suppress(Exception):  # it has ended meanwhile
            one.kill()
    process.wait()
