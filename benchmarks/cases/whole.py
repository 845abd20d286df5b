"""Whole commands by the default recipe: ratios of this checkout and another one, seconds where it is alone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.checkout import Checkout
from benchmarks.commands import Found, Numbers, dtype_of, in_turn, predicting_of, row, stage, until_first_step
from benchmarks.passes import config_of, prompt_tokens
from benchmarks.products import Products
from benchmarks.setting import Setting
from benchmarks.table import Limit, Row
from benchmarks.timing import Spread
from pipeline.data.splits import EVALUATED_SPLITS, load_splits
from pipeline.model.load import load_tokenizer

MEMBERS = 13
EVALUATED = f"ensemble.size={MEMBERS - 2}"
"""Beside the base and the adapter without draws."""
COMPARED = (
    "compare.methods=[none, lora_dropout, hiddenkey_minus]", "compare.learning_rates=[0.0005, 0.002]",
    "compare.evaluate=all", "ensemble.size=4",
)
SETTINGS = 6


def first_step(setting: Setting) -> Iterator[Row]:
    """From the command to the first step of `train`, that step itself left out, on warm caches."""
    found = in_turn(setting, setting.commands, until_first_step(setting))
    value = Spread.of([one["start"] for one in found["here"]])
    yield Row("first-step", "from the command train to its first step", value=value, unit="s", target="first step")
    if setting.against is not None:
        yield row("first-step", "from the command train to its first step", found, "start")


def trainer(setting: Setting) -> Iterator[Row]:
    """The median step of a training by the default recipe, the first one left out."""
    found = in_turn(setting, setting.commands, stage(setting, "train"))
    limit = _products(setting, found, "step", backward=True)
    first = found["here"][0]
    note = f"{first['dtype']}, {first['tokens']:.0f} tokens, {first['padding']:.0%} of what is computed padding"
    yield replace(row("trainer", "step of the default recipe", found, "step", "trainer step", limit), note=note)


def evaluate(setting: Setting) -> Iterator[Row]:
    """The evaluation stage of a trained run, and the predicting within it."""
    trained: dict[Checkout, Path] = {}
    for side, checkout in setting.sides.items():
        trained[checkout] = setting.folder / f"trained-{side}"
        work = setting.work_of_default(checkout, EVALUATED, "train.max_steps=1", "train.validate_every_steps=1")
        checkout.run("train", trained[checkout], work)
    config = config_of(setting, "auto", *setting.scale.rows)
    splits = load_splits(config.data)
    rows = [one for name in EVALUATED_SPLITS for one in getattr(splits, name)]
    tokens = MEMBERS * prompt_tokens(config, rows, load_tokenizer(config.model))

    def measure(checkout: Checkout, run_dir: Path) -> Numbers:
        shutil.copytree(trained[checkout], run_dir)
        started = time.monotonic()
        checkout.run("evaluate", run_dir)
        seconds = time.monotonic() - started
        return {
            "command": seconds, "predicting": predicting_of(run_dir), "tokens": tokens, "dtype": dtype_of(run_dir),
        }

    found = in_turn(setting, setting.commands, measure)
    limit = _products(setting, found, "predicting", backward=False, most=config.evaluate.batch_tokens)
    yield row("evaluate", f"evaluation of {MEMBERS} members, the command", found, "command", "evaluation")
    yield row("evaluate", "the predicting within it", found, "predicting", limit=limit)
    for side, numbers in found.items():
        speed = Spread.of([tokens / one["predicting"] for one in numbers])
        name = "this checkout" if side == "here" else "the other checkout"
        yield Row("evaluate", f"the predicting within it, {name}", value=speed, unit="tokens/s")


def search(setting: Setting) -> Iterator[Row]:
    """The search stage."""
    found = in_turn(setting, setting.commands, stage(setting, "search"))
    yield row("search", "the default search", found, "command", "search")


def line(setting: Setting) -> Iterator[Row]:
    """`bash launch.sh` once the environment is made: search, both trainings, evaluation, report, export."""
    found = in_turn(setting, setting.long, stage(setting, "run"))
    yield row("line", "the default line", found, "command", "line")
    yield row("line", "the predicting of its evaluation", found, "predicting")
    yield row("line", "a step of its training", found, "step")


def compare(setting: Setting) -> Iterator[Row]:
    """Three methods × two learning rates × seeds, with 4 draws."""
    seeds = list(range(setting.scale.seeds))
    found = in_turn(setting, setting.long, stage(setting, "compare", *COMPARED, f"compare.seeds={seeds}"))
    yield row("compare", f"comparison of {SETTINGS * len(seeds)} cells, 4 draws", found, "command", "compare")


def _products(setting: Setting, found: Found, number: str, backward: bool, most: int | None = None) -> Limit:
    """What the products of the tokens of this checkout's command take, in passes of at most `most` tokens."""
    here = found["here"]
    products = Products(config_of(setting, here[0]["dtype"]), setting.device)
    tokens = Spread.of([one["tokens"] for one in here]).median
    vectors = max(1, min(round(tokens), most or round(tokens)))
    measured = Spread.of(setting.alternate({"products": products.work(vectors, backward)})["products"]).median
    seconds = measured * tokens / vectors
    share = Spread.of([seconds / one[number] for one in here])
    return Limit(seconds, products.operations(vectors, backward) / measured / 1e9, share)
