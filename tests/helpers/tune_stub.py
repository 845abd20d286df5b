"""A training that takes milliseconds and leaves a true run folder, to search over with real Ray.

`python tests/helpers/tune_stub.py CONFIG FOLDER` is `python -m tune` with this training.
Environment: STUB_SECONDS per step; STUB_FAIL, STUB_DIE: a trial's name. Where it is packed, STUB_DIE kills its worker,
once, or with STUB_DEATHS=always each time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig, dump_config, load_config
from pipeline.data.splits import load_splits
from pipeline.errors import EXIT_STOPPED, DataError, LoradropError
from pipeline.files import ADAPTER_WEIGHTS, publish_folder, sha256_file, write_json, write_text
from pipeline.run_folder.chain import Origin, own_member, predictions_from
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, write_predictions

ROWS = 48


class Stopped(LoradropError):
    """As the trainer's."""

    exit_code = EXIT_STOPPED


def write_data(path: Path) -> None:
    """Rows with two choices, the label readable from the text."""
    rows = [f'{{"prompt": "row {i}", "choices": [" bad", " good"], "label": {i % 2}}}' for i in range(ROWS)]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def log_probs(config: RunConfig, step: int, labels: np.ndarray) -> np.ndarray:
    """(N, 2): better with more steps, rates near 0.3, learning rates near 1e-3; every rate errs on rows of its own."""
    rate = config.adapter.rate or 0.0
    slow = 0.3 * abs(float(np.log10(config.train.learning_rate / 1e-3)))
    noise = np.random.default_rng(int(1000 * rate)).normal(size=len(labels))
    margin = (2.0 - 4.0 * abs(rate - 0.3) - slow) * (1.0 - np.exp(-step / 4.0)) + 0.3 * noise
    right = -np.log1p(np.exp(-margin))
    wrong = -np.log1p(np.exp(margin))
    table = np.stack([wrong, right], axis=1)
    return np.where(labels[:, None] == 1, table, table[:, ::-1])


def train(config: RunConfig, run_dir: Path, on_validation: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Stands in for `pipeline.train_run`."""
    paths, name = RunPaths(run_dir), run_dir.name
    main = os.environ.get("RANK", "0") == "0"
    rows = load_splits(config.data).validation
    labels = np.array([row.label for row in rows])
    print(f"{name} pid {os.getpid()} process {os.environ.get('RANK', '-')}/{os.environ.get('WORLD_SIZE', '-')}")
    if main:
        write_text(paths.config, dump_config(config))
    scores: dict[str, Any] = {}
    for step in range(1, config.train.max_steps + 1):
        time.sleep(float(os.environ.get("STUB_SECONDS", "0.01")))
        if step == 3:
            misbehave(name)
        if step % config.train.validate_every_steps and step != config.train.max_steps:
            continue
        predicted = log_probs(config, step, labels)
        scores = scored(predicted, labels)
        if main:
            publish(paths, config, predicted, tuple(row.id for row in rows))
        on_validation({"step": float(step), **scores, "published": 1.0})
        if paths.stop_request.exists() and step < config.train.max_steps:
            raise Stopped(f"stopped at step {step}")
    return {
        "validation_nll": scores["nll"], "validation_accuracy": scores["accuracy"], "steps": config.train.max_steps,
        "adapter_sha256": sha256_file(paths.adapter / ADAPTER_WEIGHTS),
    }  # fmt: skip


def scored(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """NLL and accuracy."""
    nll = float(-predicted[np.arange(len(labels)), labels].mean())
    return {"nll": nll, "accuracy": float((predicted.argmax(axis=1) == labels).mean())}


@dataclass
class Ended:
    """As the pack's."""

    run_dir: Path
    state: str
    result: dict[str, Any] | None = None
    error: Exception | None = None


@dataclass
class PackedRun:
    """A run of the stub's pack."""

    config: RunConfig
    paths: RunPaths
    on_validation: Callable[[dict[str, Any]], None]
    step: int = 0


class Pack:
    """Stands in for `pipeline.Pack`: one step of every run at a time, a checkpoint at every validation.

    steps.txt of a run folder has a line for every step that was taken: its number, the process and its machine.
    """

    def __init__(self, config: RunConfig, trusted: bool = False) -> None:
        rows = load_splits(config.data).validation
        self.labels, self.row_ids = np.array([row.label for row in rows]), tuple(row.id for row in rows)
        self.members: list[PackedRun] = []
        print(f"pack in {os.getpid()}, {os.environ['OMP_NUM_THREADS']} threads")

    @property
    def runs(self) -> int:
        """How many are in it."""
        return len(self.members)

    def admit(self, config: RunConfig, run_dir: Path, on_validation: Callable[[dict[str, Any]], None]) -> None:
        """Begin a run, or go on with it."""
        paths = RunPaths(run_dir)
        found = sorted(paths.checkpoints.glob("step_*")) if paths.checkpoints.exists() else []
        write_text(paths.config, dump_config(config))
        self.members.append(PackedRun(config, paths, on_validation, int(found[-1].name[5:]) if found else 0))

    def advance(self) -> list[Ended]:
        """One step of each."""
        time.sleep(float(os.environ.get("STUB_SECONDS", "0.01")))
        ended = [one for run in list(self.members) if (one := self._step(run)) is not None]
        left = {one.run_dir for one in ended}
        self.members = [run for run in self.members if run.paths.root not in left]
        return ended

    def _step(self, run: PackedRun) -> Ended | None:
        root, last = run.paths.root, run.config.train.max_steps
        if run.step < last:
            run.step += 1
            with (root / "steps.txt").open("a") as file:
                file.write(f"{run.step} {os.getpid()} {socket.gethostname()}\n")
        if run.step == 3:
            mark = root.with_name(f"{root.name}.died")
            try:
                if os.environ.get("STUB_DEATHS") == "always" or not mark.exists():
                    if os.environ.get("STUB_DIE") == root.name:
                        mark.touch()
                    misbehave(root.name)
            except DataError as error:
                return Ended(root, "failed", error=error)
        if run.step % run.config.train.validate_every_steps and run.step != last:
            return None
        predicted = log_probs(run.config, run.step, self.labels)
        scores = scored(predicted, self.labels)
        (run.paths.checkpoints / f"step_{run.step:06d}").mkdir(parents=True, exist_ok=True)
        publish(run.paths, run.config, predicted, self.row_ids)
        with run.paths.metrics.open("a") as file:
            file.write(json.dumps({"kind": "validation", "step": run.step, **scores}) + "\n")
        run.on_validation({"step": float(run.step), **scores, "published": 1.0})
        if run.step == last:
            return Ended(root, "done", {
                "validation_nll": scores["nll"], "validation_accuracy": scores["accuracy"], "steps": last,
                "adapter_sha256": sha256_file(run.paths.adapter / ADAPTER_WEIGHTS),
            })
        if run.paths.stop_request.exists():
            run.paths.stop_request.unlink()
            return Ended(root, "stopped", error=Stopped(f"stopped at step {run.step}"))
        return None


def misbehave(name: str) -> None:
    """Fail as the environment says."""
    if os.environ.get("STUB_FAIL") in (name, "all"):
        raise DataError("data.jsonl row 7: label", 9, "is out of range", "Use 0 or 1.")
    if os.environ.get("STUB_DIE") == name:
        os.kill(os.getpid(), signal.SIGKILL)


def publish(paths: RunPaths, config: RunConfig, predicted: np.ndarray, row_ids: tuple[str, ...]) -> None:
    """adapter/ and predictions/, as the trainer leaves them."""
    def fill(folder: Path) -> None:
        write_json(folder / "adapter_config.json", {"r": config.adapter.rank})
        write_text(folder / ADAPTER_WEIGHTS, config.sha256())

    publish_folder(paths.adapter, fill)
    origin = Origin(config.training_sha256(), "rows")
    made_from = predictions_from(origin, [own_member(paths.adapter, sha256_file(paths.adapter / ADAPTER_WEIGHTS))])
    predictions = ChoicePredictions(row_ids, predicted[None], made_from=made_from)
    write_predictions(paths.predictions, "validation", predictions)


def main() -> int:
    """As `python -m tune`, with this module's training; prints what the driver has loaded."""
    import tune_stub  # by its name: workers import it, too

    import pipeline
    from tune.progress import print_summary
    from tune.search import search

    pipeline.pack_refusal = lambda shared, config: None
    try:
        print_summary(search(load_config(sys.argv[1]), Path(sys.argv[2]), tune_stub.train, tune_stub.Pack))
    except LoradropError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        print("loaded:", *(name for name in ("torch", "deepspeed", "transformers") if name in sys.modules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
