"""What every stage's own process does at its edges: signals, status, exit code."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.distributed import ranks
from pipeline.distributed.lifeline import lifeline
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, LoradropError
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.terminal import say

_DYING_SECONDS = 0.5
"""A killed process closes its connections, which fails its peers, some time before it is seen to be dead."""


def stage_main(name: str, work: Callable[[Path], object], run_dir: Path, in_world: bool = False) -> int:
    """Run `work(run_dir)`; errors become a status entry, one message on the main process, and an exit code.

    Args:
        in_world: the stage works in several processes, which watch each other.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        with lifeline(name, run_dir, in_world):
            work(run_dir)
        if not in_world:  # where several work, the main one says so before they part
            update_status(RunPaths(run_dir), name, "done")
        return EXIT_OK
    except LoradropError as error:
        say(str(error), rank == 0)
        if error.exit_code == EXIT_STOPPED:
            return EXIT_STOPPED
        failure = ranks.Failure.of_this_process(rank, "error", str(error), error.exit_code)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error} ({_place(error)})"
        failure = ranks.Failure.of_this_process(rank, "crash", message, EXIT_FAILED)
    if in_world:
        if failure.kind == "crash":
            time.sleep(_DYING_SECONDS)
            ranks.record_lost(run_dir, but=rank)  # a peer that was killed is the cause of what we fail with
        ranks.record_failure(run_dir, failure)
    if rank == 0:
        with contextlib.suppress(OSError, LoradropError):  # where the disk still takes it
            update_status(RunPaths(run_dir), name, "failed", failure.message)
    return failure.exit_code


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
