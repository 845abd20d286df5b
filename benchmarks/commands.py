"""Whole commands in turn, of this checkout and another one, in fresh run folders, read by files that both write."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkout import Checkout
from benchmarks.setting import Setting
from benchmarks.table import Limit, Row
from benchmarks.timing import Spread
from pipeline.files import read_json, read_json_lines

Numbers = Mapping[str, Any]
"""What one command is known by, such as the seconds that it took."""
Found = Mapping[str, Sequence[Numbers]]
"""here, there -> the numbers of every round."""
POLL_SECONDS = 0.02


def in_turn(setting: Setting, rounds: int, measure: Callable[[Checkout, Path], Numbers]) -> Found:
    """Measure every checkout in turn, `rounds` times, after a short training of each that warms its caches."""
    found: dict[str, list[Numbers]] = {side: [] for side in setting.sides}
    for side, checkout in setting.sides.items():
        warmed = setting.folder / f"warm-{side}"
        if not warmed.exists():
            checkout.run("train", warmed, setting.work_of_default(checkout, "train.max_steps=1"))
    for number in range(rounds):
        for side, checkout in setting.sides.items():
            place = setting.folder / f"{side}-{number}"
            found[side].append(measure(checkout, place / "run"))
            put_away(setting, place)
    return found


def put_away(setting: Setting, place: Path) -> None:
    """A timed command's folder is removed, or kept where the setting says."""
    if setting.keep is None:
        shutil.rmtree(place)
    else:
        setting.keep.mkdir(parents=True, exist_ok=True)
        shutil.move(place, next_free(setting.keep, place.name))


def next_free(folder: Path, name: str) -> Path:
    """A path in `folder` that is not there yet: `name`, `name.2`, …"""
    candidates = (folder / (name if number == 1 else f"{name}.{number}") for number in count(1))
    return next(path for path in candidates if not path.exists())


def row(case: str, what: str, found: Found, number: str, target: str = "", limit: Limit | None = None) -> Row:
    """The ratio of both checkouts; of one alone its seconds, which no target of a ratio is for."""
    seconds = tuple(Spread.of([one[number] for one in numbers]).median for numbers in found.values())
    if len(found) == 1:
        value = Spread.of([one[number] for one in found["here"]])
        return Row(case, what, value=value, unit="s", limit=limit, note="no other checkout given")
    pairs = zip(found["here"], found["there"], strict=True)
    value = Spread.of([here[number] / there[number] for here, there in pairs])
    return Row(case, what, "the other checkout", value, target=target, limit=limit, seconds=seconds)


def stage(setting: Setting, name: str, *more: str) -> Callable[[Checkout, Path], Numbers]:
    """Times a stage that begins with an empty run folder, on the default recipe's work."""

    def measure(checkout: Checkout, run_dir: Path) -> Numbers:
        started = time.monotonic()
        checkout.run(name, run_dir, setting.work_of_default(checkout, *more))
        numbers = {"command": time.monotonic() - started}
        if name in ("train", "run"):
            numbers |= steps_of(run_dir)
        return numbers | ({"predicting": predicting_of(run_dir)} if name == "run" else {})

    return measure


def until_first_step(setting: Setting) -> Callable[[Checkout, Path], Numbers]:
    """Times a training of one step from its command to the row of that step in metrics.jsonl, less the step itself."""

    def measure(checkout: Checkout, run_dir: Path) -> Numbers:
        started = time.monotonic()
        process = checkout.start("train", run_dir, setting.work_of_default(checkout, "train.max_steps=1"))
        metrics = run_dir / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        checkout.ended(process, run_dir)
        return {"start": seconds - steps_of(run_dir)["step"]}

    return measure


def steps_of(run_dir: Path) -> dict[str, Any]:
    """Medians over the steps of a run, the first one left out where there are others: seconds, tokens, padding."""
    rows = [one for one in read_json_lines(run_dir / "metrics.jsonl") if one["kind"] == "train"]
    kept = rows[1:] or rows
    return {
        "step": statistics.median(one["seconds"] for one in kept),
        "tokens": statistics.median(one["seconds"] * one["tokens_per_second"] for one in kept),
        "padding": statistics.median(one["padding_share"] or 0.0 for one in kept),
        "dtype": dtype_of(run_dir),
    }


def dtype_of(run_dir: Path) -> str:
    """In which the run's base computed."""
    return str(read_json(run_dir / "environment.json")["base_model"]["compute_dtype"])


def predicting_of(run_dir: Path) -> float:
    """Seconds of the passes of an evaluation, as its predictions record them."""
    total = 0.0
    for file in sorted((run_dir / "predictions").glob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            total += float(arrays["seconds"])
    return total
