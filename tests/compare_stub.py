"""`python compare_stub.py STOP_AT ARGUMENT…`: the command line with every stage in this one process.

What is imported once serves all trainings, and DeepSpeed's process groups live as long as the process. The training
number STOP_AT finds a stop request when it starts. Prints `trained NAME` for every training that starts.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import torch

from pipeline import distributed, runner
from pipeline.cli import main
from pipeline.launch import free_port
from pipeline.runs import RunPaths, write_json
from pipeline.stage import stage_main

stop_at, arguments = int(sys.argv[1]), sys.argv[2:]
started = 0


def run_stage(command: list[str], log: Path, run_dir: Path, stage: str, environment: object = None) -> int:
    global started
    module = importlib.import_module("pipeline.report.__main__" if stage == "report" else f"pipeline.{stage}")
    module.stop = lambda: None  # type: ignore[attr-defined]
    if stage == "train":
        started += 1
        print("trained", run_dir.name)
        if started == stop_at:
            write_json(RunPaths(run_dir).stop_request, {"signal": "SIGINT"})
    work = {"train": "train_stage", "evaluate": "evaluate_run", "report": "_report", "method_check": "check_methods"}
    return stage_main(stage, getattr(module, work[stage]), ["--run-dir", str(run_dir)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    distributed.stop = lambda: None
    runner.run_stage = run_stage
    raise SystemExit(main(arguments))
