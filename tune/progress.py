"""What a person watching the search sees: one line per event, with the time left, and a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline import SELECTION_NAMES, duration, one_line, say
from tune.ledger import Ledger, TrialRecord


def tell(line: str) -> None:
    """A line of progress, on the terminal also while Ray's own output goes to its log."""
    say(line, stream=sys.__stdout__)


class SearchProgress:
    """Lines with the time left.

    Time left = (steps not yet taken) x (trial seconds per step so far) / (trials at once). Trials that
    are stopped early end it sooner, so it is an upper estimate.
    """

    def __init__(self, ledger: Ledger, trials: int, steps: int, concurrent: int) -> None:
        self.ledger, self.trials, self.steps, self.concurrent = ledger, trials, steps, concurrent
        self.before = {record.name for record in ledger.trials.values() if record.ended}
        self.begun = time.monotonic()

    def validated(self, record: TrialRecord) -> None:
        """A trial reported a validation."""
        tell(f"  {record.name}  step {record.steps}/{self.steps}  {_scores(record)}{self._left()}")

    def ended(self, record: TrialRecord) -> None:
        """A trial finished, was stopped early, or failed."""
        ended = sum(r.state != "running" for r in self.ledger.trials.values())
        if record.state == "failed":
            outcome = f"failed: {record.error}"
        else:
            stopped = f"stopped at step {record.steps}" if record.state == "stopped" or record.overfits else "done"
            outcome = f"{stopped}{', it overfits' if record.overfits else ''}  {_scores(record)}"
        settings = "  ".join(f"{key.rpartition('.')[2]}={shown(value)}" for key, value in record.values.items())
        tell(f"{record.name} {outcome}  ({settings})  [{ended}/{self.trials}]{self._left()}")

    def lost(self, record: TrialRecord) -> None:
        """A trial's process was lost."""
        tell(f"{record.name} was lost after step {record.steps} (its process, or its machine); it begins again")

    def _left(self) -> str:
        now = [record for record in self.ledger.trials.values() if record.name not in self.before]
        taken = sum(record.steps for record in now)
        open_steps = sum(self.steps - record.steps for record in now if record.state == "running")
        open_steps += (self.trials - len(self.before) - len(now)) * self.steps
        if not taken or not open_steps:
            return ""
        busy = min(self.concurrent, self.trials - len(self.before))
        seconds = open_steps * (time.monotonic() - self.begun) * busy / taken / self.concurrent
        return f"  at most about {duration(seconds)} left"


def shown(value: Any) -> str:
    """A setting's value in a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_summary(result: dict[str, Any]) -> None:
    """The trials of each arm, best first, and what was chosen."""
    ensemble, plain = result["ensemble"], result["plain"]
    _print_trials(result["trials"], ensemble["adapters"])
    tell(f"Best: {_best_text(result)}")
    tell(
        f"Ensemble (*): {ensemble['size']} of the adapters, the fewest within one standard error of the best number. "
        f"Chosen on cached validation predictions by {SELECTION_NAMES[ensemble['selected_by']]}."
    )
    if plain:
        _print_trials(plain["trials"], ())
        tell(f"Best of plain LoRA: {_best_text(plain)}")
    for warning in result["warnings"]:
        tell(f"Warning: {warning}")


def _best_text(found: Mapping[str, Any]) -> str:
    values = "  ".join(f"{key}={shown(value)}" for key, value in found["best_config"].items())
    return f"{found['best']} ({values})"


def _print_trials(trials: Sequence[dict[str, Any]], marked: Collection[str]) -> None:
    trials = sorted(trials, key=_place)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    keys = list(trials[0]["config"])
    for heading in ("trial", *(key.rpartition(".")[2] for key in keys), "steps", "NLL", "accuracy", "state"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("trial", "state") else "right")
    for trial in trials:
        scores = [trial["validation_nll"], trial["validation_accuracy"]]
        table.add_row(
            trial["name"], *(Text(one_line(shown(trial["config"][key]))) for key in keys), str(trial["steps"]),
            *("" if score is None else f"{score:.4f}" for score in scores),
            trial["state"] + (" *" if trial["name"] in marked else ""),
        )  # fmt: skip
    Console().print(table)


def _place(trial: dict[str, Any]) -> tuple[bool, float, float]:
    """Finished trials first, by what chose among them; the others by the NLL they were seen with."""
    infinite = float("inf")
    loss, nll = trial["validation_loss"], trial["validation_nll"]
    return trial["state"] != "done", infinite if loss is None else loss, infinite if nll is None else nll


def _scores(record: TrialRecord) -> str:
    parts = [("NLL", record.nll), ("accuracy", record.accuracy)]
    return "  ".join(f"{name} {value:.4f}" for name, value in parts if value is not None)
