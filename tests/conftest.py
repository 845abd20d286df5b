"""Shared fixtures. One thread: the machines of CI have two cores and spinning threads cost more than they give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.support.tiny import write_tiny_data, write_tiny_model

settings.register_profile("shared-machine", deadline=None, max_examples=50)
settings.load_profile("shared-machine")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "rows.jsonl", 300)
    return folder


@pytest.fixture
def tiny_settings(tiny_folder: Path) -> list[str]:
    """Overrides for a run of seconds on the tiny model."""
    return [
        f"model.path={tiny_folder / 'model'}", f"data.path={tiny_folder / 'rows.jsonl'}", "data.train_rows=64",
        "data.validation_rows=40", "data.calibration_rows=40", "data.test_rows=60", "data.max_tokens=64",
        "train.max_steps=6", "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.01",
        "train.validate_every_steps=3", "train.checkpoint_every_steps=2", "ensemble.size=4", "adapter.rank=4",
        "search.trials=2", "search.max_steps=4", "search.adapters=2", "evaluate.bootstrap_samples=200",
    ]
