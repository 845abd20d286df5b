"""PEFT folders of an adapter and of its mask draws: what is asked for, and writing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.peft_format import StoredAdapter, masked_matrices, write_adapter
from pipeline.config import ExportConfig
from pipeline.config.method import WEIGHT_POSITIONS
from pipeline.ensemble.readout import chosen_members
from pipeline.errors import RunFolderError
from pipeline.terminal import say


@dataclass(frozen=True)
class Exported:
    """One PEFT folder of the export."""

    folder: str
    member: Member


def planned_exports(
    asked: ExportConfig, cached: int, result: Mapping[str, Any], stored: StoredAdapter
) -> list[Exported]:
    """What export.forms and the chosen ensemble size ask for.

    Args:
        cached: mask draws that are predicted, where no report has chosen among them.
        result: the report's, empty where there is none.

    Raises:
        RunFolderError: draws are asked for that are no plain LoRA.
    """
    exported = [Exported("adapter", Member(0))] if "adapter" in asked.forms else []
    if "draws" not in asked.forms:
        return exported
    active = [site for site in stored.spec.sites if site.rate > 0]
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
        return exported
    if not active:
        return exported
    draws: Sequence[int] = range(cached if asked.draws is None else asked.draws)
    if asked.draws is None and result:
        draws = [draw for draw in chosen_members(result)[0] if draw is not None]
        if not draws:
            say("no draws are exported: validation chose the adapter without masks; export.draws=N exports N draws")
    return exported + [Exported(f"draws/draw_{draw:03d}", Member(0, draw)) for draw in draws]


def write_exports(
    folder: Path, exported: list[Exported], adapters: Adapters, stored: StoredAdapter, base: str, key: MaskKey
) -> None:
    """One PEFT folder per export; a draw's masks are folded into its matrices.

    Args:
        base: name or path of the base model.
        key: of the test-time masks.
    """
    draws = [e.member for e in exported]
    masks = adapters.plan(draws, 1, key).masks
    plain = replace(stored.spec, sites=())
    for m, export in enumerate(exported):
        target = folder / export.folder
        target.mkdir(parents=True)
        is_draw = export.member.draw is not None
        matrices = masked_matrices(stored.matrices, masks, m) if is_draw else stored.matrices
        spec = plain if is_draw else stored.spec
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
    folders = {e.member.draw: e.folder for e in exported}
    chosen, weights = chosen_members(result)
    if weights is None or asked.draws is not None:
        chosen, weights = tuple(draw for draw in folders if draw is not None), None
    if not [draw for draw in folders if draw is not None]:
        return None
    if None in chosen and None not in folders:
        what = "leaves out the adapter without masks, which validation chose as a member of the ensemble"
        raise RunFolderError("export.forms", list(asked.forms), what, "Add adapter, or set export.draws.")
    return {"members": [folders[draw] for draw in chosen], **readout(chosen, weights)}
