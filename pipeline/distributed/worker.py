"""What every stage's own process does at its edges: arguments, signals, status, exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.distributed import ranks
from pipeline.distributed.lifeline import lifeline
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, LoradropError
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.terminal import say

_DYING_SECONDS = 0.5
"""A killed process closes its connections, which fails its peers, some time before it is seen to be dead."""


def stage_main(name: str, work: Callable[[Path], object], argv: list[str] | None = None) -> int:
    """Run `work(run_dir)`; errors become a status entry, one message on the main process, and an exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the DeepSpeed launcher")
    run_dir = parser.parse_args(argv).run_dir
    rank = int(os.environ.get("RANK", "0"))
    try:
        with lifeline(name, run_dir):
            work(run_dir)
    except LoradropError as error:
        say(str(error), rank == 0)
        if error.exit_code != EXIT_STOPPED:
            _record(name, run_dir, rank, ranks.Failure.of_this_process(rank, "error", str(error), error.exit_code))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error} ({_place(error)})"
        _record(name, run_dir, rank, ranks.Failure.of_this_process(rank, "crash", message, EXIT_FAILED))
        return EXIT_FAILED
    return 0


def _record(name: str, run_dir: Path, rank: int, failure: ranks.Failure) -> None:
    """Failure and status on disk, where the disk still takes them."""
    if name in ranks.WORLD_STAGES:
        if failure.kind == "crash":
            time.sleep(_DYING_SECONDS)
            ranks.record_lost(run_dir, but=rank)  # a peer that was killed is the cause of what we fail with
        ranks.record_failure(run_dir, failure)
    if rank == 0:
        with contextlib.suppress(OSError, LoradropError):
            update_status(RunPaths(run_dir), name, "failed", failure.message)


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "unknown place"
