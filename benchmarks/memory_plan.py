"""The memory plan of --dry-run beside what is measured: one line per cell, one thing varied at a time.

    PYTHONPATH=. python benchmarks/memory_plan.py                        # SmolLM2-135M in NF4; a quarter of an hour
    PYTHONPATH=. python benchmarks/memory_plan.py model.path=/models/x   # another base
    PYTHONPATH=. python benchmarks/memory_plan.py --random-8b            # an 8B-shaped random model, for a GPU

    PYTHONPATH=. python benchmarks/memory_plan.py --heap                 # rows of varying length, two processes, holes

Measured is a process of its own that imports everything, loads the base, attaches the adapter and takes two training
steps on rows of the given length: on CPU the high-water mark of its resident memory (Linux), imports included, on a GPU
torch's peak of allocated memory. On CPU, glibc's malloc is held to a small, fixed mmap threshold (`ENVIRONMENT`), so
that the heap has no holes and what is really held can be seen. With `--heap` it is as a user has it, for five steps, in
one process or two (the larger is shown); ratios then only have to be at least 1: the plan says the most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = {"batch": 4, "tokens": 64, "rank": 8, "checkpointing": False, "processes": 1, "varying": False, "steps": 2}
"""Examples per micro-batch and process, tokens per example."""
VARIED: dict[str, Sequence[Any]] = {
    "batch": (1, 8, 16), "tokens": (16, 128, 256), "rank": (64, 256), "checkpointing": (True,),
}
HEAP = [
    {**BASE, "batch": 8, "tokens": 128, "steps": 5, "processes": processes, "varying": varying}
    for processes in (1, 2) for varying in (False, True)
]
SUPERVISED = 4
"""Supervised tokens per example."""
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
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
        f"train.micro_batch={cell['batch']}", f"train.global_batch={cell['batch'] * cell['processes']}",
        f"adapter.rank={cell['rank']}", f"train.activation_checkpointing={str(cell['checkpointing']).lower()}",
        f"launch.processes={cell['processes']}", *overrides,
    ]


def import_everything() -> None:
    """What every training process imports."""
    import bitsandbytes  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.integrations.bitsandbytes
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pipeline.plan.memory
    import pipeline.stages.train  # noqa: F401


def measure(cell: dict[str, Any], settings: list[str]) -> dict[str, float]:
    """Load, attach, step. Bytes after loading and at the most."""
    import torch

    from pipeline.config import load_config
    from pipeline.distributed.devices import resident_high_water
    from pipeline.distributed.world import start_world
    from pipeline.model.load import load_base

    import_everything()
    config = load_config(None, settings)
    world = start_world()

    def high() -> int:
        on_device = world.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if on_device else resident_high_water()

    base = load_base(config.model, world.device)
    loaded = high()
    _steps(config, *_engine(config, world, base), base.tokenizer, cell)
    return {"loaded": loaded, "peak": high()}


def _engine(config: Any, world: Any, base: Any) -> tuple[Any, Any]:
    from pipeline.adapters.build import attach_adapter
    from pipeline.loss.consistency import TrainingObjective
    from pipeline.loss.objective import SupervisedLM
    from pipeline.model.load import compute_dtype
    from pipeline.training.engine import build_engine, micro_steps_of

    adapters = attach_adapter(config.adapter, base, config.train.max_steps, config.train.seed)
    objective = TrainingObjective(SupervisedLM(base.model), adapters.axis)
    dtype = compute_dtype(config.model, world.device)
    return build_engine(config.train, adapters, objective, micro_steps_of(config.train, world), dtype), adapters


def _steps(config: Any, engine: Any, adapters: Any, tokenizer: Any, cell: dict[str, Any]) -> None:
    from pipeline.adapters.layout import training_layout
    from pipeline.adapters.members import MaskKey
    from pipeline.data.encode import IGNORE_INDEX, Encoded
    from pipeline.training.batch import lay_out
    from pipeline.training.engine import DeepSpeedSlot, trained_parameters

    slot = DeepSpeedSlot(engine, trained_parameters(adapters))
    train, chance, tokens = config.train, random.Random(0), cell["tokens"]
    for step in range(cell["steps"]):
        examples = []
        for i in range(train.micro_batch):
            longest = tokens - i % 2
            length = chance.randint(tokens // 4, longest) if cell["varying"] and (i or step != 2) else longest
            ids = tuple(chance.randrange(3, tokenizer.vocab_size) for _ in range(length))
            labels = (IGNORE_INDEX,) * (len(ids) - SUPERVISED) + ids[-SUPERVISED:]
            examples.append(Encoded(f"{step}.{i}", ids, labels))
        layout = training_layout(range(train.micro_batch), train.draws, train.draw_layout, True)
        rows = lay_out(adapters, examples, layout, tokenizer.pad_token_id, MaskKey(0, step))
        with adapters.axis.active(rows.plan):
            engine.backward(engine(**rows.inputs)[0].sum())
        engine.step([slot])


def planned(cell: dict[str, Any], settings: list[str]) -> dict[str, float]:
    """What the plan says for the same."""
    from pipeline.config import load_config
    from pipeline.plan.memory import Batch, plan_memory

    config = load_config(None, settings)
    batch = Batch(cell["tokens"], SUPERVISED)
    plan = plan_memory(config.model, config.adapter, config.train, cell["processes"], batch)
    return {"loaded": plan.load_peak, "peak": plan.peak}


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_children(
    part: str, cell: dict[str, Any], settings: Sequence[str], environment: Mapping[str, str]
) -> dict[str, float]:
    """Run this file in processes of their own; the last line of each is its answer, and the larger numbers count."""
    command = [sys.executable, __file__, part, json.dumps(cell), *settings]
    together: dict[str, str] = {}
    if part == "--measure":
        together = {"WORLD_SIZE": str(cell["processes"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = range(cell["processes"] if together else 1)
    started = []
    for rank in ranks:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if together else {}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment, **together, **own}
        started.append(subprocess.Popen(command, env=variables, stdout=-1, stderr=-1, text=True))
    answers = []
    for process in started:
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{err[-4000:]}")
        answers.append(json.loads(out.strip().splitlines()[-1]))
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def write_random_model(folder: Path, description: dict[str, Any], device: Any = "cpu") -> Path:
    """A model folder of this shape with random bfloat16 weights, and a tokenizer of the words w0, w1, …

    Args:
        device: what draws the weights; 8 billion take a GPU a moment and a CPU minutes.
    """
    import torch

    from pipeline.support.tiny import random_model, word_tokenizer

    with torch.device(device):
        model = random_model(description, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="2GB")
    words = [f"w{number}" for number in range(description["vocab_size"])]
    word_tokenizer(words, unk_token="w0", pad_token="w2", eos_token="w2").save_pretrained(folder)
    return folder


def compare(chosen: Sequence[dict[str, Any]], overrides: Sequence[str], heap: bool) -> bool:
    """Print the table; whether every cell is within 15 %, with holes in the heap not below what is measured."""
    print(f"{'batch':>6}{'tokens':>8}{'rank':>6}  {'checkpointing':14}{'processes':>10}  {'lengths':8}{'measured':>10}"
          f"{'planned':>10}{'ratio':>8}   loading: measured, planned", flush=True)
    good, environment = True, {} if heap else ENVIRONMENT
    for cell in chosen:
        settings = settings_of(cell, overrides)
        found, plan = (in_children(part, cell, settings, environment) for part in ("--measure", "--plan"))
        ratio = plan["peak"] / found["peak"]
        good &= ratio >= 1 if heap else abs(ratio - 1) <= 0.15
        mib = {name: {key: value / 2**20 for key, value in side.items()} for name, side in
               (("found", found), ("plan", plan))}
        print(
            f"{cell['batch']:>6}{cell['tokens']:>8}{cell['rank']:>6}  {'on' if cell['checkpointing'] else 'off':14}"
            f"{cell['processes']:>10}  {'vary' if cell['varying'] else 'equal':8}"
            f"{mib['found']['peak']:>10.0f}{mib['plan']['peak']:>10.0f}{ratio:>8.2f}"
            f"   {mib['found']['loaded']:.0f}, {mib['plan']['loaded']:.0f}", flush=True,
        )
    wanted = "at least 1" if heap else "within 0.15 of 1"
    print(f"MiB; every ratio {wanted}" if good else f"MiB; NOT EVERY RATIO IS {wanted.upper()}")
    return good


def main() -> int:
    """Compare, or answer as the process of one cell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--measure", metavar="CELL", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--plan", metavar="CELL", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--random-8b", action="store_true", help="an 8B-shaped random model instead")
    parser.add_argument("--heap", action="store_true", help="as a user has it: holes in the heap; two processes, too")
    parser.add_argument("--cell", type=int, action="append", help="only this line of the table, counted from 0")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    for work, cell in ((measure, arguments.measure), (planned, arguments.plan)):
        if cell is not None:
            print(json.dumps(work(cell, arguments.overrides)))
            return 0
    every = HEAP if arguments.heap else cells()
    chosen = [every[index] for index in arguments.cell] if arguments.cell else every
    if arguments.random_8b:
        import torch

        with tempfile.TemporaryDirectory() as folder:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            path = write_random_model(Path(folder), EIGHT_BILLION, device)
            return int(not compare(chosen, [f"model.path={path}", *arguments.overrides], arguments.heap))
    return int(not compare(chosen, arguments.overrides, arguments.heap))


if __name__ == "__main__":
    raise SystemExit(main())
