"""Peak memory of a process that trains a pack of 8 runs, against one run: base, imports, AdamW's moments and all."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkout import ROOT, Checkout, CommandFailed
from benchmarks.setting import SCALES, Setting
from benchmarks.table import Row
from benchmarks.timing import Spread

RUNS, ROWS, TOKENS, STEPS = 8, 2, 32, 2


def rows(setting: Setting) -> Iterator[Row]:
    """In the first dtype of the device: memory hardly depends on it."""
    pairs = [tuple(_peak(setting, runs) for runs in (RUNS, 1)) for _ in range(setting.commands)]
    mib = [Spread.of([pair[side] for pair in pairs]).median / 2**20 for side in (0, 1)]
    yield Row(
        "pack-memory", f"memory of a pack of {RUNS} runs of {ROWS} × {TOKENS}", "one run",
        Spread.of([pack / one for pack, one in pairs]), target="memory of a pack",
        note=f"{mib[0]:,.0f} and {mib[1]:,.0f} MiB",
    )


def _peak(setting: Setting, runs: int) -> int:
    """Bytes of a process that trains `runs` runs."""
    words = ["--device", setting.device, str(runs), *setting.overrides]
    command = [sys.executable, "-m", "benchmarks.cases.pack_memory", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise CommandFailed(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return int(json.loads(ended.stdout.splitlines()[-1]))


def train(setting: Setting, runs: int) -> int:
    """Two steps of AdamW over all runs in this process; bytes at the most."""
    import torch

    from benchmarks.passes import KEY, our_adapters, packed_layout, random_examples
    from pipeline.distributed.devices import resident_high_water
    from pipeline.loss.objective import SupervisedLM
    from pipeline.training.batch import lay_out

    adapters = our_adapters(setting, setting.dtypes[0], runs, longest=TOKENS)
    trained = [parameter for parameter in adapters.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    examples = random_examples(adapters.model, runs * ROWS, TOKENS)
    for _ in range(STEPS):
        batch = lay_out(adapters, examples, packed_layout(runs, ROWS), 0, KEY)
        with adapters.axis.active(batch.plan):
            SupervisedLM(adapters.model)(**batch.model_tensors, row_weights=batch.weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated() if setting.device.startswith("cuda") else resident_high_water()


def main() -> None:
    """Print the peak of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    setting = Setting(
        SCALES["small"], Path(), Checkout(ROOT, "here"), device=given.device, overrides=tuple(given.overrides)
    )
    print(json.dumps(train(setting, given.runs)))


if __name__ == "__main__":
    main()
