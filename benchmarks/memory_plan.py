"""The memory plan of --dry-run beside what is measured: one line per cell, one thing varied at a time.

    PYTHONPATH=. python benchmarks/memory_plan.py                        # SmolLM2-135M in NF4; a quarter of an hour
    PYTHONPATH=. python benchmarks/memory_plan.py model.path=/models/x   # another base
    PYTHONPATH=. python benchmarks/memory_plan.py --random-8b            # an 8B-shaped random model, for a GPU

Measured is a process of its own that imports everything, then loads the base, attaches the adapter and takes two
training steps on rows of the given length: on CPU the high-water mark of its resident memory (Linux) less what the
imports took, on a GPU torch's peak of allocated memory. On CPU, glibc's malloc is held to one arena and a fixed mmap
threshold (`ENVIRONMENT`): otherwise freed blocks stay resident.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = {"batch": 4, "tokens": 64, "rank": 8, "checkpointing": False}
"""Examples per micro-batch, tokens per example."""
VARIED: dict[str, Sequence[Any]] = {
    "batch": (1, 8, 16), "tokens": (16, 128, 256), "rank": (64, 256), "checkpointing": (True,),
}
SUPERVISED = 4
"""Supervised tokens per example."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
EIGHT_BILLION = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1,
    "eos_token_id": 2,
}


def cells() -> list[dict[str, Any]]:
    """The base cell, then every other value of one setting at a time."""
    return [BASE] + [{**BASE, name: value} for name, values in VARIED.items() for value in values]


def settings_of(cell: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """The cell as overrides of a configuration."""
    return [
        f"train.micro_batch={cell['batch']}", f"train.global_batch={cell['batch']}",
        f"adapter.rank={cell['rank']}", f"train.activation_checkpointing={str(cell['checkpointing']).lower()}",
        "launch.processes=1", *overrides,
    ]


def import_everything() -> None:
    """What every training process imports; measured is what comes on top."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pipeline.plan.memory
    import pipeline.stages.train  # noqa: F401


def measure(cell: dict[str, Any], settings: list[str]) -> dict[str, float]:
    """Load, attach, two steps. Bytes above the imports, after loading and at the most."""
    import torch

    from pipeline.config import load_config
    from pipeline.distributed.devices import resident_high_water
    from pipeline.distributed.world import start_world
    from pipeline.model.load import load_base

    import_everything()
    imports = resident_high_water()
    config = load_config(None, settings)
    world = start_world()

    def high() -> int:
        on_device = world.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_device else resident_high_water() - imports

    base = load_base(config.model, world.device)
    loaded = high()
    _steps(config, *_engine(config, world, base), base.tokenizer, cell["tokens"])
    return {"loaded": loaded, "peak": high()}


def _engine(config: Any, world: Any, base: Any) -> tuple[Any, Any]:
    from pipeline.adapters.build import attach_adapter
    from pipeline.loss.consistency import TrainingObjective
    from pipeline.loss.objective import SupervisedLM
    from pipeline.model.load import compute_dtype
    from pipeline.training.engine import build_engine, micro_steps_of

    adapters = attach_adapter(config.adapter, base, config.train.max_steps, config.train.seed)
    objective = TrainingObjective(SupervisedLM(base.model), adapters.axis, adapters.specs[0].consistency)
    dtype = compute_dtype(config.model, world.device)
    return build_engine(config.train, adapters, objective, micro_steps_of(config.train, world), dtype), adapters


def _steps(config: Any, engine: Any, adapters: Any, tokenizer: Any, tokens: int) -> None:
    from pipeline.adapters.layout import training_layout
    from pipeline.adapters.members import MaskKey
    from pipeline.data.encode import IGNORE_INDEX, Encoded
    from pipeline.training.batch import lay_out

    train, chance = config.train, random.Random(0)
    for step in range(2):
        for micro in range(train.global_batch // train.micro_batch):
            examples = []
            for i in range(train.micro_batch):
                ids = tuple(chance.randrange(3, tokenizer.vocab_size) for _ in range(tokens - i % 2))
                labels = (IGNORE_INDEX,) * (len(ids) - SUPERVISED) + ids[-SUPERVISED:]
                examples.append(Encoded(f"{step}.{micro}.{i}", ids, labels))
            layout = training_layout(range(train.micro_batch), train.draws, train.draw_layout, True)
            rows = lay_out(adapters, examples, layout, tokenizer.pad_token_id, MaskKey(0, step))
            with adapters.axis.active(rows.plan):
                engine.backward(engine(**rows.inputs)[0])
            engine.step()


def planned(cell: dict[str, Any], settings: list[str]) -> dict[str, float]:
    """What the plan says for the same."""
    from pipeline.config import load_config
    from pipeline.plan.memory import Batch, plan_memory

    config = load_config(None, settings)
    plan = plan_memory(config.model, config.adapter, config.train, 1, Batch(cell["tokens"], SUPERVISED))
    return {"loaded": plan.load_peak, "peak": plan.peak}


def in_child(part: str, cell: dict[str, Any], settings: Sequence[str]) -> dict[str, float]:
    """Run this file in a process of its own; its last line is the answer."""
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, part, json.dumps(cell), *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    answer: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def write_random_model(folder: Path, description: dict[str, Any]) -> Path:
    """A model folder of this shape with random bfloat16 weights, and a tokenizer of the words w0, w1, …"""
    import torch

    from pipeline.support.tiny import random_model, word_tokenizer

    random_model(description, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="2GB")
    words = [f"w{number}" for number in range(description["vocab_size"])]
    word_tokenizer(words, unk_token="w0", pad_token="w2", eos_token="w2").save_pretrained(folder)
    return folder


def compare(chosen: Sequence[dict[str, Any]], overrides: Sequence[str]) -> bool:
    """Print the table; whether every cell is within 15 %."""
    head = f"{'batch':>6}{'tokens':>8}{'rank':>6}  {'checkpointing':14}{'measured':>10}{'planned':>10}{'ratio':>8}"
    print(f"{head}   loading: measured, planned", flush=True)
    good = True
    for cell in chosen:
        settings = settings_of(cell, overrides)
        found, plan = in_child("--measure", cell, settings), in_child("--plan", cell, settings)
        ratio = plan["peak"] / found["peak"]
        good &= abs(ratio - 1) <= 0.15
        mib = {name: {key: value / 2**20 for key, value in side.items()} for name, side in
               (("found", found), ("plan", plan))}
        print(
            f"{cell['batch']:>6}{cell['tokens']:>8}{cell['rank']:>6}  {'on' if cell['checkpointing'] else 'off':14}"
            f"{mib['found']['peak']:>10.0f}{mib['plan']['peak']:>10.0f}{ratio:>8.2f}"
            f"   {mib['found']['loaded']:.0f}, {mib['plan']['loaded']:.0f}", flush=True,
        )
    print("MiB above the imports; every ratio within 0.15 of 1" if good else "MiB above the imports; OUTSIDE 15 %")
    return good


def main() -> int:
    """Compare, or answer as the process of one cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", metavar="CELL", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--plan", metavar="CELL", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--random-8b", action="store_true", help="an 8B-shaped random model instead")
    parser.add_argument("--cell", type=int, action="append", help="only this line of the table, counted from 0")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    for work, cell in ((measure, arguments.measure), (planned, arguments.plan)):
        if cell is not None:
            print(json.dumps(work(cell, arguments.overrides)))
            return 0
    chosen = [cells()[index] for index in arguments.cell] if arguments.cell else cells()
    if arguments.random_8b:
        with tempfile.TemporaryDirectory() as folder:
            path = write_random_model(Path(folder), EIGHT_BILLION)
            return int(not compare(chosen, [f"model.path={path}", *arguments.overrides]))
    return int(not compare(chosen, arguments.overrides))


if __name__ == "__main__":
    raise SystemExit(main())
