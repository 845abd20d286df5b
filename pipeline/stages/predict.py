"""`loradrop predict`: the chosen, calibrated ensemble of a run on new rows, JSON Lines out.

Answers are appended in the order of the rows, so that a row that is in the output already is not computed again: its
line carries a hash of the row and of all that decides the answer. The command itself reads the rows once and says all
that is wrong before a model is loaded; the processes of `predict_rows` share each chunk of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.read import read_file
from pipeline.data.rows import Row
from pipeline.data.splits import Splits, load_splits
from pipeline.distributed.nodes import check_nodes, owned_folders
from pipeline.ensemble.readout import EvaluatedRun, free_text
from pipeline.ensemble.rows import RowForm, checked, chunks
from pipeline.errors import EXIT_OK, ConfigError, RunFolderError, Stopped
from pipeline.files import cut_torn_line, full_disk_named, open_append, read_json, read_json_lines, write_json
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_saved
from pipeline.run_folder.mark import require_mark
from pipeline.run_folder.paths import Folders, RunPaths, update_status
from pipeline.stages.processes import start
from pipeline.terminal import Progress, say

ROWS = "predict_rows"
"""The stage of the processes."""
PLAN, SPOOL = "predict.json", "predict_input.jsonl"
"""In logs/ of the run folder: what is to be predicted; rows that came through standard input."""
CHUNK_ROWS = 256
"""Rows that are predicted, and written, together."""


def predict(request: Request) -> int:
    """Predict the rows of --input into --output; the exit code.

    Raises:
        UserError: something to mend in rows, run folder or output, before a model is loaded.
    """
    if request.input is None or request.output is None:
        raise ConfigError("predict", None, "needs --input FILE (or -) and --output FILE", "See loradrop --help.")
    require_mark(request.run, "run", "comparison")
    config = resolve_saved(request, "predict")
    check_nodes(config.launch, "predict", "all", ["predict"])
    splits = load_splits(config.data)
    run = EvaluatedRun.open(RunPaths(request.run), config, splits)
    readout, form = run.readout(), RowForm.of_run(config, splits)
    if readout.kind == "completion":
        raise free_text(request.run)
    threshold = None if request.abstain is None else run.threshold(readout, request.abstain)
    with owned_folders([request.run], "predict", config.launch):
        source = _source(request.input, request.run, config.launch.nodes)
        output = _usable(request.output)
        identity = f"{run.identity(readout)} {request.abstain}"
        rows, done = compare(checked(form.read(read_file(source)), request.input), output, identity)
        if threshold is not None:
            say(f"confidence {threshold.confidence:.4f} or more is answered: {threshold.guarantee}")
        if request.dry_run or done == rows:
            say(f"{done} of {rows} rows are in {request.output} already")
            return EXIT_OK
        plan = {"input": str(source), "output": str(output), "abstain": request.abstain, "rows": rows}
        write_json(request.run / "logs" / PLAN, plan)
        code = start(ROWS, config, Folders(request.run))
    if code == EXIT_OK:
        say(f"{rows - done} rows predicted -> {request.output}")
    return code


def predict_rows(run_dir: Path, trusted: bool = False) -> None:
    """Predict what logs/predict.json says and is not in the output yet; one of several processes.

    Raises:
        Stopped: a stop was requested; the chunks that are written stay.
    """
    from pipeline.distributed.lifeline import stop_asked, work_begins
    from pipeline.distributed.world import gather_objects, leave_world, require_shared_folder, start_world
    from pipeline.ensemble.ensemble import Ensemble, as_dict
    from pipeline.training.published import main_writes

    paths = RunPaths(run_dir)
    plan = read_json(run_dir / "logs" / PLAN, "Start it as `loradrop predict`.")
    output, risk = Path(plan["output"]), plan["abstain"]
    world = start_world()
    require_shared_folder(run_dir)
    ensemble = Ensemble.load(run_dir, trust_remote_code=trusted, world=world)
    assert ensemble.run is not None  # the folder is a run's
    threshold = None if risk is None else ensemble.threshold(risk)
    identity = f"{ensemble.identity} {risk}"
    done: int = gather_objects(cut_torn_line(output) if world.is_main else None)[0]
    rows = asked_rows(ensemble.run.splits, ensemble.form, plan["input"], plan.get("training", False))
    next(islice(rows, done, done), None)  # passes over them
    work_begins()
    if world.is_main:
        update_status(paths, ROWS, "running")
    progress = Progress(plan["rows"], done, world.is_main, unit="row")
    shown = [f"{len(ensemble.members)} member{'s' * (len(ensemble.members) > 1)}", f"{world.world_size} processes"]
    try:
        for chunk in chunks(rows, CHUNK_ROWS):
            answers = ensemble.answers(chunk, threshold, stop_asked=lambda: stop_asked(paths))
            lines = [
                {"row": number, **as_dict(answer), "made_from": made_from(identity, row)}
                for number, (answer, row) in enumerate(zip(answers, chunk, strict=True), start=done + 1)
            ]
            main_writes(world, partial(_append, output, lines))
            done += len(chunk)
            progress.show(done, shown)
    except Stopped as error:
        if world.is_main:
            update_status(paths, ROWS, "stopped", f"after {done} rows")
            paths.stop_request.unlink(missing_ok=True)
        leave_world()
        raise Stopped(f"stopped after {done} rows; the same command continues") from error
    progress.close()
    if world.is_main:
        update_status(paths, ROWS, "done")
    leave_world()


def asked_rows(splits: Splits, form: RowForm, source: str | None, training: bool) -> Iterator[Row]:
    """The rows to be predicted: those of a file; or those of training, and then what a file has beside them.

    Raises:
        DataError: faults of the file.
    """
    rows = iter(()) if source is None else checked(form.read(read_file(Path(source))), source)
    if not training:
        yield from rows
        return
    yield from splits.train
    known = {row.question for row in splits.train}
    for row in rows:
        if row.question not in known:
            yield replace(row, id=f"unlabelled/{row.id}")  # which none of training has


def made_from(identity: str, row: Row) -> str:
    """What a line was made from: the ensemble, the risk and the row, but for its right answer."""
    asked = json.dumps([identity, row.id, row.prompt, row.second, row.choices])
    return hashlib.sha256(asked.encode()).hexdigest()[:16]


def _source(given: str, run: Path, nodes: int) -> Path:
    """The file with the rows; standard input is written into one, which all processes can read.

    Raises:
        ConfigError: no file; standard input, and several nodes that would each have one.
    """
    if given != "-":
        path = _absolute(given, "--input")
        if not path.is_file():
            what = "is no regular file" if path.exists() else "does not exist"
            raise ConfigError("--input", given, what, "Give a file with rows, or - for standard input.")
        return path
    if nodes > 1:
        raise ConfigError("--input", "-", f"is another one on each of {nodes} nodes", "Give a file that all see.")
    target = run / "logs" / SPOOL
    with full_disk_named(run):
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        with open_append(target) as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return target


def _usable(given: str) -> Path:
    """The output. Raises `ConfigError` where no file can be written there."""
    path, what = _absolute(given, "--output"), ""
    if given == "-" or path.is_dir():
        what = "is no file: what is written is continued by the same command"
    elif not path.parent.is_dir():
        what = f"cannot be made: {path.parent} is no folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        what = "cannot be written to"
    if what:
        raise ConfigError("--output", given, what, "Name a new file, such as answers.jsonl.")
    return path


def _absolute(given: str, field: str) -> Path:
    """The path of a file. Raises `ConfigError` where it is below the home of nobody."""
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(field, given, f"cannot be used ({error})", "Write the path out.") from error


def compare(rows: Iterator[Row], output: Path, identity: str) -> tuple[int, int]:
    """(rows in all; those that are in the output already).

    Raises:
        DataError: faults of the rows.
        RunFolderError: a line of the output that answers another row, or is of another run.
    """
    lines, count, done = read_json_lines(output), 0, 0
    for count, row in enumerate(rows, start=1):
        line = next(lines, None)
        if line is not None and (line.get("id"), line.get("made_from")) != (row.id, made_from(identity, row)):
            raise _another(output, count)
        done += line is not None
    if next(lines, None) is not None:
        raise _another(output, count + 1)
    return count, done


def _another(output: Path, number: int) -> RunFolderError:
    what = "was made from other rows, another run, or under another --abstain"
    return RunFolderError(f"{output}:{number}", None, what, "Give another --output, or remove the file.")


def _append(output: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines to the output, and have them on the disk. Raises `DiskFull`."""
    text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    with full_disk_named(output.parent), open_append(output) as file:
        left = memoryview(text.encode())
        while left:
            left = left[file.write(left):]
        os.fsync(file.fileno())
