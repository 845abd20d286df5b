"""`python compare_stub.py STOP_AT ARGUMENT…`: the command line with every stage in this one process.

What is imported once serves all trainings, and DeepSpeed's process groups live as long as the process. The training
number STOP_AT is asked to stop in its second step; 1 is the pack, all of whose runs are. Prints `trained NAME` for
every training that starts, `trained NAME-compare` for a pack.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.cli import main
from pipeline.distributed.launcher import free_port
from pipeline.distributed.worker import stage_main
from pipeline.files import write_json
from pipeline.run_folder.metrics import Metrics
from pipeline.run_folder.paths import RunPaths
from pipeline.stages import processes
from pipeline.stages.table import STAGES

stop_at, arguments = int(sys.argv[1]), sys.argv[2:]
started, original = 0, Metrics.write


def write_metrics(metrics: Metrics, kind: str, **values: Any) -> None:
    if started == stop_at and kind == "train" and values["step"] == 2:
        write_json(RunPaths(metrics._path.parent).stop_request, {"signal": "SIGINT"})
    original(metrics, kind, **values)


def work(name: str, run_dir: Path) -> int:
    global started
    stage = STAGES[name]
    function = stage.load()
    if hasattr(module := sys.modules[function.__module__], "leave_world"):
        module.leave_world = lambda: None
    if name in ("train", "pack"):
        started += 1
        print("trained", run_dir.name)
    return stage_main(name, function, run_dir, in_world=stage.processes == "all")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # a pack has as many processes as threads at the most: this one
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    Metrics.write = write_metrics  # type: ignore[method-assign]
    processes.run_world_stage = lambda stage, program, run_dir, launch: work(stage, run_dir)
    processes.run_stage = lambda command, log, run_dir, stage: work(stage, run_dir)
    raise SystemExit(main(arguments))
