"""The GPU acceptance: what its pieces report, what is kept between starts, and the table at the end.

A piece is a test with the marker `gpu`. Kept in the results file is what has passed, under the same code, device and
versions; it is not run again. The file is written after every piece, so a start that breaks off loses one of them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import facts
from benchmarks.setting import Setting
from benchmarks.table import Row
from helpers import ROOT
from pipeline.errors import EXIT_OK, EXIT_STOPPED
from pipeline.files import read_json, write_json

ORDER = ("layer", "attention", "decode", "zero", "packs", "export", "large", "memory")
"""Files in the order of a start: what takes least first, and what tells most of the rest."""
LAST_START = 330.0
"""Seconds after which no piece begins on a GPU: the longest takes two minutes, and a start is to end within eight."""
SAME = ("code", "device", "versions")
"""Of the facts: what must be equal for a result to be kept."""
PROPERTY = "figure"
NOTHING = {"what": "", "measured": "", "wanted": ""}


class Figures:
    """What a piece reports beside passed or failed."""

    def __init__(self, item: pytest.Item, small: bool) -> None:
        """`small`: what is measured is not what targets are for, and nothing is said of reaching them."""
        self._item, self._small = item, small

    def add(self, what: str, measured: str, wanted: str = "", **numbers: Any) -> None:
        """A line of the table; `numbers` go into the file."""
        figure = {"what": what, "measured": measured, "wanted": wanted, **numbers}
        self._item.user_properties.append((PROPERTY, figure))

    def rows(self, rows: Iterable[Row]) -> None:
        """Rows of the benchmarks: reported, whether their targets are reached or not."""
        for row in rows:
            _, what, _, measured, *_, wanted, _ = row.cells()
            if self._small and wanted:
                wanted = f"{wanted.partition(',')[0] if row.reached() is None else wanted.rpartition(',')[0]} on a GPU"
            self.add(what, measured, wanted, row=row.as_dict())

    def close(self, what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float) -> None:
        """Every tensor is finite, and within `tolerance` of the largest entry of its counterpart."""
        assert ours.keys() == theirs.keys()
        apart = {name: _apart(ours[name], theirs[name]) for name in ours}
        worst = max(apart, key=apart.__getitem__)
        self.within(what, apart[worst], tolerance, worst)

    def within(self, what: str, apart: float, tolerance: float, where: str = "") -> None:
        """Report a difference, and fail beyond the tolerance."""
        self.add(what, f"{apart:.1e}", f"≤ {tolerance:.1e}", apart=apart, tolerance=tolerance, where=where)
        assert apart <= tolerance, f"{what}: {where} {apart:.2e} beyond {tolerance:.2e}"


def norm_apart(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all tensors together, over the norm of theirs; infinite where ours are not finite."""
    first, second = (
        torch.cat([side[name].detach().double().flatten().cpu() for name in theirs]) for side in (ours, theirs)
    )
    return float((first - second).norm() / second.norm()) if bool(first.isfinite().all()) else float("inf")


def _apart(ours: Tensor, theirs: Tensor) -> float:
    first, second = ours.detach().double().cpu(), theirs.detach().double().cpu()
    if not bool(first.isfinite().all()):
        return float("inf")
    return float((first - second).abs().max()) / max(float(second.abs().max()), 1e-3)


class Acceptance:
    """A plugin of pytest: leaves out what has passed, keeps what passes, prints the table."""

    def __init__(self, results: Path, setting: Setting, writes: bool) -> None:
        """`writes`: not in a worker of xdist, which only leaves out the same pieces."""
        self._results, self._writes, self._started = results, writes, time.monotonic()
        self._limit = LAST_START if setting.device != "cpu" else float("inf")
        self.facts = {**facts(setting, "acceptance"), "code": code_hash(), "device": _device(setting.device)}
        self.pieces: dict[str, dict[str, Any]] = {}
        self._begun: set[str] = set()
        if results.exists():
            before = read_json(results)
            if all(before["facts"].get(name) == self.facts[name] for name in SAME):
                self.pieces = before["pieces"]

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Pieces in their order, without those that have passed."""
        chosen = [item for item in items if self._outcome(item.nodeid) != "passed"]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = sorted(chosen, key=lambda item: ORDER.index(item.path.stem.removeprefix("test_")))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """What begins too late is left to the next start."""
        if time.monotonic() - self._started > self._limit:
            pytest.skip("out of time: the same command goes on with it")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep what a piece has reported."""
        if not self._writes or (report.when != "call" and report.passed):
            return
        if report.nodeid not in self._begun:
            self._begun.add(report.nodeid)
            self.pieces[report.nodeid] = {"outcome": "not run", "seconds": 0.0, "figures": [], "detail": ""}
        piece = self.pieces[report.nodeid]
        piece["seconds"] = round(piece["seconds"] + report.duration, 1)
        if report.skipped:
            piece["detail"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        else:
            piece["outcome"] = report.outcome
            piece["figures"] = [value for name, value in report.user_properties if name == PROPERTY]
            piece["detail"] = "" if report.passed else report.longreprtext[-2000:]
        write_json(self._results, {"facts": self.facts, "pieces": self.pieces})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """All that there is has passed, here or before: 0. Something was left for lack of time: 75."""
        outcomes = {piece["outcome"] for piece in self.pieces.values()}
        undisturbed = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self._writes and undisturbed and outcomes:
            session.exitstatus = EXIT_STOPPED if "not run" in outcomes else EXIT_OK

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """The table."""
        if self._writes:
            terminalreporter.write(f"{table(self.pieces, self.facts)}\n{self._results} has every number.\n")

    def _outcome(self, nodeid: str) -> str:
        return str(self.pieces.get(nodeid, {}).get("outcome", ""))


def table(pieces: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """Every piece with its figures, in the order of the files."""
    title = f"GPU acceptance on {found['device']}, commit {found['commit']}"
    if found["device"] == "cpu":
        title += ": in a small form, whose speeds, sizes and ratios say nothing"
    shown = Table(title=title, title_justify="left")
    for name in ("piece", "what", "measured", "wanted"):
        shown.add_column(name, overflow="fold", no_wrap=name in ("piece", "wanted"))
    shown.add_column("outcome")
    shown.add_column("s", justify="right")
    for nodeid, piece in pieces.items():
        name = nodeid.rpartition("/")[2].removeprefix("test_").replace(".py::test", "")
        outcome = piece["outcome"] if piece["outcome"] != "not run" else f"not run: {piece['detail']}"
        for number, figure in enumerate(piece["figures"] or [NOTHING]):
            own = (name, outcome, f"{piece['seconds']:.0f}") if number == 0 else ("", "", "")
            shown.add_row(own[0], figure["what"], figure["measured"], figure["wanted"], *own[1:])
    text = StringIO()
    Console(file=text, width=160, markup=False).print(shown)
    return text.getvalue()


def code_hash() -> str:
    """Of all that a piece depends on in this checkout: results under other code are no results."""
    places = [ROOT / "pipeline", ROOT / "benchmarks", ROOT / "tests" / "gpu", ROOT / "tests" / "helpers"]
    files = [path for place in places for path in place.rglob("*") if path.suffix in (".py", ".json", ".yaml")]
    digest = hashlib.sha256()
    for path in sorted([*files, ROOT / "tests" / "conftest.py"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _device(name: str) -> str:
    if name == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_name(name))
