"""An 8B-shaped random base in NF4 on a GPU: bfloat16, rank 16 on all linears, activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from benchmarks.memory_plan import EIGHT_BILLION, write_random_model
from benchmarks.passes import (
    DRAWS,
    StockStep,
    config_of,
    our_adapters,
    packed_layout,
    random_examples,
    stock_peft,
    training_step,
)
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row, skipped
from benchmarks.timing import Spread, Work, ratio
from pipeline.adapters.layout import split_layout
from pipeline.distributed.devices import resident_high_water

ROWS, TOKENS, RUNS = 4, 512, 8
NAMES = {
    "8B tokens": f"8B train step {ROWS} × {TOKENS}", "8B memory": "memory of it",
    "8B against PEFT": "it against transformers, PEFT and bitsandbytes: times as fast",
    "8B packed runs": f"{RUNS} packed runs of 1 × {TOKENS}: times as fast",
}
"""Target -> row."""


def rows(setting: Setting) -> Iterator[Row]:
    """Skipped without a GPU."""
    if not setting.device.startswith("cuda"):
        yield from (skipped("large", what, "it needs --device cuda", target) for target, what in NAMES.items())
        return
    model = write_random_model(setting.folder / "8b", EIGHT_BILLION)
    yield from measured(replace(setting, overrides=(*setting.overrides, f"model.path={model}")))


def measured(setting: Setting) -> Iterator[Row]:
    """On whatever base the setting names, in bfloat16."""
    ours = our_adapters(setting, "bfloat16", RUNS, longest=TOKENS)
    _recompute(ours.model)
    examples = random_examples(ours.model, max(ROWS, RUNS), TOKENS)
    split, one = split_layout(range(ROWS), DRAWS), split_layout(range(1), DRAWS)
    training_step(ours, examples[:ROWS], split)
    peak = torch.cuda.max_memory_allocated() if setting.device.startswith("cuda") else resident_high_water()
    stock = stock_peft(setting, "bfloat16", 0.0)
    _recompute(stock)
    products = Products(config_of(setting, "bfloat16"), setting.device)
    works: dict[str, Work] = {
        "ours": lambda: training_step(ours, examples[:ROWS], split),
        "peft": StockStep(stock, examples[:ROWS], own_loss=True),
        "products": products.work(ROWS * TOKENS, backward=True),
        "packed": lambda: training_step(ours, examples[:RUNS], packed_layout(RUNS, 1)),
        "alone": lambda: training_step(ours, examples[:1], one),
    }
    times = setting.alternate(works)
    limit = limit_of(times, "products", "ours", products.operations(ROWS * TOKENS, backward=True))
    speed = Spread.of([ROWS * TOKENS / seconds for seconds in times["ours"]])
    yield Row("large", NAMES["8B tokens"], value=speed, unit="tokens/s", target="8B tokens", limit=limit)
    yield Row("large", NAMES["8B memory"], value=Spread.of([peak / 1e9]), unit="GB", target="8B memory",
              note=f"with {RUNS} adapters attached")
    yield Row("large", NAMES["8B against PEFT"], "stock PEFT LoRA", ratio(times, "peft", "ours"),
              target="8B against PEFT", seconds=tuple(Spread.of(times[name]).median for name in ("ours", "peft")))
    yield Row("large", NAMES["8B packed runs"], f"{RUNS} passes in turn", ratio(times, "alone", "packed", RUNS),
              target="8B packed runs")


def _recompute(model: nn.Module) -> None:
    """As `train.activation_checkpointing` does."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
