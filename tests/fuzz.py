"""`python tests/fuzz.py --cases 5000 --seed 1`: hostile cases over all that a user gives (tests/helpers/fuzz).

Prints the counts by kind and outcome and, of every case that failed, its number: `--seed S --case N` shows it again.
Exits with 1 where one failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
import traceback
import types
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

from helpers.fuzz import material  # noqa: E402
from helpers.fuzz.kinds import HEAVY, KINDS, kind_of, make_case, numbers_of  # noqa: E402
from helpers.fuzz.sandbox import Ended, run_case  # noqa: E402

OUTCOMES = ("refused", "accepted", "traceback", "hang", "leftover", "control", "silent", "code", "lost")
MOST_SHOWN = 40
MOST_SAID = 20_000


def main() -> int:
    """Run the cases; 0 where all of them ended as they must."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=list(KINDS), help="cases of this kind alone")
    parser.add_argument("--case", type=int, help="this one alone, with what it is and what it said")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once")
    asked = parser.parse_args()
    numbers = [asked.case] if asked.case is not None else numbers_of(asked.kind, asked.cases)
    heavy = [number for number in numbers if kind_of(number) in HEAVY]
    light = [number for number in numbers if kind_of(number) not in HEAVY]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder).resolve()
        material.make(work / "base")
        load_light()
        ended = run_all(light, asked.seed, asked.jobs, work)
        if heavy:  # last: a process with torch is slower to fork
            load_heavy(work / "base")
            ended |= run_all(heavy, asked.seed, asked.jobs, work)
    if asked.case is not None:
        print(make_case(asked.seed, asked.case).text(asked.case), ended[asked.case].output, sep="\n\n")
    wrong = {number: one for number, one in sorted(ended.items()) if one.wrong}
    print_counts(ended, asked.seed, time.monotonic() - started)
    for number, one in list(wrong.items())[:MOST_SHOWN]:
        print(f"--seed {asked.seed} --case {number} {kind_of(number)}: {one.outcome}: {ascii(one.detail)}")
    return 1 if wrong else 0


def run_all(numbers: list[int], seed: int, jobs: int, work: Path) -> dict[int, Ended]:
    """Case number -> how it ended; `jobs` forked workers share the numbers."""
    workers = []
    for job in range(jobs):
        worker = os.fork()
        if worker == 0:
            code = 1
            try:
                work_off(numbers[job::jobs], seed, work, work / f"job{job}")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        workers.append(worker)
    found: dict[int, Ended] = {}
    for job, worker in enumerate(workers):
        os.waitpid(worker, 0)
        lines = (work / f"job{job}" / "ended.jsonl").read_text(encoding="utf-8").splitlines()
        found |= {number: Ended(*rest) for number, *rest in map(json.loads, lines)}
    return found | {number: Ended("lost", "its worker ended", "") for number in set(numbers) - set(found)}


def work_off(numbers: list[int], seed: int, work: Path, own: Path) -> None:
    """Run cases in the folder `own`; a line in ended.jsonl for each."""
    own.mkdir(exist_ok=True)
    with open(own / "ended.jsonl", "w", encoding="utf-8") as file:
        for number in numbers:
            ended = run_case(make_case(seed, number), own, work / "base")
            file.write(json.dumps([number, ended.outcome, ended.detail, ended.output[:MOST_SAID]]) + "\n")
            file.flush()


def load_light() -> None:
    """All that a --dry-run and a report's reading import; the memory plan, which builds a model, is left out."""
    import pyarrow.parquet  # noqa: F401

    import pipeline.plan.preflight
    import pipeline.plan.resolve
    import pipeline.plan.steps
    import pipeline.report.inputs
    import pipeline.stages.verify  # noqa: F401
    import tune.space  # noqa: F401

    plan = types.ModuleType("pipeline.plan.memory_table")
    plan.memory_table = lambda *_: ""  # type: ignore[attr-defined]
    sys.modules[plan.__name__] = plan
    gc.freeze()


def load_heavy(base: Path) -> None:
    """What `data` imports."""
    if "torch" not in sys.modules:
        import pipeline.stages.data
        from pipeline.config import ModelConfig

        pipeline.stages.data.load_tokenizer(ModelConfig(path=str(base / "model")))
        gc.freeze()


def print_counts(ended: dict[int, Ended], seed: int, seconds: float) -> None:
    """A line for each kind."""
    counts = Counter((kind_of(number), one.outcome) for number, one in ended.items())
    print(f"{len(ended)} cases, seed {seed}, {seconds:.0f} s\n{'':14}" + "".join(f"{name:>10}" for name in OUTCOMES))
    for kind in KINDS:
        if any(found == kind for found, _ in counts):
            print(f"{kind:14}" + "".join(f"{counts[kind, name]:>10}" for name in OUTCOMES))
    print(f"{'together':14}" + "".join(f"{sum(counts[kind, name] for kind in KINDS):>10}" for name in OUTCOMES))


if __name__ == "__main__":
    sys.exit(main())
