"""Where a run's numbers go beside metrics.jsonl."""

from __future__ import annotations

from typing import Literal

from pipeline.config.base import Section


class WandbConfig(Section):
    """Weights & Biases."""

    project: str = "loradrop"
    """Project that the run appears in."""
    name: str | None = None
    """Name of the run; None = that of the run folder."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run folder, for `wandb sync` later: for nodes without a network."""


class LoggingConfig(Section):
    """metrics.jsonl is always written; the main process alone writes to what is switched on here."""

    tensorboard: bool = False
    """Event files in the run folder's tensorboard/. Needs `pip install tensorboard`."""
    wandb: WandbConfig | None = None
    """Weights & Biases, e.g. `logging.wandb.project=mine`. Needs `pip install wandb` and, online, `wandb login`."""
