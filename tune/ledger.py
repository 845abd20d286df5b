"""The study ledger: an append-only file of JSON lines from which a search can be rebuilt.

    {"event": "search", "identity": ..., "space": ...}             first line: what is searched
    {"event": "start",  "trial": ..., "arm", "index", "values", "config_sha256"}
    {"event": "report", "trial": ..., "step", "nll", "accuracy"}    one per validation
    {"event": "overfits", "trial": ...}                             asked to end for that, with the best adapter it has
    {"event": "end",    "trial": ..., "state", ...}                 done, stopped (early) or failed

Every line is on disk before the search goes on, so that a kill at any moment loses no finished trial.
A trial that has started and not ended is run again; so is one that failed.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline import ConfigError, RunFolderError, cut_torn_line, open_append, read_json_lines
from tune.dimensions import Values
from tune.sampling import Observation
from tune.space import Arm, ArmName

State = Literal["running", "done", "stopped", "failed"]


@dataclass
class TrialRecord:
    """What the ledger knows of one trial."""

    name: str
    index: int
    values: Values
    config_sha256: str
    arm: ArmName = "method"
    state: State = "running"
    reports: list[dict[str, Any]] = field(default_factory=list)
    """{"step", "nll", "accuracy"} of each validation of the last attempt."""
    adapter_sha256: str | None = None
    error: str | None = None
    overfits: bool = False

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to run."""
        return self.state in ("done", "stopped")

    @property
    def steps(self) -> int:
        """Steps at the last validation."""
        return int(self.reports[-1]["step"]) if self.reports else 0

    @property
    def nll(self) -> float | None:
        """Validation NLL that the trial is judged by: the final one, the last seen where it was stopped."""
        return self.reports[-1]["nll"] if self.reports else None

    @property
    def accuracy(self) -> float | None:
        """Validation accuracy that goes with `nll`."""
        return self.reports[-1].get("accuracy") if self.reports else None

    def observation(self) -> Observation | None:
        """The trial as the sampler sees it; None before it has ended."""
        if not self.ended or self.nll is None:
            return None
        return Observation(self.values, self.nll, self.steps, complete=self.state == "done")


class Ledger:
    """Appends events; the trials they add up to are in `trials`, by name."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.header: dict[str, Any] | None = None
        self.trials: dict[str, TrialRecord] = {}
        with open_append(path) as file:  # first: a link is refused, not followed
            self._descriptor = os.dup(file.fileno())  # plain, because Ray pickles what its callbacks hold
        cut_torn_line(self.path)
        try:
            for event in read_json_lines(path):
                self._apply(event)
        except (RunFolderError, ValueError, KeyError, TypeError) as error:
            remedy = "Restore it, or give another folder."
            raise ConfigError(str(path), None, f"is no ledger of a search ({error!r})", remedy) from error

    def append(self, event: str, **fields: Any) -> None:
        """Write one event and wait until it is on disk."""
        row = {"event": event, **fields}
        line = json.dumps(row, allow_nan=False) + "\n"
        os.write(self._descriptor, line.encode())  # one call: a signal cannot come between two halves of a line
        os.fsync(self._descriptor)
        self._apply(json.loads(line))

    def open_search(self, identity: str, space: Mapping[str, Any]) -> None:
        """Begin, or continue, the search `identity`.

        Raises:
            ConfigError: the folder holds the ledger of another search.
        """
        if self.header is None:
            self.append("search", identity=identity, space=dict(space))
        elif self.header["identity"] != identity:
            raise ConfigError(
                str(self.path.parent), None, "holds a search with other settings or another space",
                "Give another folder, or remove this one to start over.",
            )

    def in_order(self, arm: ArmName | None = None) -> list[TrialRecord]:
        """The trials of one arm, or of all, by index."""
        records = (record for record in self.trials.values() if arm in (None, record.arm))
        return sorted(records, key=lambda record: (record.arm, record.index))

    def observations(self, arm: ArmName) -> list[Observation]:
        """What the ended trials of an arm showed."""
        return [seen for record in self.in_order(arm) if (seen := record.observation()) is not None]

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event.pop("event")
        if kind == "search":
            self.header = event
            return
        name = event.pop("trial")
        if kind == "start":
            event["values"] = {**event["values"]}  # a TypeError where that is no mapping
            self.trials[name] = TrialRecord(name=name, **event)
        elif kind == "report":
            self.trials[name].reports.append(event)
        elif kind == "overfits":
            self.trials[name].overfits = True
        elif kind == "end":
            for key, value in event.items():
                setattr(self.trials[name], key, value)


def pending(ledger: Ledger, arms: Sequence[Arm]) -> list[tuple[Arm, int]]:
    """Trials still to run, of the arms in turn: those begun and not ended, those that failed, those never begun."""
    ended = {(record.arm, record.index) for record in ledger.trials.values() if record.ended}
    left = [[(arm, index) for index in range(arm.trials) if (arm.name, index) not in ended] for arm in arms]
    return [trial for turn in itertools.zip_longest(*left) for trial in turn if trial is not None]
