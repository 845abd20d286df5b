"""TensorBoard and Weights & Biases behind the call that writes metrics.jsonl. Opened on the main process only."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pipeline.config import RunConfig
from pipeline.errors import SetupError
from pipeline.runs import read_json, write_json

WANDB_IDENTITY = "wandb.json"
"""In the run folder: the id under which a resumed run continues."""


class Logger(Protocol):
    """Takes the numbers of one metrics row."""

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Record `values` under `kind`/name."""

    def close(self) -> None:
        """Flush and end."""


def check_loggers(config: RunConfig) -> None:
    """Raises `SetupError` where a package that the configuration asks for is not installed."""
    asked = {"tensorboard": config.logging.tensorboard, "wandb": config.logging.wandb is not None}
    for package, on in asked.items():
        if on and importlib.util.find_spec(package) is None:
            raise SetupError(
                f"logging.{package}", None, f"needs the package {package}, which is not installed",
                f"Run `pip install {package}` in the environment of this command, or switch it off.",
            )


def open_loggers(config: RunConfig, run_dir: Path, step: int) -> list[Logger]:
    """What the configuration asks for; a resumed run goes on after `step` where it left off."""
    check_loggers(config)
    loggers: list[Logger] = []
    if config.logging.tensorboard:
        loggers.append(TensorBoard(run_dir / "tensorboard", step))
    if config.logging.wandb is not None:
        loggers.append(WeightsAndBiases(config, run_dir))
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

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        settings = config.logging.wandb
        assert settings is not None
        identity = run_dir / WANDB_IDENTITY
        if not identity.exists():
            write_json(identity, {"id": secrets.token_hex(4)})
        self._run: Any = wandb.init(
            project=settings.project, name=settings.name or run_dir.name, mode=settings.mode, dir=str(run_dir),
            id=read_json(identity)["id"], resume="allow", config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One history row."""
        self._run.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()
