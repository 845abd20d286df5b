"""What an export is made from, and what a target is: the interface between the stage and the files of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter
from pipeline.config import RunConfig
from pipeline.data.splits import Splits
from pipeline.errors import LoradropError
from pipeline.model.kind import Kind
from pipeline.model.load import BaseIdentity
from pipeline.prediction.task import Task
from pipeline.scores.bootstrap import Floats


class ParityError(LoradropError):
    """A stock tool computes something else than we do, or an export has no effect."""


@dataclass(frozen=True)
class Order:
    """What is known before a model loads."""

    config: RunConfig
    splits: Splits
    stored: StoredAdapter
    """The run's own adapter, as it was trained."""
    plain: StoredAdapter
    """The same as the plain LoRA that it is at inference: one padded rank, Λ of AdaLoRA in B."""
    result: Mapping[str, Any]
    """The report's result.json; empty where there is none."""
    model_kind: Kind
    """causal or classifier."""
    trusted: bool
    """Whether code that comes with the model may run."""


@dataclass(frozen=True)
class Loaded(Order):
    """An order with its model: `task.base` and the stored adapter on it, which is number 0 of `adapters`."""

    task: Task
    adapters: Adapters
    identity: BaseIdentity
    """Of the base, in the precision of the run. (`task.base.identity` has that of the comparison.)"""
    content: Mapping[str, Any]
    """Of the base, what an export says of it: `pipeline.model.content: base_content`."""


@dataclass(frozen=True)
class Exported:
    """One folder of the export."""

    folder: str
    """Its path in export/."""
    member: Member
    """Which of our members it is: the adapter without masks, or one of its draws."""


@dataclass(frozen=True)
class Served:
    """What was found anew on the base that is served, where it is not the one that was evaluated."""

    readout: dict[str, Any]
    """`average` and `temperature`, as of `exported_readout`."""
    scores: dict[str, dict[str, float]]
    """before and after (the temperature) -> score -> value, on test rows."""
    outputs: Floats
    """(1, L, C) of the first test row."""


@dataclass(frozen=True)
class Target:
    """A form in which a run is deployed: a name of `export.forms`.

    The stage plans all targets before it loads the model, lets each write its folders into the export that is being
    filled, and verifies what was written: targets with the same `verify` in one call of it.
    """

    name: str
    help: str
    """One line: what it is and what loads it."""
    plan: Callable[[Order], list[Exported]]
    """The folders that it will write. Raises `UserError` (naming the way out) where the run cannot be exported so:
    a rank, a method, trained modules, a kind of model or of rows."""
    write: Callable[[Loaded, Path, Sequence[Exported]], None]
    """Fill the planned folders below export/ (the path; they are not there yet)."""
    verify: Callable[[Loaded, Path, Sequence[Exported]], list[dict[str, Any]]]
    """Load each folder with its own stock tool, in a clean process, and compare with us: what was measured of each, for
    the manifest. Raises `ParityError` beyond 5 % of the adapter's effect, or where an export has none (`judged`). Where
    it is another base that is served, `served` among it says how that is read (`Served`); else what was found of the
    adapter holds."""
    merged: bool = False
    """Whether the folder is a whole model, without adapters."""
    use: bool = True
    """Whether transformers (and PEFT) load the folder: use.py is then written and run."""
    loading: Callable[[Loaded, Sequence[Exported]], str] | None = None
    """For the model card, where it is not use.py alone: how the folder is loaded, in Markdown."""
