"""Scaling: one thing varied at a time, against members, rank, length and runs in a pack."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases.forward import works_of
from benchmarks.cases.packs import measured
from benchmarks.passes import DRAWS, config_of, our_adapters, random_examples, training_step
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Spread, Work, ratio
from pipeline.adapters.layout import split_layout

MEMBERS, RANKS, LENGTHS, RUNS = (1, 2, 4, 8, 16), (8, 16, 32, 64, 128), (16, 32, 64, 128, 256), (1, 2, 4, 8)
TOKENS = 512
"""Of a step, whatever the length of its rows."""


def rows(setting: Setting) -> Iterator[Row]:
    """Every curve in every dtype."""
    for dtype in setting.dtypes:
        yield from of_members(setting, dtype)
        yield from of_rank(setting, dtype)
        yield from of_length(setting, dtype)
        yield from of_runs(setting, dtype)


def of_members(setting: Setting, dtype: str) -> Iterator[Row]:
    """A forward pass of M members over 4 rows against M passes of one."""
    ours = our_adapters(setting, dtype)
    for members in MEMBERS:
        works, operations = works_of(setting, ours, dtype, members, 4)
        times = setting.alternate(works)
        yield Row(
            "curves", f"{members} members, forward 4 × 32, {dtype}", f"{members} passes of one",
            ratio(times, "together", "alone", 1 / members), curve=True,
            limit=limit_of(times, "products", "together", operations),
        )


def of_rank(setting: Setting, dtype: str) -> Iterator[Row]:
    """A training step at each rank against the lowest one; all adapters lie on one base."""
    ours = our_adapters(setting, dtype, ranks=RANKS, longest=TOKENS // 16)
    examples = random_examples(ours.model, 16, TOKENS // 16)
    products = Products(config_of(setting, dtype), setting.device)

    def step_of(adapter: int) -> Work:
        layout = split_layout(range(16), DRAWS, adapter)
        return lambda: training_step(ours, examples, layout)

    works = {f"rank {rank}": step_of(k) for k, rank in enumerate(RANKS)}
    yield from _of_steps(setting, works, products, f"{{}}, train step 16 × {TOKENS // 16}, {dtype}")


def of_length(setting: Setting, dtype: str) -> Iterator[Row]:
    """A training step over 512 tokens in rows of each length against the shortest."""
    ours = our_adapters(setting, dtype, longest=LENGTHS[-1])
    longest = getattr(ours.model.config.get_text_config(), "max_position_embeddings", LENGTHS[-1])
    products = Products(config_of(setting, dtype), setting.device)

    def step_of(tokens: int) -> Work:
        rows = TOKENS // tokens
        examples, layout = random_examples(ours.model, rows, tokens), split_layout(range(rows), DRAWS)
        return lambda: training_step(ours, examples, layout)

    works = {f"rows of {tokens} tokens": step_of(tokens) for tokens in LENGTHS if tokens <= longest}
    yield from _of_steps(setting, works, products, f"{{}}, train step of {TOKENS}, {dtype}")


def _of_steps(setting: Setting, works: dict[str, Work], products: Products, what: str) -> Iterator[Row]:
    """Training steps of `TOKENS` tokens against the first of them; `what` has a place for the name of each."""
    times, first = setting.alternate({**works, "products": products.work(TOKENS, backward=True)}), next(iter(works))
    for name in works:
        yield Row(
            "curves", what.format(name), first, ratio(times, name, first), curve=True,
            seconds=(Spread.of(times[name]).median,),
            limit=limit_of(times, "products", name, products.operations(TOKENS, backward=True)),
        )


def of_runs(setting: Setting, dtype: str) -> Iterator[Row]:
    """Packs of 2 × 32 tokens against the same passes in turn."""
    alone = our_adapters(setting, dtype, longest=32)
    for runs in RUNS:
        times, operations = measured(setting, dtype, alone, runs, 2, 32)
        yield Row(
            "curves", f"{runs} packed runs of 2 × 32, {dtype}: times as fast", f"{runs} passes in turn",
            ratio(times, "alone", "packed", runs), curve=True,
            limit=limit_of(times, "products", "packed", operations),
        )
