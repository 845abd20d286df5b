"""The command: which cases, how often, against what; a table, Markdown, JSON."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import CASES
from benchmarks.checkout import ROOT, Checkout, commit_of, open_checkout
from benchmarks.setting import SCALES, Setting
from benchmarks.table import Row, document, markdown, print_table, skipped
from pipeline.config import load_config
from pipeline.errors import EXIT_FAILED, EXIT_OK, LoradropError, UserError
from pipeline.files import write_json

DESCRIPTION = """\
Measure what the product costs, as ratios in alternating rounds: medians, spread, targets, and the share that is reached
of what the machine's matrix products allow. How to read and repeat it: docs/benchmarks.md.
"""


def parser() -> argparse.ArgumentParser:
    """Its arguments."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("words", nargs="*", metavar="CASE key=value",
                      help="cases (default: all but large and curves), and overrides, such as model.path=…")
    made.add_argument("--list", action="store_true", help="name the cases, and measure nothing")
    made.add_argument("--scale", choices=sorted(SCALES), default="full", help="rounds, and rows of whole commands")
    made.add_argument("--repeats", type=int, metavar="N", help="rounds of everything, in place of the scale's")
    made.add_argument("--against", metavar="COMMIT-or-FOLDER", help="another checkout, for the cases of whole commands")
    made.add_argument("--device", default="cpu", metavar="cpu|cuda", help="of single passes (default cpu)")
    made.add_argument("--clock", choices=("wall", "cpu"), default="wall",
                      help="of single passes; cpu: processor time, for a machine that others use, too")
    made.add_argument("--curves", action="store_true", help="scaling curves, too")
    made.add_argument("--markdown", action="store_true", help="print Markdown")
    made.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the run folders of whole commands there")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every row, as each case ends")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 where a case failed, 2 where something given is wrong."""
    given = parser().parse_intermixed_args(argv)
    try:
        return _list() if given.list else _measure(given)
    except LoradropError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return error.exit_code


def _list() -> int:
    for case in CASES.values():
        tail = [*(["whole commands"] if case.commands else []), *(["only where asked for"] if case.asked else [])]
        print(f"{case.name:12} {case.help}{f' ({chr(44).join(tail)})' if tail else ''}")
    return EXIT_OK


def _measure(given: argparse.Namespace) -> int:
    names = [word for word in given.words if "=" not in word]
    _check(given, names)
    chosen = [CASES[name] for name in names] or [case for case in CASES.values() if not case.asked]
    if given.curves and CASES["curves"] not in chosen:
        chosen.append(CASES["curves"])

    from benchmarks.machine import facts, lines

    with open_checkout(given.against) as against, tempfile.TemporaryDirectory(prefix="loradrop-benchmarks-") as folder:
        here = Checkout(ROOT, commit_of(ROOT))
        setting = Setting(
            SCALES[given.scale], Path(folder), here, against, given.device, given.clock, given.repeats,
            tuple(word for word in given.words if "=" in word), given.keep and given.keep.absolute(),
        )
        for checkout in setting.sides.values():
            checkout.knows("train.max_steps")  # refuses a folder without the product before anything is measured
        found = facts(setting, given.scale)
        rows: list[Row] = []
        failed = False
        for number, case in enumerate(chosen, start=1):
            print(f"{number}/{len(chosen)} {case.name}: {case.help}", file=sys.stderr, flush=True)
            try:
                rows += case.run(setting)
            except LoradropError as error:
                failed = True
                print(f"benchmarks: {error}", file=sys.stderr)
                rows.append(skipped(case.name, case.help, "it failed, see above"))
            if given.json is not None:
                write_json(given.json, document(rows, found))
        if given.markdown:
            print(markdown(rows, lines(found)))
        else:
            print_table(rows, lines(found))
    return EXIT_FAILED if failed else EXIT_OK


def _check(given: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises `UserError` before anything is measured."""
    for name in names:
        if name not in CASES:
            raise UserError("case", name, "is none", f"There are {', '.join(CASES)}.")
    load_config("default", [word for word in given.words if "=" in word])  # a wrong key or value is refused by name
    if given.repeats is not None and given.repeats < 1:
        raise UserError("--repeats", given.repeats, "must be 1 or more")
    if given.json is not None and not given.json.absolute().parent.is_dir():
        raise UserError("--json", str(given.json), "lies in a folder that does not exist", "Make it, or name another.")
    if given.device != "cpu":
        import torch

        if not given.device.startswith("cuda") or not torch.cuda.is_available():
            raise UserError("--device", given.device, "is not there", "Give cpu, or cuda where torch sees a device.")
