"""The stages as functions: what the command checks, starts and writes, with exceptions in place of exit codes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cli import execute
from pipeline.config import RunConfig, dump_config
from pipeline.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER, LoradropError, StageFailed, Stopped, UserError
from pipeline.files import read_json, write_text
from pipeline.plan.request import Request
from pipeline.run_folder.listeners import Callback
from pipeline.run_folder.paths import Folders, RunPaths, read_status, update_status
from pipeline.run_folder.related import SEARCH
from pipeline.stages.processes import begin_training
from pipeline.stages.table import STAGES, Stage

Source = RunConfig | str | Path | None
"""A configuration; a YAML file or the name of a recipe; None: the stage's own recipe."""


def train(
    config: Source, run_dir: str | Path, overrides: Sequence[str] = (), callbacks: Sequence[Callback] = ()
) -> Path:
    """Train one adapter into `run_dir`, or go on with it; the folder of the adapter.

    Args:
        overrides: `key.path=value`, as on the command line.
        callbacks: told of steps, validations and checkpoints. With them the training works in this process, and in no
            other; without, in the processes that `launch` describes.

    Raises:
        UserError: something to mend, before a model is loaded wherever that is possible.
        Stopped: a stop was requested (Ctrl-C); everything is saved, and the same call continues.
        StageFailed: what the stage's log says.
    """
    stage = STAGES["train"]
    if callbacks:
        stage = _InThisProcess(**{**vars(stage), "processes": "none"}, callbacks=tuple(callbacks))
        overrides = [*overrides, "launch.processes=1"]
    return RunPaths(_run(stage, run_dir, config, overrides)).adapter


def search(config: Source, run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Search into the sibling RUN_DIR-search, or go on with it; the content of search.json. Raises as `train`."""
    found: dict[str, Any] = read_json(Folders(_run(STAGES["search"], run_dir, config, overrides)).search / SEARCH)
    return found


def evaluate(run_dir: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Predict validation, calibration and test rows; the folder of the predictions. Raises as `train`."""
    return RunPaths(_run(STAGES["evaluate"], run_dir, None, overrides)).predictions


def report(run_dir: str | Path) -> dict[str, Any]:
    """Score the predictions; the content of result.json, beside which report.html lies. Raises as `train`."""
    stage = replace(STAGES["report"], outcome="")
    found: dict[str, Any] = read_json(RunPaths(_run(stage, run_dir, None)).result)
    return found


def export(run_dir: str | Path, overrides: Sequence[str] = ()) -> Path:
    """Write PEFT folders and prove them with stock PEFT; their folder. Raises as `train`."""
    return RunPaths(_run(STAGES["export"], run_dir, None, overrides)).export


def distill(run_dir: str | Path, unlabelled: str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Teach the run's ensemble to one plain adapter; its run folder, the sibling RUN_DIR-distilled. Raises as `train`.

    Args:
        unlabelled: more rows, whose answers are not needed.
    """
    asked = None if unlabelled is None else str(unlabelled)
    return Folders(_run(STAGES["distill"], run_dir, None, overrides, unlabelled=asked)).distilled


def compare(config: Source, run_dir: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compare methods in the sibling RUN_DIR-compare, or go on; the content of its result.json. Raises as `train`."""
    folder = Folders(_run(STAGES["compare"], run_dir, config, overrides)).comparison
    found: dict[str, Any] = read_json(RunPaths(folder).result)
    return found


@dataclass(frozen=True)
class _InThisProcess(Stage):
    """The training stage without processes of its own: what listens lives here."""

    callbacks: tuple[Callback, ...] = ()

    def load(self) -> Any:
        """The work, of (config, folders)."""
        return self._train

    def _train(self, config: RunConfig, folders: Folders) -> int:
        from pipeline.stages.train import train_run

        if not begin_training(config, folders.run):
            return EXIT_OK
        try:
            train_run(config, folders.run, callbacks=self.callbacks)
        except Exception as error:
            if not isinstance(error, Stopped):
                update_status(RunPaths(folders.run), self.name, "failed", f"{type(error).__name__}: {error}")
            raise
        return EXIT_OK  # in the process group of one: DeepSpeed makes none twice, and the next training needs it


def _run(
    stage: Stage, run_dir: str | Path, config: Source, overrides: Sequence[str] = (), unlabelled: str | None = None
) -> Path:
    """Execute a stage as the command does; its run folder."""
    with _as_file(config) if isinstance(config, RunConfig) else nullcontext(config) as source:
        given = None if source is None else str(source)
        request = Request(given, str(run_dir), tuple(overrides), unlabelled=unlabelled)
        code = execute(stage, request)
    if code != EXIT_OK:
        raise _failure(stage.name, code, request.run)
    return request.run


@contextmanager
def _as_file(config: RunConfig) -> Iterator[Path]:
    """The configuration where the command finds it: in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        write_text(path, dump_config(config))
        yield path


def _failure(stage: str, code: int, run: Path) -> LoradropError:
    """What the command's exit code says, and the run folder of why."""
    if code == EXIT_STOPPED:
        return Stopped(f"{stage} was stopped; the same call continues")
    said = read_status(RunPaths(run)).get(stage, {}).get("detail") or f"see {run / 'logs'}"
    return UserError(stage, None, str(said)) if code == EXIT_USER else StageFailed(f"{stage} failed: {said}")
