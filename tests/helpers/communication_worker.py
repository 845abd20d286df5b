"""One of two processes: short runs under several DeepSpeed files; the first writes down what their third steps sent."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.comm import comms_logger

import pipeline.stages.train
from pipeline.config import load_config
from pipeline.distributed.world import leave_world, start_world
from pipeline.files import write_json
from pipeline.training.loop import Lane

COUNTED = 3
"""In the first two, tensors are asked for their gradients, and ZeRO-3 learns the order of modules."""


class Enough(Exception):
    """Of a run."""


def listen() -> dict[str, Any]:
    """Filled by the step that counts: DeepSpeed's counters, {call: bytes}, and beside them torch's own all-reduces."""
    found: dict[str, Any] = {}
    ours: list[int] = []
    comms_logger.enabled = comms_logger.prof_all = True
    train_step, all_reduce = pipeline.stages.train.train_step, torch.distributed.all_reduce

    def counted_step(engine: Any, lanes: Sequence[Lane]) -> Any:
        comms_logger.reset_data()
        ours.clear()
        ended = train_step(engine, lanes)
        if not ended and lanes[0].run.counters.step == COUNTED:
            found["ours"] = sorted(ours)
            found["deepspeed"] = {
                call: sum(size * entry[0] for size, entry in sizes.items())
                for call, sizes in comms_logger.comms_dict.items()
            }
            lanes[0].run.save()  # and it can be saved
            raise Enough
        return ended

    def counted_reduce(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        if not sys._getframe(1).f_globals["__name__"].startswith("deepspeed"):
            ours.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **more)

    pipeline.stages.train.train_step = counted_step
    torch.distributed.all_reduce = counted_reduce
    return found


def main(folder: Path) -> None:
    """Train each of runs.json, {name: settings}, in a folder of its name; write counted.json, {name: bytes}."""
    world = start_world()
    torch.set_num_threads(1)
    found, counted = listen(), {}
    for name, settings in json.loads((folder / "runs.json").read_text()).items():
        with contextlib.suppress(Enough):
            pipeline.stages.train.train_run(load_config(None, settings), folder / name)
        counted[name] = dict(found)
    if world.is_main:
        write_json(folder / "counted.json", counted)
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
