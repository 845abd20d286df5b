"""Faults of whole commands: signals and kills at any time, two commands at once, clocks, and damaged or swapped files.

After each the same commands are given again. They end with 0 and the results of the undisturbed run, to the bit, or
refuse with a sentence that names what is damaged; what was whole is not made again, and no process is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from helpers.commands import Command, leftovers, victim
from pipeline.config import build_config, dump_config, load_config
from pipeline.files import ADAPTER_WEIGHTS, read_json, sha256_file, write_text
from pipeline.run_folder.owner import OWNER
from pipeline.run_folder.paths import Folders, RunPaths, read_status

STAGES = ("train", "evaluate", "report")
SPLITS = ("validation", "calibration", "test")
HOUR = 3600.0
NOTHING: frozenset[str] = frozenset()


@dataclass
class Runs:
    """Undisturbed runs to compare with and to start from, and where disturbed ones lie."""

    folder: Path
    settings: list[str]
    stop_seconds: float = 2.0
    """How long a process stays stopped (SIGSTOP)."""
    whole: dict[int, Path] = field(default_factory=dict)
    """Processes -> a run that nobody disturbed."""
    other: Path = Path()
    """The same with another seed."""
    searched: Path = Path()
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    """(stage, processes) -> how long it took."""
    chance: random.Random = field(default_factory=random.Random)
    fired: list[str] = field(default_factory=list)
    """How the disturbed command ended, for the line that is printed."""

    def words(self, stage: str, run: Path, world: int = 1, seed: int = 0) -> list[str]:
        """The command line of a stage."""
        if stage not in ("train", "search"):
            return [stage, "--run-dir", str(run)]
        config = self.folder / f"settings-{seed}.yaml"
        if not config.exists():
            write_text(config, dump_config(load_config(None, [*self.settings, f"train.seed={seed}"])))
        return [stage, "--run-dir", str(run), "--config", str(config), f"launch.processes={world}"]

    def command(
        self, stage: str, run: Path, world: int = 1, seed: int = 0, prepare: Callable[[], None] | None = None
    ) -> Command:
        """Start a stage."""
        shown = Path(tempfile.mkstemp(dir=self.folder, prefix=f"{run.name}-{stage}-", suffix=".out")[1])
        return Command(self.words(stage, run, world, seed), shown, prepare)

    def prepare(self) -> None:
        """Make the undisturbed runs. Raises `RuntimeError` where one does not end well."""
        for world, seed in ((1, 0), (2, 0), (1, 1)):
            run = self.folder / f"whole-{world}-{seed}"
            for stage in STAGES:
                started = time.monotonic()
                self.require(self.command(stage, run, world, seed))
                self.seconds.setdefault((stage, world), time.monotonic() - started)
            if seed:
                self.other = run
            else:
                self.whole[world] = run

    def prepare_search(self) -> None:
        """Make the undisturbed search, once one is needed."""
        if self.searched == Path():
            run, started = self.folder / "whole", time.monotonic()
            self.require(self.command("search", run))
            self.searched, self.seconds["search", 1] = Folders(run).search, time.monotonic() - started

    @staticmethod
    def require(command: Command) -> None:
        """Raises `RuntimeError` unless it ends with 0."""
        if (code := command.ended()) != 0:
            raise RuntimeError(f"an undisturbed run ended with {code}: {command.said()[-3000:]}")

    def copy(self, stage: str, world: int = 1) -> Path:
        """A run folder that has come as far as `stage` needs it: nothing for train, a trained one for evaluate, …"""
        run = Path(tempfile.mkdtemp(dir=self.folder, prefix="run-"))
        if stage == "train":
            return run
        shutil.copytree(self.whole[world], run, dirs_exist_ok=True)
        paths = RunPaths(run)
        if stage == "evaluate":
            shutil.rmtree(paths.predictions)
            write_text(paths.status, json.dumps({"train": read_status(paths)["train"]}))
        if stage in ("evaluate", "report"):
            for path in (paths.result, paths.report):
                path.unlink()
        return run

    def finish(self, run: Path, world: int = 1, says: tuple[str, ...] = (), broken: frozenset[str] = NOTHING) -> str:
        """Give the commands again until they end; what is wrong with the end, or nothing.

        Args:
            says: a refusal that has one of these words in it is an end, too.
            broken: finished work that may be made again.
        """
        for stage in STAGES:
            before = finished(run)
            command = self.command(stage, run, world)
            code = command.ended()
            if code == 2 and says:
                named = any(word in command.said() for word in says)
                return f"REFUSED by {stage}" if named else f"refused without a name: …{command.said()[-1500:]}"
            if code != 0:
                return f"{stage}, given again, ended with {code}: …{command.said()[-1500:]}"
            after = finished(run)
            again = [what for what, when in before.items() if after.get(what) != when and what not in broken]
            if again:
                return f"{stage}, given again, has made again what was whole: {', '.join(again)}"
        found, expected = results(run), results(self.whole[world])
        wrong = [name for name in expected if found[name] != expected[name]]
        return f"not as undisturbed: {', '.join(wrong)}" if wrong else ""


def finished(run: Path) -> dict[str, int]:
    """Finished work of a run -> when it was written: an adapter that is trained, splits that are predicted."""
    paths, found = RunPaths(run), {}
    status = read_status(paths)
    if status.get("train", {}).get("state") == "done" and (weights := paths.adapter / ADAPTER_WEIGHTS).is_file():
        found["adapter"] = weights.stat().st_mtime_ns
    if status.get("evaluate", {}).get("state") == "done":
        found |= {path.name: path.stat().st_mtime_ns for path in sorted(paths.predictions.glob("*.npz"))}
    return found


def results(run: Path) -> dict[str, Any]:
    """What has to be the same, to the bit."""
    paths = RunPaths(run)
    found: dict[str, Any] = {"adapter": sha256_file(paths.adapter / ADAPTER_WEIGHTS)}
    for split in SPLITS:
        with np.load(paths.predictions / f"{split}.npz", allow_pickle=False) as arrays:
            found[split] = (arrays["row_ids"].tolist(), arrays["log_probs"].tobytes())
    result = read_json(paths.result)
    found |= {name: result[name] for name in ("comparisons", "ensemble", "config_sha256")}
    seconds = {"train_seconds", "evaluate_seconds"}
    found["systems"] = [{key: one[key] for key in one.keys() - seconds} for one in result["systems"]]
    return found


def disturbed(bench: Runs, stage: str, who: str, number: signal.Signals, world: int) -> str:
    """A signal, at any time, to the command, its launcher or one of its ranks."""
    run = bench.copy(stage, world)
    command = bench.command(stage, run, world)
    time.sleep(bench.chance.random() * bench.seconds[stage, world])
    pid = victim(who, command, run, bench.chance)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            if number == signal.SIGSTOP:
                time.sleep(bench.stop_seconds)
                os.kill(pid, signal.SIGCONT)
    code = command.ended()
    bench.fired[:] = [str(code)]
    killed = {-9, 0} if who == "command" else {0, 1}
    expected = {signal.SIGKILL: killed, signal.SIGSTOP: {0}}.get(number, {75, 0, -int(number)})
    if code not in expected:
        return f"ended with {code}, not {sorted(expected)}: …{command.said()[-1500:]}"
    return bench.finish(run, world)


def two_at_once(bench: Runs, first: str, second: str, stopped: bool) -> str:
    """The second command is told who has the folder, also where the first is stopped, and disturbs nothing."""
    run = bench.copy(first)
    one = bench.command(first, run)
    while not (run / OWNER).exists() and one.running:
        time.sleep(0.005)
    time.sleep(bench.chance.random() * bench.seconds[first, 1] / 2)
    if stopped:
        one.send(signal.SIGSTOP)
    raced = not one.running
    two = bench.command(second, run)
    code = two.ended()
    if stopped:
        one.send(signal.SIGCONT)
    over = not one.running
    ended = one.ended()
    bench.fired[:] = [f"{ended} and {code}"]
    if ended != 0:
        return f"the first ended with {ended}: …{one.said()[-1500:]}"
    if code != 2 and not raced and not over:
        return f"the second ended with {code}: …{two.said()[-1500:]}"
    if code == 2 and f"pid {one.pid} on" not in two.said() and not over:
        return f"the second does not say who has the folder: …{two.said()[-1500:]}"
    return bench.finish(run)


def clock_set_back(bench: Runs, stage: str, world: int, killed: bool) -> str:
    """The clock jumps back by an hour while a command works; with it, a rank may be killed."""
    run, calls, real = bench.copy(stage, world), bench.chance.randint(1, 60), time.time

    def prepare() -> None:
        left = [calls]

        def set_back() -> float:
            left[0] -= 1
            return real() - (HOUR if left[0] < 0 else 0.0)

        time.time = set_back

    command = bench.command(stage, run, world, prepare=prepare)
    if killed:
        time.sleep(bench.chance.random() * bench.seconds[stage, world])
        if (pid := victim("rank", command, run, bench.chance)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    code = command.ended()
    bench.fired[:] = [str(code)]
    if code not in ({0, 1} if killed else {0}):
        return f"ended with {code}: …{command.said()[-1500:]}"
    if bench.chance.random() < 0.5:  # files of the future, as a clock that was wrong leaves them
        for path in run.rglob("*"):
            os.utime(path, (real() + HOUR, real() + HOUR))
    return bench.finish(run, world)


ARTEFACTS = {
    "adapter weights": f"adapter/{ADAPTER_WEIGHTS}", "adapter settings": "adapter/adapter_config.json",
    "adapter manifest": "adapter/manifest.json", "validation": "predictions/validation.npz",
    "calibration": "predictions/calibration.npz", "test": "predictions/test.npz",
    "members": "predictions/members.json", "configuration": "config.yaml", "status": "status.json",
    "result": "result.json", "mark": "made_by.json", "adapter": "adapter", "predictions": "predictions",
}


def damaged(bench: Runs, what: str, how: str) -> str:
    """A file, or a folder, is deleted, cut, changed by a bit, or another run's, between two stages."""
    later = what in ("predictions", *SPLITS, "members", "result")  # is not there before
    stage = bench.chance.choice(("report", "done") if later else STAGES)
    run = bench.copy("done" if what == "result" else stage if stage != "train" else "done")
    path = run / ARTEFACTS[what]
    if how == "deleted":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "swapped":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        source = bench.other / ARTEFACTS[what]
        shutil.copytree(source, path) if source.is_dir() else shutil.copy2(source, path)
    else:
        break_file(bench.chance.choice(sorted(path.iterdir())) if path.is_dir() else path, how, bench.chance)
    bench.fired[:] = [f"before {stage}"]
    predicted = frozenset(f"{split}.npz" for split in SPLITS)
    broken = frozenset({f"{what}.npz"}) if what in SPLITS else predicted
    if what not in (*SPLITS, "members", "predictions", "result"):
        broken = frozenset({"adapter", *predicted})  # what is trained again is predicted with again
    return bench.finish(run, says=(str(run),), broken=broken)


def edited(bench: Runs, key: str, new: object) -> str:
    """config.yaml is edited between training and what follows: nothing is reported of another configuration."""
    run = bench.copy("evaluate")
    section, name = key.split(".")
    tree = load_config(RunPaths(run).config).model_dump(mode="json")
    tree[section][name] = new
    write_text(RunPaths(run).config, dump_config(build_config(tree)))
    codes = []
    for stage in STAGES[1:]:
        command = bench.command(stage, run)
        codes.append(command.ended())
        if codes[-1] == 2:
            named = str(run) in command.said() or "config.yaml" in command.said()
            bench.fired[:] = ["2"]
            return "REFUSED" if named else f"refused without a name: …{command.said()[-1500:]}"
    bench.fired[:] = [str(codes)]
    return f"accepted with {codes}"


def break_file(path: Path, how: str, chance: random.Random) -> None:
    """Cut a file off, or change a bit of it."""
    content = bytearray(path.read_bytes())
    place = chance.randrange(len(content))
    if how == "truncated":
        del content[place:]
    else:
        content[place] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(content))


def searched(bench: Runs, how: str) -> str:
    """A search that is killed, stopped or damaged, and continued."""
    bench.prepare_search()
    run = bench.folder / f"run-s{bench.chance.randrange(10**9)}"
    folder = Folders(run).search
    if how in ("ledger cut", "trial swapped", "trial damaged"):
        shutil.copytree(bench.searched, folder)
        trials = sorted(path for path in (folder / "trials").iterdir() if (path / "adapter").is_dir())
        if how == "ledger cut":
            break_file(folder / "ledger.jsonl", "truncated", bench.chance)
        elif how == "trial swapped":
            one, two = bench.chance.sample(trials, 2)
            shutil.rmtree(one / "adapter")
            shutil.copytree(two / "adapter", one / "adapter")
        else:
            break_file(bench.chance.choice(trials) / "adapter" / ADAPTER_WEIGHTS, "flipped", bench.chance)
        (folder / "search.json").unlink()
        bench.fired[:] = [how]
    else:
        command = bench.command("search", run)
        time.sleep(bench.chance.uniform(0.2, 1.0) * bench.seconds["search", 1])
        pid = victim(how.split()[0], command, folder, bench.chance)
        if pid is not None:
            os.kill(pid, signal.SIGTERM if how.endswith("asked") else signal.SIGKILL)
        code = command.ended()
        bench.fired[:] = [str(code)]
        expected = {"command asked": {75, 0}, "command killed": {-9, 0}, "launcher killed": {1, 0}}[how]
        if code not in expected:
            return f"ended with {code}, not {sorted(expected)}: …{command.said()[-1500:]}"
    command = bench.command("search", run)
    code = command.ended()
    if code == 2 and str(folder) in command.said():
        return "REFUSED"
    if code != 0:
        return f"given again, it ended with {code}: …{command.said()[-1500:]}"
    found, expected_result = (read_json(place / "search.json") for place in (folder, bench.searched))
    wrong = [name for name in ("best", "best_config", "ensemble") if found[name] != expected_result[name]]
    for one, other in zip(found["trials"], expected_result["trials"], strict=True):
        wrong += [f"{one['name']}: {key} {one[key]}, not {other[key]}" for key in one if one[key] != other.get(key)]
    return f"not as undisturbed: {'; '.join(wrong)}" if wrong else ""


def left_over(bench: Runs, wrong: str) -> str:
    """What is wrong, processes that a case leaves behind included."""
    left = leftovers(120.0)  # a worker of a Ray that was killed takes its time to notice, and leaves
    return f"{wrong} left processes: {left}".strip() if left else wrong


KINDS: list[tuple[str, Callable[..., str], tuple[Any, ...]]] = [
    *((f"kill -9 of a {who}, {stage}, {world} processes", disturbed, (stage, who, signal.SIGKILL, world))
      for who in ("command", "launcher", "rank") for stage, world in (("train", 1), ("train", 2), ("evaluate", 1))),
    *((f"{number.name} to a {who}, {stage}, {world} processes", disturbed, (stage, who, number, world))
      for number, who, stage, world in (
          (signal.SIGTERM, "command", "train", 2), (signal.SIGINT, "command", "train", 1),
          (signal.SIGUSR1, "command", "evaluate", 1), (signal.SIGTERM, "rank", "train", 1),
          (signal.SIGUSR1, "rank", "train", 2), (signal.SIGTERM, "command", "evaluate", 2),
          (signal.SIGSTOP, "rank", "train", 2), (signal.SIGSTOP, "rank", "evaluate", 2),
          (signal.SIGSTOP, "command", "train", 1))),
    *((f"kill -9 of a {who}, report", disturbed, ("report", who, signal.SIGKILL, 1))
      for who in ("command", "launcher")),
    *((f"two commands at once: {one}, {two}{', the first stopped' * halted}", two_at_once, (one, two, halted))
      for one, two, halted in (("train", "train", False), ("train", "train", True), ("train", "evaluate", False),
                               ("evaluate", "train", False), ("evaluate", "report", False))),
    *((f"clock set back, {stage}{', a rank killed' * dead}, {world} processes", clock_set_back, (stage, world, dead))
      for stage, world, dead in (("train", 1, False), ("train", 2, True), ("evaluate", 1, False))),
    *((f"{what} {how}", damaged, (what, how)) for what in ARTEFACTS for how in ("deleted", "truncated", "flipped")
      if what not in ("adapter", "predictions")),
    *((f"{what} {how}", damaged, (what, how)) for what in ("adapter", "predictions") for how in ("deleted", "swapped")),
    *((f"{what} swapped", damaged, (what, "swapped"))
      for what in ("adapter weights", "validation", "test", "members", "configuration", "status", "result")),
    *((f"{key} edited", edited, (key, new)) for key, new in (
        ("train.seed", 7), ("adapter.rate", 0.3), ("data.train_rows", 24), ("model.quantization", "none"))),
    *((f"search: {how}", searched, (how,)) for how in (
        "command asked", "command killed", "launcher killed", "ledger cut", "trial swapped", "trial damaged")),
]
