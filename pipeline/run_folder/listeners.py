"""Who is told of a run while it trains: functions of the caller, in the process that writes its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class Callback:
    """Told of a training as it goes; what is not overridden does nothing. What it raises ends the training."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """A step was applied: the numbers of its row in metrics.jsonl, among them `loss` and `learning_rate`."""

    def on_validation(self, step: int, values: Mapping[str, float]) -> None:
        """The validation rows were scored: `nll`, and for rows with choices `accuracy`."""

    def on_checkpoint(self, step: int, folder: Path) -> None:
        """A checkpoint was published in `folder`."""


@dataclass(frozen=True)
class Told:
    """A `metrics.Logger` that tells callbacks."""

    callbacks: Sequence[Callback]

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Of training steps and validations."""
        for callback in self.callbacks:
            if kind == "train":
                callback.on_step(step, values)
            elif kind == "validation":
                callback.on_validation(step, values)

    def close(self) -> None:
        """Nothing was opened."""
