"""What every stage's own process does at its edges: arguments, status, exit code."""

from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, LoradropError
from pipeline.runs import RunPaths, update_status
from pipeline.tracking import say


def stage_main(name: str, work: Callable[[Path], object], argv: list[str] | None = None) -> int:
    """Run `work(run_dir)`; errors become a status entry, one message on the main process, and an exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m pipeline.{name}")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the DeepSpeed launcher")
    run_dir = parser.parse_args(argv).run_dir
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        work(run_dir)
    except LoradropError as error:
        say(str(error), is_main)
        if is_main and error.exit_code != EXIT_STOPPED:
            update_status(RunPaths(run_dir), name, "failed", str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if is_main:
            update_status(RunPaths(run_dir), name, "failed", f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    return 0

