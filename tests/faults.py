"""Break tiny runs in seeded ways, give the same commands again, and compare with runs that nothing broke.

    python tests/faults.py --cases 200 --seed 1            # --long: stopped processes stay so for 60 s
    python tests/faults.py --case 17 --seed 1              # one of them again

Two kinds: faults at chosen points of a stage's processes (`helpers/faults.py`), and faults of whole commands at any
time (`helpers/command_faults.py`). Each ends as the undisturbed run, to the bit, or with a refusal that names what is
damaged; anything else is LOST, and the exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])

import torch  # noqa: E402
from helpers import command_faults, faults  # noqa: E402
from helpers.commands import become_reaper  # noqa: E402

from pipeline.support.tiny import write_tiny_data, write_tiny_model  # noqa: E402

Case = tuple[str, Callable[[], str], Callable[[], list[str]]]
"""Its name; what does it and says what is wrong; how the broken process ended."""


def cases_of(seed: int, points: faults.Bench, commands: command_faults.Runs) -> Callable[[int], Case]:
    """Case number -> the case: all kinds in a seeded order, then in another, …"""
    kinds: list[Case] = []
    for name, inject, point in faults.KINDS:
        kinds.append((name, partial(inject, points, point), lambda: points.fired))
    for name, disturb, arguments in command_faults.KINDS:
        kinds.append((name, partial(disturb, commands, *arguments), lambda: commands.fired))

    def case(number: int) -> Case:
        turn, place = divmod(number, len(kinds))
        order = random.Random(f"{seed} {turn}").sample(range(len(kinds)), len(kinds))
        return kinds[order[place]]

    return case


def work(numbers: list[int], seed: int, points: faults.Bench, commands: command_faults.Runs, report: int) -> None:
    """Run cases in turn in this process; a line of JSON for each."""
    become_reaper()
    case = cases_of(seed, points, commands)
    for number in numbers:
        name, run, fired = case(number)
        for chance in (points.random, commands.chance):
            chance.seed(f"{seed} {number}")
        points.fired.clear(), commands.fired.clear()
        started = time.monotonic()
        try:
            wrong = command_faults.left_over(commands, run())
        except Exception as error:  # of the case itself
            wrong = command_faults.left_over(commands, f"{type(error).__name__}: {error}")
        beginnings = {"SKIPPED": "skipped", "REFUSED": "refused"}
        verdict = next((v for word, v in beginnings.items() if wrong.startswith(word)), "LOST" if wrong else "same")
        row = [number, name, verdict, ", ".join(fired()), round(time.monotonic() - started, 1), wrong]
        os.write(report, (json.dumps(row)[:3900] + "\n").encode() if len(json.dumps(row)) < 3900 else
                 (json.dumps([*row[:5], wrong[-2500:]]) + "\n").encode())
        for path in commands.folder.glob("run-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> int:
    """Run the cases, in several processes; prints a line each and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--kind", default="", help="only cases whose name has this in it")
    parser.add_argument("--seed", type=int, default=0, help="of their order, and of the points in time, files and bits")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    parser.add_argument("--long", action="store_true", help="stopped processes stay so for 60 s")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    faults.import_all()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    counts: Counter[str] = Counter()
    started = time.monotonic()
    try:
        base = [
            f"model.path={write_tiny_model(folder / 'model')}",
            f"data.path={write_tiny_data(folder / 'rows.jsonl', 300)}",
        ]
        # As many adapters as trials: none is stopped early. Which ones are depends on the order in which they report.
        settings = [*base, *faults.SETTINGS, "search.trials=3", "search.max_steps=6", "search.adapters=3"]
        commands = command_faults.Runs(folder, settings, 60.0 if arguments.long else 2.0)
        points = faults.Bench(folder, base, {}, random.Random(0), [])
        points.prepare()
        commands.prepare()
        print(f"undisturbed runs made in {time.monotonic() - started:.0f} s", flush=True)
        case = cases_of(arguments.seed, points, commands)
        numbers = list(range(arguments.cases)) if arguments.case is None else [arguments.case]
        numbers = [number for number in numbers if arguments.kind in case(number)[0]]
        ours, theirs = os.pipe()
        for job in range(arguments.jobs):
            if not os.fork():
                code = 1
                try:
                    own = command_faults.Runs(**{**vars(commands), "folder": folder / f"job-{job}"})
                    own.folder.mkdir()
                    bench = faults.Bench(own.folder, base, points.references, random.Random(0), [])
                    work(numbers[job :: arguments.jobs], arguments.seed, bench, own, theirs)
                    code = 0
                finally:
                    sys.stdout.flush()
                    os._exit(code)
        os.close(theirs)
        with os.fdopen(ours) as lines:
            for line in lines:
                number, name, verdict, ended, seconds, wrong = json.loads(line)
                counts[verdict] += 1
                print(f"{number:4} {name:58} {ended:22} {verdict} ({seconds} s) {wrong}", flush=True)
        failed = sum(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in range(arguments.jobs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    done, wanted = sum(counts.values()), len(numbers)
    print(f"{done} cases: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in sorted(counts)), end="")
    print(f" ({time.monotonic() - started:.0f} s)")
    return 1 if counts["LOST"] or failed or done != wanted else 0


if __name__ == "__main__":
    sys.exit(main())
