"""One of two processes: they disagree about their inputs, then the second one's model breaks in the middle of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import pipeline.stages.train
from pipeline.config import load_config
from pipeline.data.encode import Encoded
from pipeline.distributed.world import leave_world, start_world
from pipeline.errors import LoradropError
from pipeline.support.tiny import tiny_llama
from pipeline.training.guards import NotFinite, require_same_inputs


def disagreements(process_rank: int) -> list[str]:
    """What is said where one input at a time differs."""
    said = []
    for odd in ("rows", "tokens", "weights"):
        mine = odd if process_rank else ""
        example = Encoded("a", (1, 2 + (mine == "tokens")), (-100, 2))
        model = tiny_llama(seed=int(mine == "weights"))
        try:
            require_same_inputs(f"fingerprint{mine == 'rows'}", [example], model)
        except LoradropError as error:
            said.append(str(error))
    return said


def main(run_dir: Path, settings: list[str]) -> None:
    """Print what each part says, one line per finding."""
    world = start_world()
    torch.set_num_threads(1)
    require_same_inputs("equal", [Encoded("a", (1, 2), (-100, 2))], tiny_llama())
    for line in disagreements(world.process_rank):
        print(f"SAID {line}", flush=True)
    attach, models = pipeline.stages.train.attach_adapter, []

    def remember(*arguments: object) -> object:
        models.append(attach(*arguments))
        return models[-1]

    def break_down(row: dict[str, float]) -> None:
        if world.process_rank == 1:
            models[-1].model.get_submodule("model.layers.1.input_layernorm").weight.data[3] = torch.inf

    pipeline.stages.train.attach_adapter = remember
    try:
        pipeline.stages.train.train_run(load_config(None, settings), run_dir, break_down)
    except NotFinite as error:
        print(f"SAID {error}", flush=True)
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
