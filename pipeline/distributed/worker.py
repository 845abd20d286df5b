"""What every stage's own process does at its edges: signals, status, exit code."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.distributed import ranks
from pipeline.distributed.lifeline import Lifeline, lifeline
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, LoradropError, file_fault
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
    with contextlib.ExitStack() as stack:
        try:
            line = stack.enter_context(lifeline(name, run_dir, in_world))
        except LoradropError as error:  # another process works here: nothing of it is touched
            say(str(error), rank == 0)
            return error.exit_code
        try:
            work(run_dir)
            if not in_world:  # where several work, the main one says so before they part
                update_status(RunPaths(run_dir), name, "done")
            return EXIT_OK
        except Exception as error:
            line.settle()
            if (failure := _failure(error, rank, line)) is None:
                return EXIT_STOPPED
        if in_world:
            ranks.record_failure(run_dir, failure)
            if failure.kind == "crash":
                time.sleep(_DYING_SECONDS)
                ranks.record_lost(run_dir, but=rank)  # a peer that was killed is the cause of what we fail with
        if rank == 0:
            with contextlib.suppress(OSError, LoradropError):  # where the disk still takes it
                update_status(RunPaths(run_dir), name, "failed", failure.message)
        return failure.exit_code


def _failure(error: Exception, rank: int, line: Lifeline) -> ranks.Failure | None:
    """What an exception says, shown to the user; None where it is a stop, of this process or of a peer in set-up."""
    if isinstance(error, OSError):
        error = file_fault(error) or error
    if isinstance(error, LoradropError):
        say(str(error), rank == 0)
        if error.exit_code == EXIT_STOPPED:
            return None
        return ranks.Failure.of_this_process(rank, "error", str(error), error.exit_code)
    traceback.print_exc()
    if line.peer_stopped():
        line.say_stopped()
        return None
    message = f"{type(error).__name__}: {error} ({_place(error)})"
    return ranks.Failure.of_this_process(rank, "crash", message, EXIT_FAILED)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
