"""A forward pass of 8 mask members over 16 × 32 tokens, without gradient."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.passes import config_of, our_adapters, random_examples, reading
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Work, faster, ratio
from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member

ROWS, TOKENS, MEMBERS = 16, 32, 8


def rows(setting: Setting) -> Iterator[Row]:
    """One pass against one member at a time; the share of the products in the faster dtype."""
    works: dict[str, Work] = {}
    operations = 0
    for dtype in setting.dtypes:
        of_dtype, operations = works_of(setting, our_adapters(setting, dtype), dtype, MEMBERS, ROWS)
        works |= {f"{name} {dtype}": work for name, work in of_dtype.items()}
    times = setting.alternate(works)
    limits = {d: limit_of(times, f"products {d}", f"together {d}", operations) for d in setting.dtypes}
    what = f"forward of {MEMBERS} members, {ROWS} × {TOKENS}"
    for dtype in setting.dtypes:
        value = ratio(times, f"together {dtype}", f"alone {dtype}", 1 / MEMBERS)
        yield Row("forward", f"{what}, {dtype}", f"{MEMBERS} passes of one", value, limit=limits[dtype])
    best = faster(times, [f"together {dtype}" for dtype in setting.dtypes]).split()[-1]
    yield Row("forward", f"{what}, {best}", "its products alone", limits[best].share, "%", "share of a forward",
              limits[best])


def works_of(
    setting: Setting, ours: Adapters, dtype: str, members: int, rows: int
) -> tuple[dict[str, Work], int]:
    """`together`, `alone` (one member) and `products` of all, and the operations of these."""
    examples = random_examples(ours.model, rows, TOKENS)
    products = Products(config_of(setting, dtype), setting.device)
    everyone = [Member(0, draw) for draw in range(members)]
    vectors = members * rows * TOKENS
    works: dict[str, Work] = {
        "together": lambda: reading(ours, examples, everyone),
        "alone": lambda: reading(ours, examples, everyone[:1]),
        "products": products.work(vectors, backward=False),
    }
    return works, products.operations(vectors, backward=False)
