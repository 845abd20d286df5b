"""One of two processes: short runs under several DeepSpeed files; the first writes down what each step has sent."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm import comms_logger

import pipeline.stages.train
from pipeline.config import load_config
from pipeline.distributed.world import leave_world, start_world
from pipeline.files import write_json


def listen() -> list[dict[str, Any]]:
    """A list that gets an entry per training step: DeepSpeed's counters, {call: {bytes: calls}}, and, beside them, the
    bytes of torch's own all-reduces, which are in float64."""
    steps: list[dict[str, Any]] = []
    ours: list[int] = []
    comms_logger.enabled = comms_logger.prof_all = True
    train_step, all_reduce = pipeline.stages.train.train_step, torch.distributed.all_reduce

    def counted_step(*arguments: Any) -> Any:
        comms_logger.reset_data()
        ours.clear()
        ended = train_step(*arguments)
        counted = {
            call: {size: entry[0] for size, entry in sizes.items()} for call, sizes in comms_logger.comms_dict.items()
        }
        steps.append({"deepspeed": counted, "ours": sorted(ours)})
        return ended

    def counted_reduce(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        if not sys._getframe(1).f_globals["__name__"].startswith("deepspeed"):
            ours.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **more)

    pipeline.stages.train.train_step = counted_step
    torch.distributed.all_reduce = counted_reduce
    return steps


def main(folder: Path) -> None:
    """Train each of runs.json, {name: settings}, into a folder of its name; write NAME.json."""
    world = start_world()
    torch.set_num_threads(1)
    steps = listen()
    for name, settings in json.loads((folder / "runs.json").read_text()).items():
        steps.clear()
        pipeline.stages.train.train_run(load_config(None, settings), folder / name)
        if world.is_main:
            write_json(folder / f"{name}.json", steps)
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
