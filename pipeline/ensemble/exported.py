"""The ensemble of an export: PEFT folders, and what their manifest says of base, averaging and temperature."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter, read_adapter
from pipeline.config import RunConfig, TemplateConfig, build_config
from pipeline.data.splits import Splits
from pipeline.ensemble.readout import Readout, free_text
from pipeline.ensemble.rows import RowForm
from pipeline.errors import RunFolderError
from pipeline.files import MANIFEST, manifest_faults, read_json
from pipeline.model.content import require_base

BASE = ("path", "revision", "quantization", "double_quantization", "compute_dtype")
READ = (None, "adapter", "draws")
"""Forms of `export.forms` that are read here; exports before 0.2 name none."""
EXPORT_AGAIN = "Export again, or give the run folder."


class OpenedExport(NamedTuple):
    """What an ensemble is made of."""

    config: RunConfig
    splits: Splits
    """Of one row, which says what rows there are."""
    stored: list[StoredAdapter]
    members: list[Member]
    readout: Readout
    form: RowForm


def reading_entry(config: RunConfig, form: RowForm) -> dict[str, Any]:
    """What a manifest has to say of how rows are read, for `open_export`."""
    return {
        "kind": form.kind, "choices": form.choices, "fixed": form.fixed,
        "template": None if form.template is None else form.template.model_dump(mode="json"),
        "max_tokens": config.data.max_tokens, "choice_score": config.data.choice_score,
        "model_kind": config.model.kind, "attention": config.model.attention,
    }


def open_export(folder: Path, draws: int | None, trusted: bool) -> OpenedExport:
    """Read an export without its run.

    Args:
        draws: so many of the exported draws; 0 is the adapter without masks; None: all draws, if there are any.

    Raises:
        RunFolderError: it is damaged, or its manifest does not say what is needed.
    """
    if faults := manifest_faults(folder):
        raise RunFolderError(str(folder), None, f"is damaged ({'; '.join(faults)})", "Put the whole folder back.")
    manifest = read_json(folder / MANIFEST)
    base, reading, exports = (_entry(folder, manifest, name) for name in ("base", "reading", "exports"))
    kind = reading["kind"]
    if kind not in ("choice", "regression"):
        raise free_text(folder)
    exported = {one["draw"]: folder / one["folder"] for one in exports if one.get("form") in READ}
    if not exported:
        what, remedy = "holds none of the forms adapter and draws", "The use.py in each of its folders reads that one."
        raise RunFolderError(str(folder), None, what, remedy)
    there = sorted(draw for draw in exported if draw is not None)
    wanted: list[int | None] = [*(there if draws is None else range(draws))] or [None]
    if missing := [draw for draw in wanted if draw not in exported]:
        what = "holds no adapter without masks" if missing[0] is None else f"holds {len(there)} mask draws"
        raise RunFolderError(str(folder), draws, what, "Export more (export.draws), or give the run folder.")
    said = _entry(folder, manifest, "adapter" if wanted == [None] else "ensemble")
    weights = None
    if wanted != [None]:
        of_folder = {one["folder"]: one["draw"] for one in exports}
        together = [of_folder[name] for name in said["members"]]
        if draws is not None and wanted != together:
            what = f"has a temperature for its {len(together)} members together alone"
            raise RunFolderError(str(folder), draws, what, "Ask for all of them, or give the run folder.")
        wanted, weights = together, None if len(set(said["weights"])) == 1 else tuple(said["weights"])
    scale = said.get("temperature")
    if kind == "choice" and scale is None:
        reason = said.get("reason", "it does not say why")
        raise RunFolderError(str(folder / MANIFEST), None, f"has no temperature: {reason}", EXPORT_AGAIN)
    template = None if reading["template"] is None else TemplateConfig.model_validate(reading["template"])
    choices = None if reading["choices"] is None else tuple(reading["choices"])
    form = RowForm(kind, template, choices, reading["fixed"])
    config = build_config({
        "model": {
            **{name: base[name] for name in BASE},
            "kind": reading["model_kind"], "attention": reading["attention"],
        },
        "data": {"max_tokens": reading["max_tokens"], "choice_score": reading["choice_score"]},
    }).trusting(trusted)
    require_base(config.model, base.get("files") or {}, folder)
    stored = [_read(exported[draw]) for draw in wanted]
    readout = Readout(tuple(wanted), said["average"], None if scale is None else float(scale["value"]), kind, weights)
    members = [Member(k) for k in range(len(stored))]
    return OpenedExport(config, Splits([form.example()], [], [], [], ""), stored, members, readout, form)


def _read(folder: Path) -> StoredAdapter:
    """An adapter that does something. Raises `RunFolderError`."""
    stored = read_adapter(folder)
    if not any(matrices[0].any() and matrices[1].any() for matrices in stored.matrices.values()):
        raise RunFolderError(str(folder), None, "has no effect: every update is zero", EXPORT_AGAIN)
    return stored


def _entry(folder: Path, manifest: Any, name: str) -> Any:
    """An entry of the manifest. Raises `RunFolderError` where it lacks it."""
    found = manifest.get(name) if isinstance(manifest, dict) else None
    if not found:
        what = f"does not say its {name}, without which its members cannot be read out"
        raise RunFolderError(str(folder / MANIFEST), None, what, EXPORT_AGAIN)
    return found

