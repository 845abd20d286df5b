"""PEFT folders of an adapter and of its mask draws: what is asked for, and writing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import masked_matrices, write_adapter
from pipeline.config import ExportConfig
from pipeline.config.method import WEIGHT_POSITIONS
from pipeline.ensemble.readout import chosen_members
from pipeline.errors import RunFolderError
from pipeline.export.order import Exported, Loaded, Order
from pipeline.terminal import say


def plan_adapter(order: Order) -> list[Exported]:
    """The mean-field adapter."""
    return [Exported("adapter", Member(0))]


def plan_draws(order: Order) -> list[Exported]:
    """As many draws as export.draws says, or validation chose.

    Raises:
        RunFolderError: draws are asked for that are no plain LoRA.
    """
    asked, result = order.config.export, order.result
    active = [site for site in order.stored.spec.sites if site.rate > 0]
    odd = [
        f"{site.position} per token" if site.position in WEIGHT_POSITIONS else site.position
        for site in active if not site.masks_weights
    ]
    if odd and asked.draws:
        raise RunFolderError(
            "export.draws",
            asked.draws,
            f"a draw with masks on {', '.join(odd)} is no plain LoRA",
            "Leave it out: the adapter alone is exported.",
        )
    if odd:
        say(f"no draws are exported: under masks on {', '.join(odd)} a draw is no plain LoRA")
    if odd or not active:
        return []
    draws: Sequence[int] = range(order.config.ensemble.size if asked.draws is None else asked.draws)
    if asked.draws is None and result:
        draws = [draw for draw in chosen_members(result)[0] if draw is not None]
        if not draws:
            say("no draws are exported: validation chose the adapter without masks; export.draws=N exports N draws")
    return [Exported(f"draws/draw_{draw:03d}", Member(0, draw)) for draw in draws]


def write_peft(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> None:
    """One PEFT folder per export; a draw's masks are folded into its matrices."""
    adapters, stored = loaded.adapters, loaded.plain
    masks = adapters.plan([e.member for e in exported], 1, loaded.task.passes.key).masks
    without_sites = replace(stored.spec, sites=())
    for m, export in enumerate(exported):
        target = folder / export.folder
        target.mkdir(parents=True)
        is_draw = export.member.draw is not None
        matrices = masked_matrices(stored.matrices, masks, m) if is_draw else stored.matrices
        spec = without_sites if is_draw else stored.spec
        base = str(loaded.content["name"])
        write_adapter(target, matrices, spec, adapters.layer_count, base, adapters.suffixes, stored.head)


def ensemble_entry(
    exported: Sequence[Exported], readout: Callable[[Sequence[int | None], Sequence[float] | None], dict[str, Any]],
    asked: ExportConfig, result: Mapping[str, Any],
) -> dict[str, Any] | None:
    """The exported draws, or the members that validation chose where they do not count alike, as an ensemble: what
    `readout` says of them, their weights among it; None without draws.

    Raises:
        RunFolderError: validation chose the adapter without masks among them, and it is not exported.
    """
    folders: dict[int | None, str] = {}
    for one in exported:  # the same member may lie there in several forms
        folders.setdefault(one.member.draw, one.folder)
    chosen, weights = chosen_members(result)
    if weights is None or asked.draws is not None:
        chosen, weights = tuple(draw for draw in folders if draw is not None), None
    if not [draw for draw in folders if draw is not None]:
        return None
    if None in chosen and None not in folders:
        what = "leaves out the adapter without masks, which validation chose as a member of the ensemble"
        raise RunFolderError("export.forms", list(asked.forms), what, "Add adapter, or set export.draws.")
    return {"members": [folders[draw] for draw in chosen], **readout(chosen, weights)}
