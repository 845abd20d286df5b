"""Packed runs: K adapters, each with rows and 4 draws of its own, in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.passes import DRAWS, config_of, our_adapters, packed_layout, random_examples, training_step
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Spread, Times, Work, ratio
from pipeline.adapters.attach import Adapters
from pipeline.adapters.layout import split_layout

PACKS = ((8, 2, 32), (4, 10, 29))
"""Runs, rows of each, tokens."""


def rows(setting: Setting) -> Iterator[Row]:
    """How many times as fast one pass is as the same passes one after another, each on a base with one adapter."""
    found: dict[tuple[int, int, int], dict[str, tuple[Times, int]]] = {shape: {} for shape in PACKS}
    for dtype in setting.dtypes:
        alone = our_adapters(setting, dtype, longest=max(tokens for *_, tokens in PACKS))
        for shape in PACKS:
            found[shape][dtype] = measured(setting, dtype, alone, *shape)
    for (runs, own, tokens), of_dtype in found.items():
        names = {dtype: Spread.of(times["packed"]).median for dtype, (times, _) in of_dtype.items()}
        for dtype, (times, operations) in of_dtype.items():
            target = f"{runs} packed runs" if dtype == min(names, key=names.__getitem__) else ""
            yield Row(
                "packs", f"{runs} packed runs of {own} × {tokens}, {dtype}: times as fast", f"{runs} passes in turn",
                ratio(times, "alone", "packed", runs), target=target,
                limit=limit_of(times, "products", "packed", operations),
                seconds=(names[dtype], runs * Spread.of(times["alone"]).median),
            )


def measured(
    setting: Setting, dtype: str, alone: Adapters, runs: int, rows: int, tokens: int
) -> tuple[Times, int]:
    """Rounds of `packed`, of `alone` (one of its runs) and of `products`, and the operations of these."""
    pack = our_adapters(setting, dtype, runs, longest=tokens)
    examples = random_examples(pack.model, runs * rows, tokens)
    products = Products(config_of(setting, dtype), setting.device)
    together, one = packed_layout(runs, rows), split_layout(range(rows), DRAWS)
    works: dict[str, Work] = {
        "packed": lambda: training_step(pack, examples, together),
        "alone": lambda: training_step(alone, examples[:rows], one),
        "products": products.work(runs * rows * tokens, backward=True),
    }
    return setting.alternate(works), products.operations(runs * rows * tokens, backward=True)
