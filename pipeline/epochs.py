"""`train.epochs` -> `train.max_steps`: once, by the process that starts the others, which then agree on one number."""

from __future__ import annotations

import math

from pipeline.config import RunConfig, TrainConfig
from pipeline.config.load import with_values
from pipeline.data.splits import load_splits


def resolve_epochs(config: RunConfig) -> RunConfig:
    """`config` with max_steps = ceil(epochs × training rows / global_batch) and without epochs; as it is without them.

    Raises:
        DataError: the rows cannot be read.
    """
    if config.train.epochs is None:
        return config
    steps = math.ceil(config.train.epochs * len(load_splits(config.data).train) / config.train.global_batch)
    return with_values(config, {"train.epochs": None, "train.max_steps": max(1, steps)})


def length_text(train: TrainConfig) -> str:
    """For people: how long training is."""
    if train.epochs is None:
        return f"{train.max_steps} steps"
    return f"{train.epochs:g} epochs (counted in steps when the rows are read)"
