"""Start the processes of a stage, keep their log, pass signals on, derive the exit code.

Signals are caught here, in the parent. For training it writes a stop request that all ranks agree on at the next
step boundary, because DeepSpeed's own launcher kills or orphans ranks in the middle of a save. Other stages are told
to end: what they have published stays, the rest is made again.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from pipeline.config.sections import LaunchConfig
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, SetupError
from pipeline.nodes import node_arguments
from pipeline.runs import RunPaths, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent
_NOISE = re.compile(
    r"^\[\d{4}-|^\[rank|Loading weights|Writing model shards|Warning|warnings?\.warn|kernels-community"
    r"|built successfully|^\s*(self\.|return |import )|^W\d{4} |^\s*$|\[Gloo\]|^Using .* cache|^Time to load"
    r"|^Emitting ninja|^ninja"
)
_TAIL_LINES = 25
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A stage starts a world of its own: what an outer launcher, or this process, left in the environment is not its."""


def launcher_command(module: str, run_dir: Path, launch: LaunchConfig) -> list[str]:
    """The `deepspeed` launcher's command line for a stage that uses all processes.

    On a machine with accelerators no count is passed unless one is set, so that a visible-devices setting is
    honoured; on CPU the launcher has to be told. Several nodes: `launch.hostfile` has DeepSpeed reach them by ssh;
    with `launch.nodes` each starts its own processes.
    """
    port = str(launch.master_port or free_port())
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port]
    if launch.nodes > 1:
        command += node_arguments(launch, run_dir)
    elif launch.hostfile:
        command += ["--hostfile", launch.hostfile]
    if launch.nodes == 1 and (launch.processes or not has_accelerator()):
        command += ["--num_accelerators", str(process_count(launch))]
    return [*command, "--module", module, "--run-dir", str(run_dir.resolve())]


def launcher_environment(launch: LaunchConfig) -> dict[str, str]:
    """Variables for the ranks: threads are divided among the processes of a CPU-only machine."""
    if has_accelerator():
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // process_count(launch)))}


def process_count(launch: LaunchConfig) -> int:
    """Processes per node on a machine without accelerators (or as configured)."""
    return launch.processes or min(2, os.cpu_count() or 1)


def has_accelerator() -> bool:
    """Whether an NVIDIA or AMD device node exists: this process does not import torch."""
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists() or shutil.which("nvidia-smi") is not None


def free_port() -> int:
    """A port nobody listens on now, below the range from which the kernel serves outgoing connections."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SetupError("launch.master_port", 0, "found no free port", "Set one that is free.")


def run_stage(
    command: list[str], log: Path, run_dir: Path, stage: str, environment: Mapping[str, str] | None = None
) -> int:
    """Run a stage's process group; show its lines without the libraries' chatter; return our exit code.

    The whole output goes to `log`. The first signal asks the stage to stop, the second ends its process group.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = RunPaths(run_dir)
    paths.stop_request.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env |= {"PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    env |= {**(environment or {}), "PYTHONPATH": _python_path()}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        asked: list[int] = []
        restore = _catch_signals(process, paths, stage, asked)
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                file.flush()
                tail.append(line)
                _show(line)
            code = process.wait()
        finally:
            restore()
            _end_group(process)
    return EXIT_STOPPED if asked and code != 0 else _exit_code(code, paths, stage, tail, log)


def _exit_code(code: int, paths: RunPaths, stage: str, tail: deque[str], log: Path) -> int:
    status = read_json(paths.status).get(stage, {}) if paths.status.exists() else {}
    if status.get("state") == "stopped":
        return EXIT_STOPPED
    if code in (EXIT_OK, EXIT_USER, EXIT_STOPPED):
        return code
    print(f"\n{stage} failed (exit code {code}). The last lines of {log}:\n{''.join(tail)}", file=sys.stderr)
    return EXIT_FAILED


def _catch_signals(process: subprocess.Popen[str], paths: RunPaths, stage: str, asked: list[int]) -> Callable[[], None]:
    """Install the handlers, which note signals in `asked`; returns the function that puts the old ones back."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            _end_group(process)
        elif stage == "train":
            write_json(paths.stop_request, {"signal": signal.Signals(number).name})
            print("\nstopping at the next step; everything is saved. Once more to end at once.", file=sys.stderr)
        else:
            process.send_signal(signal.SIGTERM)
            print(f"\nending {stage}; the same command continues.", file=sys.stderr)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _show(line: str) -> None:
    if _NOISE.search(line):
        return
    if line.startswith("step ") and sys.stderr.isatty():
        print(f"\r\033[K{line.rstrip()}", end="", file=sys.stderr, flush=True)
    else:
        print(line.rstrip(), file=sys.stderr, flush=True)


def _python_path() -> str:
    """Ranks find this package wherever the user stands."""
    before = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{before}" if before else str(ROOT)
