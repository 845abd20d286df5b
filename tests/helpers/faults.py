"""Break a tiny run at chosen points, start it again, and compare with the run that nothing broke (`tests/faults.py`).

A stage's process is forked from this one, which has done the imports: a start costs about a second. Every injection
begins in a run folder of its own; after it the stages are started again until they end, without a fault. The bytes of
the adapter, the losses, the validations and the predictions then have to be those of the unbroken run; where it goes on
with other processes or another ZeRO stage, the losses have to be equal within 2e-4.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
for inherited in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(inherited, None)
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")

import numpy as np  # noqa: E402

from pipeline.config import dump_config, load_config  # noqa: E402
from pipeline.distributed import ranks  # noqa: E402
from pipeline.distributed.launcher import free_port  # noqa: E402
from pipeline.files import read_json_lines, sha256_file, write_text  # noqa: E402
from pipeline.run_folder.paths import RunPaths  # noqa: E402
from pipeline.stages.__main__ import main as stage_process  # noqa: E402
from pipeline.training.checkpoint import published_checkpoints  # noqa: E402

SETTINGS = """
data.train_rows=32 data.validation_rows=24 data.calibration_rows=16 data.test_rows=16 data.max_tokens=64
train.max_steps=6 train.global_batch=8 train.micro_batch=4 train.learning_rate=0.01 train.validate_every_steps=2
train.checkpoint_every_steps=3 ensemble.size=2 adapter.rank=4 evaluate.batch_tokens=64 launch.grace_seconds=3
""".split()
COMPARED = ("kind", "step", "loss", "gradient_norm", "learning_rate", "nll", "accuracy")
"""Of metrics.jsonl; what is left out is time and memory."""
HANG_SECONDS = 90.0
Patch = Callable[[], None]


def import_all() -> None:
    """What the processes of a stage import, before they are forked."""
    modules = [f"pipeline.stages.{name}" for name in ("train", "evaluate", "report", "export", "search")]
    libraries = ["deepspeed", "bitsandbytes", "peft", "matplotlib.pyplot", "transformers.models.llama.modeling_llama"]
    for name in (*modules, *libraries):
        importlib.import_module(name)


def at(target: str, nth: int, action: Callable[[], None], when: str = "before") -> Patch:
    """Do `action` before or after the nth call of a function, named as its caller sees it."""

    def patch() -> None:
        module_name, name = target.rsplit(".", 1)
        module = importlib.import_module(module_name)
        original, calls = getattr(module, name), Counter[str]()

        def broken(*args: object, **kwargs: object) -> object:
            calls["n"] += 1
            if when == "before" and calls["n"] == nth:
                action()
            result = original(*args, **kwargs)
            if when == "after" and calls["n"] == nth:
                action()
            return result

        setattr(module, name, broken)

    return patch


def send(number: signal.Signals) -> Callable[[], None]:
    """What a scheduler does to this process."""
    return lambda: os.kill(os.getpid(), number)


def start(stage: str, folder: Path, rank: int = 0, world: int = 1, port: int = 0, patch: Patch | None = None) -> int:
    """Fork a process of a stage; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        log = os.open(folder / "stage.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ["LORADROP_GRACE_SECONDS"] = "3"
        if world > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        if patch is not None:
            patch()
        code = stage_process([stage, "--run-dir", str(folder)])
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pids: list[int]) -> list[int | None]:
    """Exit codes, -9 for a kill; None for a process that hung, which is ended."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + HANG_SECONDS
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[pid] = None
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def run(stage: str, folder: Path, world: int = 1, patch: Patch | None = None, broken_rank: int = 0) -> list[int | None]:
    """All processes of a stage, `patch` in one of them; their exit codes."""
    (folder / "stop_request.json").unlink(missing_ok=True)  # what the command does before it starts a stage
    with contextlib.suppress(OSError):
        ranks.clear(folder)
    port = free_port()
    return wait([start(stage, folder, r, world, port, patch if r == broken_rank else None) for r in range(world)])


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same after every fault."""
    paths = RunPaths(folder)
    rows = [{key: row.get(key) for key in COMPARED} for row in read_json_lines(paths.metrics)]
    predictions = {}
    for split in ("validation", "calibration", "test"):
        with np.load(paths.predictions / f"{split}.npz", allow_pickle=False) as arrays:
            predictions[split] = arrays["log_probs"].tobytes()
    weights = sha256_file(paths.adapter / "adapter_model.safetensors")
    return {"adapter": weights, "metrics": rows, "predictions": predictions}


@dataclass(frozen=True)
class Bench:
    """Where injections happen."""

    folder: Path
    base: list[str]
    references: dict[int, dict[str, Any]]
    random: random.Random
    fired: list[str]
    """How the broken stage left, for the line that is printed."""

    def prepare(self) -> None:
        """Make the unbroken runs. Raises `RuntimeError` where one does not end well."""
        for world in (1, 2):
            unbroken = self.fresh()
            codes = [run(stage, unbroken, world) for stage in ("train", "evaluate")]
            if codes != [[0] * world] * 2:
                log = (unbroken / "stage.log").read_text()
                raise RuntimeError(f"the unbroken run ended with {codes}\n{log[-3000:]}")
            self.references[world] = outcome(unbroken)

    def fresh(self, where: Path | None = None, world: int = 1) -> Path:
        """A run folder in which nothing has been done yet."""
        folder = Path(tempfile.mkdtemp(dir=where or self.folder, prefix="run-"))
        write_text(RunPaths(folder).config, dump_config(load_config(None, [*self.base, *SETTINGS])))
        return folder

    def finish(self, folder: Path, world: int = 1) -> str:
        """Start the stages again until they end; what is wrong with the end, or nothing."""
        for stage in ("train", "evaluate"):
            if (codes := run(stage, folder, world)) != [0] * world:
                tail = (folder / "stage.log").read_text(errors="replace")[-1500:]
                return f"{stage} was started again and ended with {codes}: …{tail}"
        found, expected = outcome(folder), self.references[world]
        wrong = [name for name in expected if found[name] != expected[name]]
        return f"not as unbroken: {', '.join(wrong)}" if wrong else ""


def broken_stage(
    bench: Bench, stage: str, patch: Patch, expected: set[int], world: int = 1, broken_rank: int = 0
) -> str:
    """Break a stage, see how it leaves, finish the run."""
    folder = bench.fresh()
    if stage == "evaluate" and run("train", folder, world) != [0] * world:
        return "the training before it failed"
    codes = run(stage, folder, world, patch, broken_rank)
    bench.fired[:] = map(str, codes)
    if not set(codes) <= expected:
        return f"left with {codes}, not {sorted(expected)}: …{(folder / 'stage.log').read_text()[-1500:]}"
    return bench.finish(folder, world)


KILL_POINTS = {
    "mid-step": ("train", "pipeline.training.loop.lay_out", 12, "before"),
    "mid-save: state written, no manifest": ("train", "pipeline.training.checkpoint.save_file", 3, "after"),
    "between manifest and rename": ("train", "pipeline.files.write_manifest", 5, "after"),
    "between rename and pointer": ("train", "pipeline.training.checkpoint.point", 3, "before"),
    "between pointer and retention": ("train", "pipeline.training.checkpoint.prune", 3, "before"),
    "in validation": ("train", "pipeline.prediction.causal.collate", 10, "before"),
    "between checkpoint and adapter": ("train", "pipeline.training.published.write_adapter", 3, "before"),
    "between adapter and its predictions": ("train", "pipeline.training.published.write_predictions", 3, "before"),
    "in evaluation": ("evaluate", "pipeline.prediction.causal.collate", 40, "before"),
    "between two splits of an evaluation": ("evaluate", "pipeline.stages.evaluate.write_predictions", 3, "after"),
}
SIGNAL_POINTS = {
    "set-up, data": ("train", "pipeline.stages.train.load_splits", 1),
    "set-up, model": ("train", "pipeline.stages.train.attach_adapter", 1),
    "training": ("train", "pipeline.training.loop.lay_out", 12),
    "validation": ("train", "pipeline.prediction.causal.collate", 10),
    "saving": ("train", "pipeline.training.checkpoint.save_file", 3),
    "set-up of evaluation": ("evaluate", "pipeline.stages.evaluate.open_task", 1),
    "evaluation": ("evaluate", "pipeline.prediction.causal.collate", 40),
}


def kill(bench: Bench, point: str) -> str:
    """kill -9."""
    stage, target, calls, when = KILL_POINTS[point]
    nth = bench.random.randint(1, calls)
    # Where the point is not reached so often (another best step), the stage ends well: no fault, and no harm.
    return broken_stage(bench, stage, at(target, nth, send(signal.SIGKILL), when), {-9, 0})


def ask(bench: Bench, point: str) -> str:
    """SIGTERM, SIGINT or SIGUSR1."""
    stage, target, calls = SIGNAL_POINTS[point]
    number = bench.random.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    nth = bench.random.randint(1, calls)
    return broken_stage(bench, stage, at(target, nth, send(number)), {75, 0} if nth > 1 else {75})


def kill_one_of_two(bench: Bench, point: str) -> str:
    """kill -9 of one of two processes: the other leaves by itself, within the grace time, and names the cause."""
    points = {
        "mid-step": ("pipeline.training.loop.lay_out", 6), "in validation": ("pipeline.prediction.causal.collate", 5),
    }
    target, calls = points[point]
    patch = at(target, bench.random.randint(1, calls), send(signal.SIGKILL))
    folder, rank = bench.fresh(), bench.random.randint(0, 1)
    started = time.monotonic()
    codes = run("train", folder, 2, patch, rank)
    bench.fired[:] = map(str, codes)
    if sorted(codes, key=str) != [-9, 1]:
        return f"left with {codes}, not -9 and 1"
    first = ranks.failures(folder)[0]
    if time.monotonic() - started > 60 or first.rank != rank or first.kind != "killed":
        return f"the first failure is said to be {first}"
    return bench.finish(folder, 2)


def ask_one_of_two(bench: Bench, point: str) -> str:
    """A signal to one of two processes: both save and leave."""
    points = {
        "training": ("pipeline.training.loop.lay_out", 6), "validation": ("pipeline.prediction.causal.collate", 5),
    }  # fmt: skip
    target, calls = points[point]
    patch = at(target, bench.random.randint(1, calls), send(signal.SIGTERM))
    expected = {75} if point == "training" else {75, 0}  # 0: before the last chunk of the last validation
    return broken_stage(bench, "train", patch, expected, 2, bench.random.randint(0, 1))


def damage(bench: Bench, how: str) -> str:
    """A truncated or bit-flipped file of the newest checkpoint, in a run that was stopped."""
    folder = bench.fresh()
    stop = at("pipeline.training.loop.lay_out", bench.random.randint(7, 10), send(signal.SIGTERM))
    codes = run("train", folder, patch=stop)
    if codes != [75]:
        return f"the stop before it left with {codes}"
    newest = published_checkpoints(RunPaths(folder).checkpoints)[-1]
    files = [*sorted(newest.iterdir()), RunPaths(folder).checkpoints / "latest.json"]
    path = bench.random.choice(files)
    content = bytearray(path.read_bytes())
    place = bench.random.randrange(len(content))
    if how == "truncated":
        del content[place:]
    else:
        content[place] ^= 1 << bench.random.randrange(8)
    path.write_bytes(bytes(content))
    bench.fired[:] = [path.name]
    return bench.finish(folder)


def fill_disk(bench: Bench, point: str) -> str:
    """No space left, on a small disk: a clear message, nothing lost, and after making room the same command goes on."""
    disk = bench.folder / "disk"
    disk.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        return "SKIPPED: a small disk can be mounted by root only"
    try:
        folder, ballast = bench.fresh(disk), disk / "ballast"
        target, calls = {
            "saving": ("pipeline.training.checkpoint.save_file", 3),
            "metrics": ("pipeline.training.loop.lay_out", 12),
            "publishing": ("pipeline.training.published.write_adapter", 2),
        }[point]
        leave = bench.random.choice([0, 0, 1 << 12, 1 << 14])

        def fill() -> None:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
            os.truncate(ballast, max(0, ballast.stat().st_size - leave))

        codes = run("train", folder, patch=at(target, bench.random.randint(1, calls), fill))
        bench.fired[:] = map(str, codes)
        log = (folder / "stage.log").read_text()
        if ballast.exists() and codes == [1] and "the same command continues" not in log and len(log) > 100:
            return f"the full disk is not named: …{log[-1500:]}"
        if codes not in ([1], [0]):
            return f"left with {codes}, not 1"
        ballast.unlink(missing_ok=True)
        return bench.finish(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def move(bench: Bench, point: str) -> str:
    """Stop, then go on with another number of processes and another ZeRO stage: equal within fp32 tolerance."""
    before, after = bench.random.choice([(1, 2), (2, 1)])
    stop = at("pipeline.training.loop.lay_out", bench.random.randint(3, 5) * (2 // before), send(signal.SIGTERM))
    folder = bench.fresh()
    if (codes := run("train", folder, before, stop)) != [75] * before:
        return f"the stop before it left with {codes}"
    settings = [*bench.base, *SETTINGS, f"train.deepspeed={point}"]
    write_text(RunPaths(folder).config, dump_config(load_config(None, settings)))
    if (codes := run("train", folder, after)) != [0] * after:
        return f"went on with {codes}: …{(folder / 'stage.log').read_text()[-1500:]}"
    moved = [row["loss"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]
    losses = [row["loss"] for row in bench.references[before]["metrics"] if row["kind"] == "train"]
    furthest = max(abs(a / b - 1) for a, b in zip(moved, losses, strict=True))
    bench.fired[:] = [f"75, {before} to {after}; losses differ {furthest:.0e}"]
    return "" if furthest < 2e-4 else f"losses {moved}, not {losses}"


KINDS: list[tuple[str, Callable[[Bench, str], str], str]] = [
    ("kill -9 mid-step", kill, "mid-step"),
    ("kill -9 mid-save", kill, "mid-save: state written, no manifest"),
    ("kill -9 between rename and pointer", kill, "between rename and pointer"),
    ("kill -9 in evaluation", kill, "in evaluation"),
    ("file truncated", damage, "truncated"),
    ("file bit-flipped", damage, "flipped"),
    ("disk full while saving", fill_disk, "saving"),
    ("signal in set-up", ask, "set-up, model"),
    ("signal in training", ask, "training"),
    ("signal in evaluation", ask, "evaluation"),
    ("signal while saving", ask, "saving"),
    ("kill -9 of one of two", kill_one_of_two, "mid-step"),
    ("signal in validation", ask, "validation"),
    ("kill -9 in validation", kill, "in validation"),
    ("signal to one of two", ask_one_of_two, "training"),
    ("signal to one of two in validation", ask_one_of_two, "validation"),
    ("kill -9 of one of two in validation", kill_one_of_two, "in validation"),
    ("disk full while training", fill_disk, "metrics"),
    ("disk full while publishing", fill_disk, "publishing"),
    ("signal in set-up, early", ask, "set-up, data"),
    ("signal in set-up of evaluation", ask, "set-up of evaluation"),
    ("moved to other processes, zero0", move, "zero0"),
    ("moved to other processes, zero1", move, "zero1"),
    ("moved to other processes, zero3", move, "zero3"),
    *((f"kill -9 {p}", kill, p) for p in KILL_POINTS if p.startswith("between") and "pointer" not in p[-8:]),
]
