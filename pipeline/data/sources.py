"""Where rows come from: a file, a folder of split files, a hub data set, the embedded default.

Whatever the source, its records come under the names of splits; a single file counts as `train`,
from which the splits that have no file of their own are drawn.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pipeline.config import DataConfig, TemplateConfig
from pipeline.config.data import EMBEDDED_SETS
from pipeline.data.formats.faults import Faults
from pipeline.data.formats.record import Record
from pipeline.data.read import READERS, SUFFIXES, read_file
from pipeline.data.rows import IdRegister, Row
from pipeline.data.shapes.table import Shape
from pipeline.data.template import ColumnError, to_row
from pipeline.errors import DataError
from pipeline.hub import out_of_reach, tell_of_cache, unreachable

SPLITS = ("train", "validation", "calibration", "test")
EMBEDDED = "embedded:"
MOST_ERRORS = 5
"""Faults shown at once, where rows are answered as they come and a file's faults are not counted (`Faults` does)."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_SUFFIX = re.compile(r"\.([A-Za-z]{2,7}|bz2)$")
_PROTOCOL = re.compile(r"[a-z][a-z0-9+]*://")


def is_local(path: str) -> bool:
    """Whether `data.path` means a file or folder on this machine."""
    if path.startswith(EMBEDDED) or _PROTOCOL.match(path):
        return False
    if _SUFFIX.search(path) or not _HUB_NAME.fullmatch(path):
        return True
    folder = os.path.dirname(path)
    return os.path.exists(path) or (folder != "" and os.path.isdir(folder))


@dataclass(frozen=True)
class Source:
    """One place that rows come from, and for which splits."""

    path: str
    template: TemplateConfig | None
    splits: Mapping[str, str]
    """Our split -> its name there."""
    field: str = "data.path"
    """The configuration key that names it."""
    columns: tuple[str, ...] | None = None
    """Names of the columns of files without a header line."""
    weight: float = 1.0
    """How often an epoch has each of its training rows."""
    prefix: str = ""
    """Before the ids of its rows, where there are several sources."""
    shape: Shape | None = None
    """What its rows are read as, once `pipeline.data.shapes.reading` has looked."""


def sources_of(config: DataConfig) -> list[Source]:
    """The configured places: `data.path` or `data.sources`, and `data.evaluation` where it is given."""
    named: dict[str, str] = dict(config.splits.items()) if config.splits else {split: split for split in SPLITS}
    other = config.evaluation
    if other is not None:
        named = {"train": named["train"]}
    found = [
        Source(one.path, one.template or config.template, named, f"data.sources.{place}.path", one.columns, one.weight,
               f"{place}/")
        for place, one in enumerate(config.sources)
    ] or [Source(config.path, config.template, named, columns=config.columns)]
    if other is None:
        return found
    field = "data.evaluation.path"
    return [*found, Source(other.path, other.template, dict(other.splits.items()), field, other.columns)]


def head_rows(config: DataConfig) -> int:
    """First rows of a stream that the other splits are drawn from."""
    asked = [config.validation_rows or 0, config.calibration_rows or 0, config.test_rows or 0]
    return max(2000, 4 * sum(asked))


def local_files(source: Source) -> dict[str, list[Path]]:
    """Split -> files of a local source; a single file, or what a pattern finds, is `train`.

    Raises:
        DataError: nothing there, a folder without a train file, two files for one split.
    """
    try:
        place = Path(source.path).expanduser()
        if place.is_dir():
            return {split: [file] for split, file in _folder_files(place, source).items()}
        there = [place] if place.exists() else [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
    except (OSError, RuntimeError) as error:  # no right to look, a name too long; ~NAME of nobody
        raise DataError(source.field, source.path, f"cannot be looked at ({error})", "Check the path.") from error
    if not there:
        raise DataError(
            source.field, source.path, "does not exist",
            "Give a local file or folder, or a hub data set as NAME, OWNER/NAME or OWNER/NAME:CONFIG.",
        )
    _require_single(source)
    return {"train": there}


def check_name(path: str, field: str = "data.path") -> None:
    """Refuse an embedded name that does not exist. Raises `DataError`."""
    if path.startswith(EMBEDDED) and path not in EMBEDDED_SETS:
        raise DataError(field, path, "is not embedded", f"There are {', '.join(EMBEDDED_SETS)}.")


def open_records(source: Source, streaming: bool = False) -> dict[str, Iterable[Record]]:
    """Split -> records of any source. Hub and embedded data are fetched here.

    Args:
        streaming: read a hub data set row by row over the network instead of storing it.

    Raises:
        DataError: nothing there under that name.
    """
    path = source.path
    check_name(path, source.field)
    if path.startswith(EMBEDDED):
        from pipeline.data.embedded import embedded_rows

        _require_single(source)
        return {"train": _numbered(path, embedded_rows(path))}
    if is_local(path):
        read: Callable[[Path], Iterator[Record]] = read_file
        if source.columns is not None:
            read = partial(read_file, columns=source.columns)
        return {split: chain.from_iterable(map(read, files)) for split, files in local_files(source).items()}
    if source.columns is not None:
        raise DataError(
            "data.columns", list(source.columns), f"names columns of a local .csv or .tsv, and {path} is none",
            "Leave it out.",
        )
    return _hub_records(source, streaming)


def parse(
    records: Iterable[Record], template: TemplateConfig | None, name: str, limit: int | None = None
) -> tuple[list[Row], bool]:
    """Rows of one file, and whether the file ended within `limit` records.

    Raises:
        DataError: the first faults of each kind (as an `ErrorList` where several), or no row.
    """
    rows: list[Row] = []
    faults = Faults(name)
    ids = IdRegister()
    iterator = iter(records)
    try:
        for where, values in islice(iterator, limit):
            try:
                if isinstance(values, DataError):
                    raise values
                row = ids.name(to_row(values, template, where), values.get("id"), where, values.get("unit"))
                if rows and row.kind != rows[0].kind:
                    raise DataError(where, None, f"is a {row.kind} row among {rows[0].kind} rows", "Keep one kind.")
                rows.append(row)
            except DataError as error:
                faults.add(error)
                if isinstance(error, ColumnError) and not rows:
                    break  # of a table, which lacks the column in every row
        whole = next(iterator, None) is None
    except DataError as error:  # of the file, which cannot be read any further
        faults.add(error)
    faults.refuse()
    if not rows:
        raise DataError("data.path", name, "holds no rows", "Give a file with at least one row.")
    return rows, whole


def rows_of(source: Source, records: Iterable[Record], name: str, limit: int | None = None) -> tuple[list[Row], bool]:
    """`parse` of a source's records, with the source's mark before the ids."""
    rows, whole = parse(records, source.template, name, limit)
    return [replace(row, id=f"{source.prefix}{row.id}") for row in rows] if source.prefix else rows, whole


def _folder_files(folder: Path, source: Source) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split, name in source.splits.items():
        found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if os.path.lexists(folder / f"{name}{suffix}")]
        if len(found) > 1:
            raise DataError(
                source.field, str(folder), f"holds {found[0].name} and {found[1].name}", "Keep one file per split."
            )
        if found:
            files[split] = found[0]
    there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    for split, name in _missing(source, files):
        raise DataError(
            source.field, str(folder), f"has no {name} file{_meant(split, name)}; it holds {there}",
            f"Name the files {', '.join(SPLITS)} with one of {', '.join(READERS)} (only train is a must), or say in"
            " data.splits which is which.",
        )
    return files


def _missing(source: Source, found: Mapping[str, object]) -> list[tuple[str, str]]:
    """(our split, its name there) that must be there and is not: train, and whatever was given another name."""
    return [
        (split, name) for split, name in source.splits.items()
        if split not in found and (split == "train" or name != split or "train" not in source.splits)
    ]


def _meant(split: str, name: str) -> str:
    return "" if split == name else f", meant to be our {split}"


def _require_single(source: Source) -> None:
    """Refuse a single table, which counts as train, where other splits are meant to come from it."""
    if _missing(source, {"train": None}) or "train" not in source.splits:
        raise DataError(
            source.field, source.path, f"is a single table, and {', '.join(source.splits)} are to come from it",
            "Give a folder or a hub data set with a split for each.",
        )


class HubRecords:
    """Records of a split of the hub, and the names of classes that it brings."""

    def __init__(self, name: str, table: Iterable[dict[str, Any]]) -> None:
        self._name, self._table = name, table
        features = getattr(table, "features", None) or {}
        self.classes: dict[str, list[str]] = {
            column: list(feature.names) for column, feature in features.items() if hasattr(feature, "names")
        }
        """Column of whole numbers -> what each means."""

    def __iter__(self) -> Iterator[Record]:
        return _numbered(self._name, self._table)


def _numbered(name: str, records: Iterable[dict[str, Any]]) -> Iterator[Record]:
    number = 0
    try:
        for number, record in enumerate(records, start=1):
            yield f"{name}: row {number}", record
    except Exception as error:  # of hub data: the network, a damaged file, a picture that cannot be opened
        raise DataError(
            f"{name}: row {number + 1}", None, f"cannot be read ({error})", "Check the network and the data set."
        ) from error


def _builder(source: Source) -> str:
    """The reader of `datasets` for a file behind a protocol, by its suffix; compressed files are unpacked by it.

    Raises:
        DataError: a suffix that says nothing.
    """
    _require_single(source)
    plain = re.sub(r"\.(gz|bz2|xz|zst|zip)$", "", source.path)
    for suffix, builder in ((".jsonl", "json"), (".json", "json"), (".csv", "csv"), (".parquet", "parquet")):
        if plain.endswith(suffix):
            return builder
    raise DataError(
        source.field, source.path, "must end in .jsonl, .json, .csv or .parquet, perhaps compressed (.gz)",
        "Give such a file, or a data set of the hub by its name.",
    )


def _hub_records(source: Source, streaming: bool) -> dict[str, Iterable[Record]]:
    import datasets

    path = source.path
    protocol = _PROTOCOL.match(path)
    name, _, variant = path.partition(":")
    wanted: tuple[str | None, ...] = (name, variant or None)
    files: dict[str, Any] = {}
    if protocol:
        wanted, files = (_builder(source),), {"data_files": {"train": path}}
    missing = "" if protocol and not path.startswith("hf:") else unreachable()
    try:
        found = datasets.load_dataset(*wanted, **files, streaming=streaming)
    except Exception as error:  # the client raises many types: no network, no such name, a needed configuration
        if missing:
            raise out_of_reach(source.field, path) from error
        raise DataError(
            source.field, path, f"is no local path and cannot be loaded from the hub ({' '.join(str(error).split())})",
            "Check the name (OWNER/NAME or OWNER/NAME:CONFIG) and the network, or give a local file.",
        ) from error
    if missing:
        tell_of_cache()
    there = {split: name for split, name in source.splits.items() if name in found}
    for split, name in _missing(source, there):
        raise DataError(
            source.field, path,
            f"has no split {name}{_meant(split, name)}; its splits are {', '.join(map(str, found))}",
            f"Save the splits you want as {', '.join(SPLITS)}.jsonl in a folder, or name them in data.splits.",
        )
    return {split: HubRecords(f"{path}[{name}]", found[name]) for split, name in there.items()}
