"""A search of 16 trials in four ways: one trial after another, packed, with early exit, with both.

Successive halving is on in all of them: early exit is what comes beside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.commands import put_away
from benchmarks.setting import Setting
from benchmarks.table import Row, skipped
from benchmarks.timing import Spread

PACK, EXIT = "search.pack", "search.early_exit.factor"
PACKED = {True: (f"{PACK}=auto",), False: (f"{PACK}=off", "search.concurrent=1")}
EARLY = {True: (f"{EXIT}=1.1", "search.early_exit.validations=2"), False: (f"{EXIT}=null",)}
LONG = ("search.max_steps=24", "train.validate_every_steps=4")
"""Trials must be validated several times for an early exit; at full scale alone."""
WAYS = {"packing": (True, False), "early exit": (False, True), "packing and early exit": (True, True)}
"""name, which is also that of a target -> (packed, early exit)."""


def rows(setting: Setting) -> Iterator[Row]:
    """How many times as fast each way is as the sequential one."""
    lacking = [key for key in (PACK, EXIT) if not setting.here.knows(key)]
    if lacking:
        for way in WAYS:
            yield skipped("factors", f"search with {way}: times as fast", f"no {' and no '.join(lacking)} here",
                          _target(way))
        return
    seconds: dict[str, list[float]] = {way: [] for way in ("sequential", *WAYS)}
    for number in range(setting.long):
        for way in seconds:
            name = way.replace(" ", "-")
            folder = setting.folder / f"{name}-{number}"
            started = time.monotonic()
            setting.here.run("search", folder / "run", settings_of(setting, *WAYS.get(way, (False, False))))
            seconds[way].append(time.monotonic() - started)
            put_away(setting, folder)
    for way in WAYS:
        value = Spread.of([a / b for a, b in zip(seconds["sequential"], seconds[way], strict=True)])
        yield Row(
            "factors", f"search of {setting.scale.trials} trials with {way}: times as fast",
            "one trial after another, no early exit", value, target=_target(way),
            seconds=(Spread.of(seconds[way]).median, Spread.of(seconds["sequential"]).median),
        )


def settings_of(setting: Setting, pack: bool, early_exit: bool) -> list[str]:
    """Overrides of one way; trials that are not packed run one at a time."""
    steps = LONG if setting.scale.trials >= 16 else ()
    trials = f"search.trials={setting.scale.trials}"
    return setting.work_of_default(setting.here, trials, *steps, *PACKED[pack], *EARLY[early_exit])


def _target(way: str) -> str:
    return way if way == "packing and early exit" else ""
