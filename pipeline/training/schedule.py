"""The length of a training and the learning rate of each of its steps. No torch."""

from __future__ import annotations

import math

from pipeline.config import TrainConfig
from pipeline.errors import ConfigError


def require_steps(train: TrainConfig) -> None:
    """Refuse epochs that nobody has counted. Raises `ConfigError`."""
    if train.epochs is not None:
        raise ConfigError(
            "train.epochs", train.epochs, "is turned into steps before the training processes start",
            "Start with `loradrop train`, or set train.epochs=null and train.max_steps.",
        )


def warmup_steps(train: TrainConfig) -> int:
    """Steps of the warm-up: as given, or the fraction of all."""
    return round(train.warmup_fraction * train.max_steps) if train.warmup_steps is None else train.warmup_steps


def schedule_factor(step: int, max_steps: int, warmup: int, kind: str) -> float:
    """Learning-rate factor of a 0-based step: linear warm-up to 1, then `linear`, `cosine` or `constant`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(max_steps - warmup, 1)
    if kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress)) if kind == "cosine" else 1.0
