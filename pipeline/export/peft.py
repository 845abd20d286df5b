"""PEFT folders of an adapter and of its mask draws: what is asked for, and writing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter, in_inverse_convention, masked_matrices, write_adapter
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
    """One PEFT folder per export."""
    for target, stored in loras(loaded, folder, exported):
        write_lora(loaded, target, stored)


def loras(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> Iterator[tuple[Path, StoredAdapter]]:
    """The folder of each export, made, and the LoRA that its member is; a draw's masks are folded into its matrices."""
    plain, adapters = mean_field(loaded), loaded.adapters
    masks = adapters.plan([one.member for one in exported], 1, loaded.task.passes.key).masks
    for m, one in enumerate(exported):
        target = folder / one.folder
        target.mkdir(parents=True)
        if one.member.draw is None:
            yield target, plain
        else:
            own, spec = loaded.plain, replace(loaded.plain.spec, sites=())
            yield target, replace(own, matrices=masked_matrices(own.matrices, masks, m), spec=spec)


def write_lora(loaded: Loaded, target: Path, stored: StoredAdapter) -> None:
    """A PEFT folder of an adapter of the run's base."""
    adapters, base = loaded.adapters, str(loaded.content["name"])
    write_adapter(target, stored.matrices, stored.spec, adapters.layer_count, base, adapters.suffixes, stored.head)


def mean_field(loaded: Loaded) -> StoredAdapter:
    """The adapter without masks, its scaling the one that tools without masks apply (`in_inverse_convention`)."""
    plain = loaded.plain
    return replace(plain, spec=in_inverse_convention(plain.spec, list(plain.matrices), loaded.adapters.layer_count))


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
