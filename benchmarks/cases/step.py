"""A training step of 16 × 32 tokens, rank 16, LoRA Dropout .5 on all linears: forward and backward of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.passes import DRAWS, StockStep, config_of, our_adapters, random_examples, stock_peft, training_step
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Spread, Times, Work, faster, ratio
from pipeline.adapters.layout import plain_layout, replicate_layout, split_layout

ROWS, TOKENS = 16, 32
WHAT = f"train step {ROWS} × {TOKENS}, LoRA Dropout .5, {DRAWS} draws split"
STOCK = {
    "peft": ("stock PEFT LoRA", "step against plain PEFT"),
    "peft dropout": ("stock PEFT lora_dropout=0.05", "step against PEFT with dropout"),
    "peft, our loss": ("stock PEFT LoRA, logits at supervised positions only", ""),
}
"""Work -> what it is, and the target of the ratio to it."""


def rows(setting: Setting) -> Iterator[Row]:
    """Ours against stock PEFT in every dtype, and each in its faster one; the limit; `replicate` against plain."""
    works: dict[str, Work] = {}
    operations = 0
    for dtype in setting.dtypes:
        of_dtype, operations = _works(setting, dtype)
        works |= {f"{name} {dtype}": work for name, work in of_dtype.items()}
    times = setting.alternate(works)
    limits = {
        dtype: limit_of(times, f"products {dtype}", f"split {dtype}", operations) for dtype in setting.dtypes
    }
    for theirs, (against, target) in STOCK.items():
        for dtype in setting.dtypes:
            yield replace(
                compared(times, f"split {dtype}", f"{theirs} {dtype}", f"{WHAT}, {dtype}", against), limit=limits[dtype]
            )
        own, other = (faster(times, [f"{side} {dtype}" for dtype in setting.dtypes]) for side in ("split", theirs))
        chosen = f"ours {own.split()[-1]}, theirs {other.split()[-1]}"
        yield replace(
            compared(times, own, other, f"{WHAT}, each in its faster dtype", against),
            limit=limits[own.split()[-1]], target=target, note=chosen,
        )
    best = faster(times, [f"split {dtype}" for dtype in setting.dtypes]).split()[-1]
    limit = limits[best]
    yield Row("step", f"{WHAT}, {best}", "its products alone", limit.share, "%", "share of a step", limit)
    for dtype in setting.dtypes:
        row = compared(times, f"replicate {dtype}", f"plain {dtype}", f"replicate, S = {DRAWS}, {dtype}", "plain LoRA")
        yield replace(
            row, target="replicate" if dtype == best else "",
            limit=limit_of(times, f"products {dtype}", f"replicate {dtype}", operations, DRAWS),
        )


def compared(times: Times, first: str, second: str, what: str, against: str) -> Row:
    """The ratio of two works, with their medians."""
    seconds = tuple(Spread.of(times[name]).median for name in (first, second))
    return Row("step", what, against, ratio(times, first, second), seconds=seconds)


def _works(setting: Setting, dtype: str) -> tuple[dict[str, Work], int]:
    """name -> work, and the operations of the products."""
    ours = our_adapters(setting, dtype, longest=TOKENS)
    examples = random_examples(ours.model, ROWS, TOKENS)
    products = Products(config_of(setting, dtype), setting.device)
    split, plain = split_layout(range(ROWS), DRAWS), plain_layout(ROWS)
    replicate = replicate_layout(ROWS, DRAWS)
    plain_peft = stock_peft(setting, dtype, 0.0)
    works: dict[str, Work] = {
        "split": lambda: training_step(ours, examples, split),
        "peft": StockStep(plain_peft, examples, own_loss=True),
        "peft dropout": StockStep(stock_peft(setting, dtype, 0.05), examples, own_loss=True),
        "peft, our loss": StockStep(plain_peft, examples, own_loss=False),
        "products": products.work(ROWS * TOKENS, backward=True),
        "plain": lambda: training_step(ours, examples, plain),
        "replicate": lambda: training_step(ours, examples, replicate),
    }
    return works, products.operations(ROWS * TOKENS, backward=True)
