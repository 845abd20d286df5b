"""A search of 16 trials in four ways: one trial after another, packed, with early exit, with both."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

from benchmarks.setting import Setting
from benchmarks.table import Row, skipped
from benchmarks.timing import Spread

KEYS = {"packing": "search.pack", "early exit": "search.early_exit"}
WAYS = {"packing": (True, False), "early exit": (False, True), "packing and early exit": (True, True)}
TARGET = "packing and early exit"
AGAINST = "one trial after another, no early exit"


def rows(setting: Setting) -> Iterator[Row]:
    """How many times as fast each way is as the sequential one."""
    lacking = [key for key in KEYS.values() if not setting.here.knows(key)]
    if lacking:
        for way in WAYS:
            yield skipped("factors", f"search with {way}: times as fast", f"no {', '.join(lacking)} here",
                          way if way == TARGET else "")
        return
    seconds: dict[str, list[float]] = {way: [] for way in ("sequential", *WAYS)}
    for number in range(setting.long):
        for way in seconds:
            folder = setting.folder / f"factors-{number}"
            started = time.monotonic()
            setting.here.run("search", folder / "run", settings_of(setting, *WAYS.get(way, (False, False))))
            seconds[way].append(time.monotonic() - started)
            shutil.rmtree(folder)
    for way in WAYS:
        value = Spread.of([a / b for a, b in zip(seconds["sequential"], seconds[way], strict=True)])
        yield Row(
            "factors", f"search of {setting.scale.trials} trials with {way}: times as fast", AGAINST, value,
            target=way if way == TARGET else "",
            seconds=(Spread.of(seconds[way]).median, Spread.of(seconds["sequential"]).median),
        )


def settings_of(setting: Setting, pack: bool, early_exit: bool) -> list[str]:
    """Overrides of one way; trials that are not packed run one at a time."""
    more = [f"search.trials={setting.scale.trials}", f"search.pack={str(pack).lower()}",
            f"search.early_exit={str(early_exit).lower()}"]
    return setting.work_of_default(setting.here, *more, *([] if pack else ["search.concurrent=1"]))
