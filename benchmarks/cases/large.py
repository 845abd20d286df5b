"""An 8B-shaped random base in NF4 on a GPU: bfloat16, rank 16 on all linears, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from benchmarks.memory_plan import EIGHT_BILLION, write_random_model
from benchmarks.passes import (
    DRAWS,
    KEY,
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
from pipeline.adapters.attach import Adapters
from pipeline.adapters.build import admit_adapter
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import Member
from pipeline.distributed.devices import resident_high_water
from pipeline.prediction.decode import Decoder

ROWS, TOKENS, RUNS, MEMBERS, NEW = 4, 512, 8, 8, 4
"""NEW: tokens that one call of a decode adds."""
NAMES = {
    "8B tokens": f"8B train step {ROWS} × {TOKENS}", "8B memory": "memory of it",
    "8B against PEFT": "it against transformers, PEFT and bitsandbytes: times as fast",
    "8B packed runs": f"{RUNS} packed runs of 1 × {TOKENS}: times as fast",
    "8B decode": f"a token of {MEMBERS} members behind {TOKENS} others",
}
"""Target -> row."""
Made = TypeVar("Made")


def rows(setting: Setting) -> Iterator[Row]:
    """Skipped without a GPU."""
    if not setting.device.startswith("cuda"):
        yield from (skipped("large", what, "it needs --device cuda", target) for target, what in NAMES.items())
        return
    model = write_random_model(setting.folder / "8b", EIGHT_BILLION, setting.device)
    yield from measured(replace(setting, overrides=(*setting.overrides, f"model.path={model}")))


def measured(setting: Setting) -> Iterator[Row]:
    """On whatever base the setting names, in bfloat16."""
    config = config_of(setting, "bfloat16")
    ours, own_peak = _held(setting, lambda: _ours(setting))
    split, one = split_layout(range(ROWS), DRAWS), split_layout(range(1), DRAWS)
    examples = random_examples(ours.model, max(ROWS, RUNS), TOKENS)
    stock, stock_peak = _held(setting, lambda: _stock(setting))
    products = Products(config, setting.device)
    works: dict[str, Work] = {
        "ours": lambda: training_step(ours, examples[:ROWS], split),
        "peft": stock,
        "products": products.work(ROWS * TOKENS, backward=True),
    }
    times = setting.alternate(works)
    limit = limit_of(times, "products", "ours", products.operations(ROWS * TOKENS, backward=True))
    for name, target, note in (("ours", "8B tokens", ""), ("peft", "", "transformers, PEFT and bitsandbytes")):
        speed = Spread.of([ROWS * TOKENS / seconds for seconds in times[name]])
        yield Row("large", NAMES["8B tokens"], value=speed, unit="tokens/s", target=target, note=note,
                  limit=limit if name == "ours" else None)
    yield Row("large", NAMES["8B memory"], value=Spread.of([own_peak / 1e9]), unit="GB", target="8B memory")
    yield Row("large", NAMES["8B memory"], value=Spread.of([stock_peak / 1e9]), unit="GB",
              note="transformers, PEFT and bitsandbytes")
    yield Row("large", NAMES["8B against PEFT"], "stock PEFT LoRA", ratio(times, "peft", "ours"),
              target="8B against PEFT", seconds=tuple(Spread.of(times[name]).median for name in ("ours", "peft")))
    del stock, products, works
    for _ in range(RUNS - 1):
        admit_adapter(ours, config.adapter, config.train.max_steps, config.train.seed)
    times = setting.alternate({
        "packed": lambda: training_step(ours, examples[:RUNS], packed_layout(RUNS, 1)),
        "alone": lambda: training_step(ours, examples[:1], one),
    })
    yield Row("large", NAMES["8B packed runs"], f"{RUNS} passes in turn", ratio(times, "alone", "packed", RUNS),
              target="8B packed runs")
    times = setting.alternate({"eight": _decode(ours, MEMBERS), "one": _decode(ours, 1)})
    medians = tuple(Spread.of(times[name]).median / NEW for name in ("eight", "one"))
    yield Row("large", NAMES["8B decode"], "one member", ratio(times, "eight", "one"), target="8B decode",
              seconds=medians)


def _ours(setting: Setting) -> Adapters:
    """After one step."""
    adapters = our_adapters(setting, "bfloat16", longest=TOKENS)
    _recompute(adapters.model)
    training_step(adapters, random_examples(adapters.model, ROWS, TOKENS), split_layout(range(ROWS), DRAWS))
    return adapters


def _stock(setting: Setting) -> StockStep:
    """Likewise."""
    model = stock_peft(setting, "bfloat16", 0.0)
    _recompute(model)
    step = StockStep(model, random_examples(model, ROWS, TOKENS), own_loss=True)
    step()
    return step


def _held(setting: Setting, make: Callable[[], Made]) -> tuple[Made, int]:
    """What `make` makes, and the most memory that it held, in bytes: on a CPU with all that the process has had."""
    if not setting.device.startswith("cuda"):
        return make(), resident_high_water()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = make()
    return made, torch.cuda.max_memory_allocated() - before


def _decode(adapters: Adapters, members: int) -> Work:
    """Adds tokens to one row under so many draws, each on top of the last."""
    decoder = Decoder(adapters, [Member(0, draw) for draw in range(members)], KEY, 0)
    state = decoder.prefill(random_examples(adapters.model, 1, TOKENS))

    def step() -> None:
        for _ in range(NEW):
            state.step(state.log_probs.argmax(-1))

    return step


def _recompute(model: nn.Module) -> None:
    """As `train.activation_checkpointing` does."""
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
