"""Who predicts, in member order: predictions/members.json of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import RunFolderError
from pipeline.files import read_json, write_json
from pipeline.run_folder.predictions import REMEDY

MEMBERS = "members.json"

Group = Literal["base", "mean_field", "mask_draw", "plain", "searched", "compared", "teacher"]


@dataclass(frozen=True)
class PredictedMember:
    """One column of the predictions: an adapter, and a mask draw of it or none."""

    name: str
    group: Group
    """base: no adapter; mean_field: the run's adapter without masks; mask_draw: one draw of it; plain: the run
    without dropout; searched: adapters of other runs, best first; compared: of the trainings of a comparison, and
    their draws; teacher: the average that a distilled run was taught."""
    adapter: str | None = None
    """Folder of the adapter."""
    adapter_sha256: str | None = None
    """Hash of its weights file."""
    draw: int | None = None
    """Index of the mask draw."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Free fields, such as rate and rank."""


def write_members(folder: Path, members: list[PredictedMember]) -> None:
    """Write folder/members.json, in member order."""
    write_json(folder / MEMBERS, [{**m.extra, **{k: v for k, v in asdict(m).items() if k != "extra"}} for m in members])


def read_members(folder: Path) -> list[PredictedMember]:
    """Read folder/members.json.

    Raises:
        RunFolderError: the file is missing or damaged, or holds an unknown group.
    """
    path = folder / MEMBERS
    entries = read_json(path, REMEDY)
    try:
        members = [_to_member(entry) for entry in entries]
    except (TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(str(path), None, f"is damaged ({error})", REMEDY) from error
    if not members:
        raise RunFolderError(str(path), None, "names no member", REMEDY)
    return members


def places_of_draws(members: list[PredictedMember], adapter_sha256: str) -> dict[int | None, int]:
    """Mask draw of the run's own adapter (None: without masks) -> its place among the members."""
    own = ("mean_field", "mask_draw")
    return {m.draw: n for n, m in enumerate(members) if m.group in own and m.adapter_sha256 == adapter_sha256}


def _to_member(entry: dict[str, Any]) -> PredictedMember:
    known = {f.name for f in fields(PredictedMember)} - {"extra"}
    member = PredictedMember(
        **{k: v for k, v in entry.items() if k in known}, extra={k: v for k, v in entry.items() if k not in known}
    )
    if not isinstance(member.name, str) or not member.name.isprintable():  # it is shown, and logged, as part of a line
        raise ValueError(f"name = {member.name!r} is no text of one line")
    if member.group not in get_args(Group):
        raise ValueError(f"group = {member.group!r} is none of {', '.join(get_args(Group))}")
    return member
