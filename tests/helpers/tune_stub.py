"""A training that takes milliseconds and leaves a true run folder, to search over with real Ray.

`python tests/helpers/tune_stub.py CONFIG FOLDER` is `python -m tune` with this training.
Environment: STUB_SECONDS per step; STUB_FAIL, STUB_DIE, STUB_NAN: a trial's name.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
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
        nll = float(-predicted[np.arange(len(labels)), labels].mean())
        scores = {"nll": nll, "accuracy": float((predicted.argmax(axis=1) == labels).mean())}
        if main:
            publish(paths, config, predicted, tuple(row.id for row in rows))
        on_validation({"step": float(step), **scores, "published": 1.0})
        if paths.stop_request.exists() and step < config.train.max_steps:
            raise Stopped(f"stopped at step {step}")
    return {
        "validation_nll": scores["nll"], "validation_accuracy": scores["accuracy"], "steps": config.train.max_steps,
        "adapter_sha256": sha256_file(paths.adapter / ADAPTER_WEIGHTS),
    }  # fmt: skip


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

    from tune.progress import print_summary
    from tune.search import search

    try:
        print_summary(search(load_config(sys.argv[1]), Path(sys.argv[2]), train=tune_stub.train))
    except LoradropError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        print("loaded:", *(name for name in ("torch", "deepspeed", "transformers") if name in sys.modules))
    return 0


if __name__ == "__main__":
    sys.exit(main())
