"""metrics.jsonl, and TensorBoard and Weights & Biases behind the call that writes it. Main process only."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.launch import LoggingConfig, WandbConfig
from pipeline.errors import RunFolderError, SetupError
from pipeline.files import full_disk_named, open_append, read_json, read_json_lines, write_json, write_text

WANDB_IDENTITY = "wandb.json"
"""In the run folder: the id under which a resumed run continues."""


class Logger(Protocol):
    """Takes the numbers of one metrics row."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Record `values` under `kind`/name."""

    def close(self) -> None:
        """Flush and end."""


def check_loggers(settings: LoggingConfig) -> None:
    """Raises `SetupError` where a package that the configuration asks for is not installed."""
    asked = {"tensorboard": settings.tensorboard, "wandb": settings.wandb is not None}
    for package, on in asked.items():
        if on and importlib.util.find_spec(package) is None:
            raise SetupError(
                f"logging.{package}", None, f"needs the package {package}, which is not installed",
                f"Run `pip install {package}` in the environment of this command, or switch it off.",
            )


def open_loggers(settings: LoggingConfig, config: Mapping[str, Any], run_dir: Path, step: int) -> list[Logger]:
    """What the settings ask for; a resumed run goes on after `step` where it left off.

    Args:
        config: of the whole run, to be shown beside its numbers.
    """
    check_loggers(settings)
    loggers: list[Logger] = []
    if settings.tensorboard:
        loggers.append(TensorBoard(run_dir / "tensorboard", step))
    if settings.wandb is not None:
        loggers.append(WeightsAndBiases(settings.wandb, config, run_dir))
    return loggers


class TensorBoard:
    """Event files; those of steps that are done again are hidden by `purge_step`."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run folder. `step` is a metric of its own, so that steps done again after a resume are taken."""

    def __init__(self, settings: WandbConfig, config: Mapping[str, Any], run_dir: Path) -> None:
        import wandb

        identity = run_dir / WANDB_IDENTITY
        if not identity.exists():
            write_json(identity, {"id": secrets.token_hex(4)})
        self._run: Any = wandb.init(
            project=settings.project, name=settings.name or run_dir.name, mode=settings.mode, dir=str(run_dir),
            id=read_json(identity)["id"], resume="allow", config=dict(config),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One history row."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


def read_metrics(path: Path, **numbers: Collection[str]) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl, each with its `kind` and its `step`; none where no file is.

    Args:
        numbers: kind -> names of the numbers that each row of this kind must have.

    Raises:
        RunFolderError: naming the line, where one is no such row.
    """
    for line, row in enumerate(read_json_lines(path), start=1):
        kind, step = row.get("kind"), row.get("step")
        lacking = [] if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63 else ["step"]
        if isinstance(kind, str):
            lacking += [name for name in numbers.get(kind, ()) if not _is_number(row.get(name))]
        else:
            lacking.append("kind")
        if lacking:
            what = f"is damaged: no {', no '.join(lacking)} that could be one"
            raise RunFolderError(f"{path}:{line}", None, what, "Remove that line, or restore the file.")
        yield row


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > sys.float_info.max


class Metrics:
    """Append-only JSON lines, flushed row by row, and whatever else listens. Silent on all but the main process."""

    def __init__(self, path: Path, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        self._loggers: list[Logger] = []

    def send_to(self, loggers: Iterable[Logger]) -> None:
        """Pass the numbers of every further row on to these."""
        self._loggers.extend(loggers)

    def close(self) -> None:
        """End what was opened beside the JSON lines."""
        while self._loggers:
            self._loggers.pop().close()

    def keep_until(self, step: int, validated: bool) -> None:
        """After a resume: forget rows of steps that are done again, and of the last validation if that is."""
        if self._enabled and self._path.exists():
            rows = [row for row in read_metrics(self._path) if row["step"] <= step]
            if not validated:
                rows = [row for row in rows if row["kind"] != "validation" or row["step"] != step]
            write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def write(self, kind: str, **values: Any) -> None:
        """Append one row, whole or not at all. Raises `DiskFull`; `RunFolderError` where a link has the file's name."""
        if not self._enabled:
            return
        with full_disk_named(self._path.parent), open_append(self._path) as file:
            before = file.seek(0, os.SEEK_END)
            row = (json.dumps({"kind": kind, **values}) + "\n").encode()
            try:
                if file.write(row) != len(row):
                    raise OSError(errno.ENOSPC, "part of a row written")
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        step = int(numbers.pop("step", 0))
        for logger in self._loggers:
            logger.write(kind, step, numbers)

    def sync(self) -> None:
        """Rows up to here survive a crash of the machine."""
        if self._enabled and self._path.exists():
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
