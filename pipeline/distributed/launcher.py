"""Start the processes of a stage, keep their log, pass signals on, derive the exit code.

Signals are caught here, in the parent. For stages of several processes it writes a stop request that all ranks agree
on at the next boundary, and keeps the signals from DeepSpeed's launcher, which kills or orphans ranks in the middle of
a save. Other stages are told to end: what they have published stays, the rest is made again.
"""

from __future__ import annotations

import base64
import contextlib
import json
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from pipeline.config.launch import LaunchConfig
from pipeline.distributed import ranks
from pipeline.distributed.devices import accelerator_memory, check_processes, visible_devices
from pipeline.distributed.hosts import hosts_command, read_hosts
from pipeline.distributed.lifeline import GRACE, PARENT, WARNING, stop_signals
from pipeline.distributed.nodes import log_name, node_arguments
from pipeline.errors import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USER,
    DiskFull,
    RunFolderError,
    SetupError,
    one_line,
    printable,
)
from pipeline.files import full_disk_named, open_append, write_json
from pipeline.run_folder.paths import RunPaths, read_status, update_status

ROOT = Path(__file__).resolve().parents[2]
_NOISE = re.compile(
    r"^\[\d{4}-|^\[rank|Loading weights|Writing model shards|Warning|warnings?\.warn|kernels-community"
    r"|built successfully|^\s*(self\.|return |import )|^W\d{4} |^\s*$|\[Gloo\]|^Using .* cache|^Time to load"
    r"|^Emitting ninja|^ninja|^\[W\d{4} "
)
_TAIL_LINES = 25
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""A stage starts a world of its own: what an outer launcher, or this process, left in the environment is not its."""


def launcher_command(program: Sequence[str], run_dir: Path, launch: LaunchConfig) -> list[str]:
    """DeepSpeed's command line for a program (module and its words) that uses all processes.

    On a machine with accelerators no count is passed unless one is set, so that a visible-devices setting is
    honoured; on CPUs DeepSpeed's launcher of one node is started as it is. Several nodes: those of `launch.hostfile`
    are reached by ssh; with `launch.nodes` each starts its own processes.

    Raises:
        ConfigError: more processes than GPUs are asked for.
        ConfigError, SetupError: a host of the hostfile cannot be worked with.
    """
    port = str(launch.master_port or free_port())
    if launch.hostfile:
        return hosts_command(launch, run_dir.resolve(), port, program)
    check_processes(launch.processes)
    words = ["--module", *program, "--run-dir", str(run_dir.resolve())]
    if launch.nodes == 1 and not has_accelerator():
        # What the runner would start: it finds devices and machines, and here are neither; loading it takes 2 seconds.
        world = json.dumps({"localhost": list(range(process_count(launch)))})
        coded = base64.urlsafe_b64encode(world.encode()).decode()
        node = ["-u", "-m", "deepspeed.launcher.launch", f"--world_info={coded}", f"--master_port={port}"]
        return [sys.executable, *node, *words]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port]
    if launch.nodes > 1:
        command += node_arguments(launch, run_dir)
    else:  # where none is named, DeepSpeed would obey a /job/hostfile
        command += ["--hostfile", f"{os.devnull}/none"]
    visible = visible_devices()
    if launch.nodes == 1 and launch.processes and visible:  # a count would make DeepSpeed forget what is visible
        command += ["--include", f"localhost:{','.join(visible[: launch.processes])}"]
    elif launch.nodes == 1 and launch.processes:
        command += ["--num_accelerators", str(process_count(launch))]
    return [*command, *words]


def launcher_environment(launch: LaunchConfig) -> dict[str, str]:
    """Variables for the ranks: what their lifeline has to know; the threads of each on a CPU-only machine."""
    told = {WARNING: launch.warning_signal, GRACE: str(launch.grace_seconds)}
    processes = world_processes(launch)
    if processes is None or launch.hostfile:  # each host has cores of its own (distributed/remote)
        return told
    return {**told, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) * launch.nodes // processes))}


def process_count(launch: LaunchConfig) -> int:
    """Processes per node on a machine without accelerators (or as configured)."""
    return launch.processes or min(2, os.cpu_count() or 1)


def world_processes(launch: LaunchConfig) -> int | None:
    """Processes of a stage, on all nodes; None where only the launcher will know."""
    if launch.hostfile:
        return sum(read_hosts(launch).values())
    if launch.processes or not has_accelerator():
        return launch.nodes * process_count(launch)
    visible = visible_devices()
    return len(visible) if visible else len(accelerator_memory()) or None


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


def run_world_stage(stage: str, program: Sequence[str], run_dir: Path, launch: LaunchConfig) -> int:
    """Run a stage in the processes that `launch` describes; start it again after a crash as often as that allows.

    An error with a message for the user is no crash: the next attempt would end in it too.
    """
    for left in reversed(range(launch.restarts + 1)):
        command = launcher_command(program, run_dir, launch)
        log = run_dir / "logs" / log_name(stage, launch)
        code = run_stage(command, log, run_dir, stage, launcher_environment(launch), in_world=True)
        first = next(iter(ranks.failures(run_dir)), None)
        if code != EXIT_FAILED or not left or (first is not None and first.kind == "error"):
            return code
        print(f"\nstarting {stage} again from what is saved; {left - 1} restarts left", file=sys.stderr, flush=True)
    raise AssertionError("launch.restarts is not negative")


def run_stage(
    command: list[str], log: Path, run_dir: Path, stage: str, environment: Mapping[str, str] | None = None,
    in_world: bool = False,
) -> int:
    """Run a stage's process group; show its lines without the libraries' chatter; return our exit code.

    The whole output goes to `log`. The first signal asks the stage to stop; SIGINT once more ends its process group.

    Args:
        in_world: the stage works in several processes, which answer to a stop request.
    """
    file = _open_log(log, run_dir)
    paths = RunPaths(run_dir)
    if in_world:
        ranks.wait_for_orphans(run_dir, float((environment or {}).get(GRACE, 0)) + ranks.LEAVING_SECONDS)
        ranks.clear(run_dir)
        update_status(paths, stage, "starting")
    paths.stop_request.unlink(missing_ok=True)
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    env |= {"PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    env |= {**(environment or {}), "PYTHONPATH": _python_path(), PARENT: str(os.getpid())}
    caught = stop_signals(env.get(WARNING))
    with file:
        _append(file, f"$ {one_line(' '.join(command))}\n")
        with _kept_from_children(caught if in_world else []):
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
            restore = _catch_signals(caught, process, paths, stage, in_world, asked)
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        try:
            assert process.stdout is not None
            for said in process.stdout:  # ends when the last process of the stage has ended
                line = printable(said)
                _append(file, line)
                tail.append(line)
                _show(line)
            code = process.wait()
        finally:
            restore()
            _end_group(process)
    return _exit_code(code, asked, run_dir, stage, in_world, tail, log)


def _exit_code(
    code: int, asked: list[int], run_dir: Path, stage: str, in_world: bool, tail: deque[str], log: Path
) -> int:
    """Ours, from what the processes left behind: DeepSpeed's launcher can hide the first failure, and any failure.

    A failure outranks a stop: taken for one, it would be started again for ever.
    """
    ended = asked.count(signal.SIGINT) > 1  # by us, at once
    if in_world and code != EXIT_OK and not ended:
        ranks.record_lost(run_dir)
    failed = ranks.failures(run_dir) if in_world else []
    state = read_status(RunPaths(run_dir)).get(stage, {}).get("state") if in_world else None
    ended = ended or (not in_world and code == -signal.SIGTERM)  # before it could answer
    stopped = code == EXIT_STOPPED or state == "stopped" or (bool(asked) and (code == EXIT_OK or ended))
    if stopped and not failed:
        return EXIT_STOPPED
    if not failed and in_world and code == EXIT_OK and state == "starting":  # there was nothing to do
        update_status(RunPaths(run_dir), stage, "done")
    if not failed and in_world and state == "done":  # the launcher may have been killed, the stage was not
        return EXIT_OK
    if not failed and code in (EXIT_OK, EXIT_USER):
        return code
    cause = failed[0].message if failed else f"exit code {code}{_signal_name(code)}"
    if in_world:
        with contextlib.suppress(OSError, DiskFull):
            update_status(RunPaths(run_dir), stage, "failed", cause)
    if failed and failed[0].exit_code != EXIT_FAILED:
        if failed[0].rank != 0:  # the main process has said its own
            print(cause, file=sys.stderr, flush=True)
        return failed[0].exit_code
    print(f"\n{stage} failed: {cause}\nThe last lines of {log}:\n{''.join(tail)}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def _signal_name(code: int) -> str:
    """What a shell's or Popen's code says about a signal; the launcher passes -9 on as 247."""
    with contextlib.suppress(ValueError):
        return f", {signal.Signals(-code if code < 0 else 256 - code).name}"
    return ""


@contextmanager
def _kept_from_children(signals: list[signal.Signals]) -> Iterator[None]:
    """Processes started meanwhile are born with these signals blocked; a rank opens itself to them (lifeline).

    The launcher never does: a signal sent to the whole process group reaches the ranks alone.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _catch_signals(
    signals: list[signal.Signals], process: subprocess.Popen[str], paths: RunPaths, stage: str, in_world: bool,
    asked: list[int],
) -> Callable[[], None]:
    """Install the handlers, which note signals in `asked`; returns the function that puts the old ones back."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def handler(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if asked.count(signal.SIGINT) > 1:  # a person at the keyboard; a scheduler may warn and terminate
            _end_group(process)
        elif len(asked) > 1:
            return
        elif in_world:
            with contextlib.suppress(OSError, DiskFull):
                write_json(paths.stop_request, {"signal": signal.Signals(number).name})
            _tell("stopping at the next boundary; everything is saved. Ctrl-C once more ends at once.")
        else:
            process.send_signal(signal.SIGTERM)
            _tell(f"ending {stage}; the same command continues.")

    before = {number: signal.signal(number, handler) for number in signals}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    return restore


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())  # in a signal handler: print may be at work already


def _end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _open_log(log: Path, run_dir: Path) -> IO[bytes]:
    """The log, to append to: neither it nor the folders of what we write about processes lead out of the run folder."""
    for folder in (log.parent, ranks.ranks_folder(run_dir)):
        if folder.is_symlink():
            what = f"is a symbolic link to {os.readlink(folder)}"
            raise RunFolderError(str(folder), None, what, "Remove it, or use another folder.")
    with full_disk_named(run_dir):
        log.parent.mkdir(parents=True, exist_ok=True)
        return open_append(log)


def _append(log: IO[bytes], line: str) -> None:
    """Add a line to the log; on a full disk the log ends early, the stage does not."""
    with contextlib.suppress(OSError):
        log.write(line.encode("utf-8"))


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
