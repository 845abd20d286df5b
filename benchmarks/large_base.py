"""A large base through the whole trainer: steps, a stop on a signal, a resume; tokens/s and peak memory.

    PYTHONPATH=. python benchmarks/large_base.py                          # 8B-shaped random model in NF4, for a GPU
    PYTHONPATH=. python benchmarks/large_base.py --layers 2 --width 64    # the same line on any machine, in minutes

For every DeepSpeed file named: one run without interruption, and one that gets SIGTERM after its second step and is
started again. Both must end with the same losses (on CPU also with the same adapter bytes).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory_plan import EIGHT_BILLION, write_random_model
from pipeline.files import ADAPTER_WEIGHTS, read_json_lines, sha256_file
from pipeline.run_folder.paths import RunPaths

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 75


def write_rows(path: Path, rows: int, tokens: int, vocabulary: int) -> Path:
    """Rows of random words whose last 8 are supervised."""
    chance = random.Random(0)
    with path.open("w") as file:
        for _ in range(rows):
            words = [f"w{chance.randrange(3, vocabulary)}" for _ in range(tokens)]
            file.write(json.dumps({"prompt": " ".join(words[:-8]), "completion": " " + " ".join(words[-8:])}) + "\n")
    return path


def start(run_dir: Path, settings: list[str]) -> subprocess.Popen[bytes]:
    """`loradrop train` as a user starts it."""
    command = [sys.executable, "-m", "pipeline.cli", "train", "--run-dir", str(run_dir), *settings]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl that belong to training steps."""
    return [row for row in read_json_lines(RunPaths(run_dir).metrics) if row["kind"] == "train"]


def stop_and_resume(run_dir: Path, settings: list[str]) -> None:
    """SIGTERM after the second step, then the same command again."""
    process = start(run_dir, settings)
    while process.poll() is None and len(steps_of(run_dir)) < 2:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    if code != STOPPED:
        raise SystemExit(f"{run_dir}: exit code {code} after SIGTERM, not {STOPPED}")
    if code := start(run_dir, settings).wait():
        raise SystemExit(f"{run_dir}: exit code {code} after the resume")


def compare(folder: Path, name: str, settings: list[str]) -> str:
    """One line of the table."""
    whole, broken = folder / f"{name}-whole", folder / f"{name}-broken"
    settings = [*settings, f"train.deepspeed={name}"]
    if code := start(whole, settings).wait():
        raise SystemExit(f"{whole}: exit code {code}")
    stop_and_resume(broken, settings)
    steps = steps_of(whole)
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, steps_of(broken), strict=True))
    same = sha256_file(whole / "adapter" / ADAPTER_WEIGHTS) == sha256_file(broken / "adapter" / ADAPTER_WEIGHTS)
    speed, last = statistics.median(row["tokens_per_second"] for row in steps[1:]), steps[-1]
    return (
        f"{name:14}{len(steps):>6}{speed:>12.0f}{last['memory_gib']:>12.2f}{last['mfu'] or float('nan'):>8.3f}"
        f"{gap:>14.2e}   {'same bytes' if same else 'other bytes'}"
    )


def main() -> int:
    """Write the model and the rows, run every file, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=EIGHT_BILLION["num_hidden_layers"])
    parser.add_argument("--width", type=int, default=EIGHT_BILLION["hidden_size"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--file", action="append", help="DeepSpeed file (default: zero2 and zero3)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    scale = given.width / EIGHT_BILLION["hidden_size"]
    shape = {**EIGHT_BILLION, "num_hidden_layers": given.layers, "hidden_size": given.width}
    shape["intermediate_size"] = int(EIGHT_BILLION["intermediate_size"] * scale)
    if scale < 1:
        shape |= {"vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = write_random_model(folder / "model", shape)
        rows = write_rows(folder / "rows.jsonl", 120, given.tokens, shape["vocab_size"])
        settings = [
            f"model.path={model}", f"data.path={rows}", "data.train_rows=64", "data.validation_rows=8",
            "data.calibration_rows=8", "data.test_rows=8", f"data.max_tokens={given.tokens + 8}",
            f"train.max_steps={given.steps}", "train.global_batch=8", "train.micro_batch=4", "launch.processes=1",
            "train.validate_every_steps=100", "train.checkpoint_every_steps=100",
            "train.activation_checkpointing=true", *given.overrides,
        ]  # fmt: skip
        lines = [compare(folder, name, settings) for name in given.file or ["zero2", "zero3"]]
    print(f"{'file':14}{'steps':>6}{'tokens/s':>12}{'peak GiB':>12}{'MFU':>8}{'resumed: loss':>14}   adapter")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
