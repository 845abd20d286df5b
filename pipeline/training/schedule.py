"""The length of a training and the learning rate of each of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def schedule_of(train: TrainConfig) -> Callable[[int], float]:
    """Learning-rate factor of a 0-based step: linear warm-up to 1, then `train.schedule` as transformers computes it.

    In its warm-up the first step has a rate of 0 and does nothing; here the rise is (step + 1) / warm-up, and the step
    after the warm-up has the peak in both.
    """
    import torch
    from transformers.optimization import get_scheduler

    warmup, total = warmup_steps(train), train.max_steps
    options: dict[str, dict[str, Any]] = {
        "cosine_with_restarts": {"num_cycles": train.schedule_cycles},
        "polynomial": {"power": train.schedule_power, "lr_end": 0.0},
        "warmup_stable_decay": {"num_decay_steps": max(1, round(train.decay_fraction * (total - warmup)))},
    }
    named = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # transformers makes schedules of an optimizer
    (factor,) = get_scheduler(named, unused, warmup, total, options.get(named)).lr_lambdas

    def of_step(step: int) -> float:
        return (step + 1) / warmup if step < warmup else float(factor(step))

    return of_step
