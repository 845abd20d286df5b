"""Where rows come from: a file, a folder of split files, a hub data set, the embedded default.

Whatever the source, its records come under the names of splits; a single file counts as `train`,
from which the splits that have no file of their own are drawn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.config import TemplateConfig
from pipeline.config.sections import EMBEDDED_DATA
from pipeline.data.read import READERS, Record, read_file
from pipeline.data.rows import IdRegister, Row
from pipeline.data.template import ColumnError, to_row
from pipeline.errors import DataError, ErrorList, UserError

SPLITS = ("train", "validation", "calibration", "test")
EMBEDDED = "embedded:"
MOST_ERRORS = 5
"""Faults shown at once."""

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_SUFFIX = re.compile(r"\.[A-Za-z]{2,7}$")


def is_local(path: str) -> bool:
    """Whether `data.path` means a file or folder on this machine."""
    if path.startswith(EMBEDDED):
        return False
    place = Path(path).expanduser()
    in_local_folder = len(place.parts) > 1 and place.parent.is_dir()
    return place.exists() or in_local_folder or bool(_SUFFIX.search(path)) or not _HUB_NAME.fullmatch(path)


def local_files(path: str) -> dict[str, Path]:
    """Split -> file of a local `data.path`; a single file is `train`.

    Raises:
        DataError: nothing there, a folder without a train file, two files for one split.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder_files(place)
    if not place.exists():
        raise DataError(
            "data.path", path, "does not exist",
            "Give a local file or folder, or a hub data set as NAME, OWNER/NAME or OWNER/NAME:CONFIG.",
        )
    return {"train": place}


def check_name(path: str) -> None:
    """Refuse an embedded name that does not exist. Raises `DataError`."""
    if path.startswith(EMBEDDED) and path != EMBEDDED_DATA:
        raise DataError("data.path", path, "is not embedded", f"There is {EMBEDDED_DATA}.")


def open_records(path: str) -> dict[str, Iterable[Record]]:
    """Split -> records of any `data.path`. Hub and embedded data are fetched here.

    Raises:
        DataError: nothing there under that name.
    """
    check_name(path)
    if path.startswith(EMBEDDED):
        from pipeline.data.embedded import embedded_rows

        return {"train": _numbered(path, embedded_rows(path))}
    if is_local(path):
        return {split: read_file(file) for split, file in local_files(path).items()}
    return _hub_records(path)


def parse(
    records: Iterable[Record], template: TemplateConfig | None, name: str, limit: int | None = None
) -> tuple[list[Row], bool]:
    """Rows of one file, and whether the file ended within `limit` records.

    Raises:
        DataError: the first faults found, up to `MOST_ERRORS` (as an `ErrorList` where several), or no row.
    """
    rows: list[Row] = []
    errors: list[UserError] = []
    ids = IdRegister()
    iterator = iter(records)
    for where, values in islice(iterator, limit):
        try:
            if isinstance(values, DataError):
                raise values
            row = ids.name(to_row(values, template, where), values.get("id"), where)
            if rows and row.kind != rows[0].kind:
                raise DataError(where, None, f"is a {row.kind} row among {rows[0].kind} rows", "Keep one kind.")
            rows.append(row)
        except DataError as error:
            errors.append(error)
            wrong_table = isinstance(error, ColumnError) and not rows
            if len(errors) == MOST_ERRORS or wrong_table:
                break
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorList(errors)
    if not rows:
        raise DataError("data.path", name, "holds no rows", "Give a file with at least one row.")
    return rows, next(iterator, None) is None


def _folder_files(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [folder / f"{split}{suffix}" for suffix in READERS if (folder / f"{split}{suffix}").is_file()]
        if len(found) > 1:
            raise DataError(
                "data.path", str(folder), f"holds {found[0].name} and {found[1].name}", "Keep one file per split."
            )
        if found:
            files[split] = found[0]
    if "train" not in files:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise DataError(
            "data.path", str(folder), f"has no train file; it holds {there}",
            f"Name the files {', '.join(SPLITS)} with one of {', '.join(READERS)}; only train is a must.",
        )
    return files


def _numbered(name: str, records: Iterable[dict[str, Any]]) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield f"{name}: row {number}", record


def _hub_records(path: str) -> dict[str, Iterable[Record]]:
    import datasets

    name, _, variant = path.partition(":")
    try:
        found = datasets.load_dataset(name, variant or None)
    except Exception as error:  # the client raises many types: no network, no such name, a needed configuration
        raise DataError(
            "data.path", path, f"is no local path and cannot be loaded from the hub ({' '.join(str(error).split())})",
            "Check the name (OWNER/NAME or OWNER/NAME:CONFIG) and the network, or give a local file.",
        ) from error
    if "train" not in found:
        raise DataError(
            "data.path", path, f"has no split train; its splits are {', '.join(map(str, found))}",
            f"Save the splits you want as {', '.join(SPLITS)}.jsonl in a folder, and give the folder.",
        )
    return {split: _numbered(f"{path}[{split}]", found[split]) for split in SPLITS if split in found}
