"""What of a run, a search, a comparison or an export is whole, and whether it belongs together. Reads, never writes.

whole: as it was written, and made from what lies beside it. damaged: not as it was written. foreign: whole, but made
from something else, or nothing of ours. missing: referred to and not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

from pipeline.config import RunConfig
from pipeline.config.evaluate import ALSO
from pipeline.errors import LoradropError, RunFolderError
from pipeline.files import (
    ADAPTER_WEIGHTS,
    MANIFEST,
    MOST_JSON_BYTES,
    manifest_faults,
    read_json,
    read_json_lines,
    sha256_file,
)
from pipeline.run_folder.chain import (
    Origin,
    is_validated,
    other_members,
    predictions_from,
    trained_on,
    weights_sha256,
)
from pipeline.run_folder.comparison import REFUSALS, read_comparison
from pipeline.run_folder.generated import read_texts, texts_from, texts_path
from pipeline.run_folder.mark import MARK, is_marked, require_mark
from pipeline.run_folder.members import PredictedMember, read_members
from pipeline.run_folder.paths import RunPaths, load_saved, read_status
from pipeline.run_folder.predictions import read_predictions
from pipeline.run_folder.related import LEDGER, SEARCH, read_related, read_search

State = Literal["whole", "damaged", "foreign", "missing"]


@dataclass(frozen=True)
class Finding:
    """What is known of one artefact."""

    name: str
    """Path, relative to the folder that was asked about."""
    state: State
    detail: str = ""


def verify_folder(folder: Path) -> list[Finding]:
    """Everything in a folder of ours: a run, a search, a comparison, or an export, also one that was copied elsewhere.

    Raises:
        RunFolderError: it is none of these.
    """
    if not is_marked(folder) and (folder / MANIFEST).is_file():
        return [_published(folder, folder)]
    what = require_mark(folder)
    if what == "search":
        return list(_verify_search(folder))
    if what == "comparison":
        return list(_verify_comparison(folder))
    return list(_verify_run(folder))


def _verify_run(folder: Path) -> Iterator[Finding]:
    paths = RunPaths(folder)
    config = None
    try:
        config = load_saved(paths.config)
        yield Finding("config.yaml", "whole", f"training {config.training_sha256()[:12]}")
    except LoradropError as error:
        yield Finding("config.yaml", "damaged" if paths.config.exists() else "missing", str(error))
    yield from _lines(paths.metrics, folder)
    origin = _adapter_origin(paths, config)
    if paths.adapter.exists():
        yield _with_origin(_published(paths.adapter, folder), read_entry(paths.adapter / MANIFEST, "origin"), origin)
    for checkpoint in sorted(paths.checkpoints.glob("step_*")):
        found = _published(checkpoint, folder)
        counters = read_entry(checkpoint / "counters.json") if found.state == "whole" else None
        yield _with_origin(found, counters, origin)
    origin = _evaluated_origin(paths, origin, config)
    yield from _predictions(paths, origin, config)
    yield from _referred(paths)
    yield from _result(paths, origin, config)
    if paths.export.exists():
        yield _export(paths, origin, config)
    for taught in sorted(paths.taught.glob("*.jsonl")):
        yield from _lines(taught, folder)
    yield from _strangers(folder, {
        "config.yaml", paths.requested.name, "environment.json", "status.json", "metrics.jsonl", "checkpoints",
        "adapter", "related.json", "predictions", "result.json", "report.html", "diagnosis", "export", "harness.json",
        paths.taught.name,
        "logs", "tensorboard", "wandb", "wandb.json", "stop_request.json",
    })  # fmt: skip


def _verify_search(folder: Path) -> Iterator[Finding]:
    yield from _lines(folder / LEDGER, folder)
    try:
        search = read_search(folder)
    except RunFolderError as error:
        yield Finding(SEARCH, "damaged", str(error))
        return
    if search is None:
        yield Finding(SEARCH, "missing", "the search has not ended")
        return
    trials = [*search["trials"], *(search.get("plain") or {}).get("trials", ())]
    yield Finding(SEARCH, "whole", f"{len(trials)} trials")
    for trial in trials:
        if trial.get("state") == "done":
            yield _trial(folder, str(trial.get("run")), trial.get("config_sha256"), trial.get("adapter_sha256"))
    yield from _strangers(folder, {"config.yaml", LEDGER, SEARCH, "trials", "logs", "status.json"})


def _trial(folder: Path, name: str, config_sha256: object, adapter_sha256: object) -> Finding:
    paths = RunPaths(folder / name)
    found = _published(paths.adapter, folder)
    if found.state != "whole":
        return found
    try:
        config = load_saved(paths.config)
    except LoradropError as error:
        return Finding(f"{name}/config.yaml", "damaged", str(error))
    sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    if sha256 != adapter_sha256 or config.sha256() != config_sha256:
        return Finding(found.name, "foreign", "is not what the trial trained")
    if not is_validated(paths, config, sha256):
        return Finding(f"{name}/predictions/validation.npz", "foreign", "are not those of the trial's adapter")
    return found


def _verify_comparison(folder: Path) -> Iterator[Finding]:
    paths = RunPaths(folder)
    try:
        config = load_saved(paths.config)
        trainings = read_comparison(paths) or []
    except LoradropError as error:
        yield Finding("compare.json", "damaged", str(error))
        return
    yield Finding("compare.json", "whole", f"{len(trainings)} trainings")
    origin = Origin(config.training_sha256(), "")
    for one in trainings:
        if one.state != "done":
            continue
        its = RunPaths(folder / one.run)
        found = _published(its.adapter, folder)
        if found.state == "whole" and sha256_file(its.adapter / ADAPTER_WEIGHTS) != one.adapter_sha256:
            found = Finding(found.name, "foreign", "is not what the training trained")
        data = _mapping(read_entry(its.adapter / MANIFEST, "origin")).get("data_sha256")
        origin = Origin(origin.config_sha256, str(data))
        yield found
    yield from _predictions(paths, origin, config)
    yield from _result(paths, origin, config)
    yield from _strangers(folder, {
        "config.yaml", "compare.json", REFUSALS, "trainings", "status.json", "predictions", "result.json",
        "report.html", "logs",
    })  # fmt: skip


def _published(target: Path, folder: Path) -> Finding:
    name = "." if target == folder else target.relative_to(folder).as_posix()
    if not target.is_dir():
        return Finding(name, "missing")
    if faults := manifest_faults(target):
        return Finding(name, "damaged", "; ".join(faults))
    listed = read_json(target / MANIFEST)["files"]
    strangers = [p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file() and p.name != MANIFEST]
    if strangers := sorted(set(strangers) - set(listed)):
        return Finding(name, "foreign", f"holds {', '.join(strangers[:3])}, which the manifest does not list")
    return Finding(name, "whole", f"{len(listed)} files")


def _with_origin(found: Finding, made_from: Any, origin: Origin | None) -> Finding:
    if found.state == "whole" and origin is not None and (different := origin.difference(made_from)):
        return Finding(found.name, "foreign", different)
    return found


def _adapter_origin(paths: RunPaths, config: RunConfig | None) -> Origin | None:
    """What everything in the run must be made from: the configuration's hash, and the data of the adapter."""
    if config is None:
        return None
    data = _mapping(read_entry(paths.adapter / MANIFEST, "origin")).get("data_sha256")
    if data is None:
        data = (read_entry(paths.environment) or {}).get("data_fingerprint")
    return Origin(config.training_sha256(), str(data))


def _evaluated_origin(paths: RunPaths, origin: Origin | None, config: RunConfig | None) -> Origin | None:
    """What everything that was made after the training must be made from: where data.evaluation has changed since,
    other data than the adapter, the same in all of it."""
    if config is None or origin is None or manifest_faults(paths.adapter):
        return origin
    source = config.data.evaluation
    if trained_on(paths.adapter).evaluation == (None if source is None else source.model_dump(mode="json")):
        return origin
    for path in (one for one in sorted(paths.predictions.glob("*.npz")) if not one.stem.startswith(ALSO)):
        with suppress(RunFolderError):
            made_from = read_predictions(paths.predictions, path.stem).made_from
            return Origin(origin.config_sha256, str(made_from.get("data_sha256")))
    return origin


def _predictions(paths: RunPaths, origin: Origin | None, config: RunConfig | None) -> Iterator[Finding]:
    try:
        members = read_members(paths.predictions)
    except RunFolderError as error:
        if paths.predictions.is_dir() and any(paths.predictions.iterdir()):
            yield Finding("predictions/members.json", "damaged", str(error))
        return
    for path in sorted(paths.predictions.glob("*.npz")):
        name = f"predictions/{path.name}"
        try:
            found = read_predictions(paths.predictions, path.stem)
        except RunFolderError as error:
            yield Finding(name, "damaged", str(error))
            continue
        expected = origin
        if origin is not None and path.stem.startswith(ALSO):  # rows of its own
            expected = Origin(origin.config_sha256, str(found.made_from.get("data_sha256")))
        result = _with_origin(Finding(name, "whole", f"{found.members} members"), found.made_from, expected)
        if result.state == "whole" and expected and found.made_from != predictions_from(expected, members):
            result = Finding(name, "foreign", "was made by other members than members.json names")
        yield result
    if texts_path(paths.predictions, "test").exists():
        yield _texts(paths, origin, config, members)
    if config is not None and (what := other_members(members, config.ensemble)):
        yield Finding("predictions/members.json", "foreign", what)
    own = next((m.adapter_sha256 for m in members if m.group == "mean_field"), None)
    weights = paths.adapter / ADAPTER_WEIGHTS
    if own is not None and weights.is_file() and weights_sha256(paths.adapter) != own:
        yield Finding("predictions/members.json", "foreign", "names another adapter than the one in adapter/")


def _texts(
    paths: RunPaths, origin: Origin | None, config: RunConfig | None, members: list[PredictedMember]
) -> Finding:
    path = texts_path(paths.predictions, "test")
    name = f"{paths.predictions.name}/{path.name}"
    try:
        found = read_texts(paths.predictions, "test")
    except RunFolderError as error:
        return Finding(name, "damaged", str(error))
    result = _with_origin(Finding(name, "whole", f"{len(found.texts)} texts"), found.made_from, origin)
    settings = None if config is None else config.evaluate.generate
    if result.state != "whole" or origin is None or config is None or settings is None:
        return result
    if found.made_from != texts_from(predictions_from(origin, members), settings, config.ensemble.average):
        return Finding(name, "foreign", "was made by other members or under other settings")
    return result


def _referred(paths: RunPaths) -> Iterator[Finding]:
    """The plain run, by its place and the hash of its weights."""
    try:
        related = read_related(paths)
    except RunFolderError as error:
        yield Finding(paths.related.name, "damaged", str(error))
        return
    if related.plain is None:
        return
    name, adapter = f"../{related.plain.name}", related.plain / "adapter"
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        yield Finding(name, "missing", "the plain run that this one is compared with")
    elif weights_sha256(adapter) != related.plain_sha256:
        yield Finding(name, "foreign", "its adapter is not the one that this run is compared with")
    else:
        yield Finding(name, "whole", "the plain run that this one is compared with")


def _result(paths: RunPaths, origin: Origin | None, config: RunConfig | None) -> Iterator[Finding]:
    if not paths.result.exists():
        return
    made = _mapping(read_status(paths).get("report", {}).get("made"))
    made_from = read_entry(paths.result, "made_from")
    found = _recorded(paths.result, made)
    yield _recorded(paths.report, made)
    found = _with_origin(found, made_from, origin)
    if found.state == "whole" and config is not None:
        found = _with_settings(found, made_from, config.reading_sha256())
    if found.state == "whole":
        for split, sha256 in _mapping(_mapping(made_from).get("predictions")).items():
            path = paths.predictions / f"{split}.npz"
            if not path.is_file() or not is_zipfile(path) or sha256_file(path) != sha256:
                found = Finding("result.json", "foreign", f"was made from other predictions of {split}")
        texts, path = _mapping(made_from).get("texts"), texts_path(paths.predictions, "test")
        if texts is not None and (not path.is_file() or sha256_file(path) != texts):
            found = Finding("result.json", "foreign", "was made from other texts")
    yield found


def _with_settings(found: Finding, made: Any, settings_sha256: str) -> Finding:
    if _mapping(made).get("settings_sha256", settings_sha256) != settings_sha256:
        return Finding(found.name, "foreign", "was made under other settings")
    return found


def _recorded(path: Path, made: dict[str, str]) -> Finding:
    if not path.is_file():
        return Finding(path.name, "missing")
    if made.get(path.name) != _small_sha256(path):
        return Finding(path.name, "damaged", "does not have the hash that status.json records")
    return Finding(path.name, "whole")


def _small_sha256(path: Path) -> str | None:
    """The hash of a result or a page; None of what is too large to be one."""
    return sha256_file(path) if path.stat().st_size <= MOST_JSON_BYTES else None


def _export(paths: RunPaths, origin: Origin | None, config: RunConfig | None) -> Finding:
    found = _with_origin(_published(paths.export, paths.root), read_entry(paths.export / MANIFEST, "origin"), origin)
    manifest = read_entry(paths.export / MANIFEST)
    if found.state != "whole" or not isinstance(manifest, dict):
        return found
    weights = paths.adapter / ADAPTER_WEIGHTS
    if weights.is_file() and manifest.get("adapter_sha256") != weights_sha256(paths.adapter):
        return Finding(found.name, "foreign", "was made from another adapter")
    result = manifest.get("result_sha256")
    if result is not None and paths.result.is_file() and _small_sha256(paths.result) != result:
        return Finding(found.name, "foreign", "was made from another result.json")
    return found if config is None else _with_settings(found, manifest, config.export_sha256())


def _lines(path: Path, folder: Path) -> Iterator[Finding]:
    if not path.exists():
        return
    name = path.relative_to(folder).as_posix()
    try:
        yield Finding(name, "whole", f"{sum(1 for _ in read_json_lines(path))} lines")
    except (RunFolderError, ValueError) as error:
        yield Finding(name, "damaged", str(error))


def _strangers(folder: Path, known: set[str]) -> Iterator[Finding]:
    for path in sorted(folder.iterdir()):
        if path.name not in known | {MARK} and not path.name.startswith("."):
            yield Finding(path.name, "foreign", "is no file of ours")


def _mapping(value: Any) -> dict[str, Any]:
    """What a file of somebody else's has where ours has a mapping."""
    return value if isinstance(value, dict) else {}


def read_entry(path: Path, key: str | None = None) -> Any:
    """The content of a JSON file, or one key of it; None where it cannot be read or holds no mapping."""
    try:
        content = read_json(path)
    except RunFolderError:
        return None
    if not isinstance(content, dict):
        return None
    return content if key is None else content.get(key)
