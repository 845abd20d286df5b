"""What can be said about the data before anything is loaded: no network, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from pipeline.config import DataConfig
from pipeline.data.embedded import is_cached, is_embedded
from pipeline.data.encode_classifier import output_count, refuse_for_causal
from pipeline.data.read import read_file
from pipeline.data.rows import Row
from pipeline.data.shapes.reading import as_read, said_of, with_templates
from pipeline.data.sources import Source, check_name, head_rows, is_local, local_files, rows_of, sources_of
from pipeline.data.splits import EVALUATED_SPLITS, Splits, divide, refuse_mixed, weighted, with_training_rows
from pipeline.data.template import check_template
from pipeline.errors import DataError, ErrorList, UserError, joined


@dataclass(frozen=True)
class Found:
    """What local files hold."""

    config: DataConfig
    """With the templates that rows are read by."""
    rows: list[Row]
    lines: list[str]
    """What rows are read as, and how many each split has."""


def check_data(config: DataConfig, limit: int | None = None, classifier: bool | None = False) -> list[Row]:
    """The rows of `look_at`."""
    return look_at(config, limit, classifier).rows


def look_at(config: DataConfig, limit: int | None = None, classifier: bool | None = False) -> Found:
    """Read the local files; those that end within `limit` rows also tell whether they suffice.

    Hub and embedded data are checked by name only; their rows are checked when they are loaded. Of rows that are to be
    streamed the first are read, which the other splits are drawn from.

    Args:
        limit: rows of each file; None: all of them.
        classifier: True: all rows must have the same choices, or scores; False: neither scores nor pairs of texts;
            None: not known yet.

    Raises:
        DataError: the faults (an `ErrorList` where there are several): of each kind the first, over all files.
    """
    files: dict[str, list[Row]] = {}
    whole: dict[str, bool] = {}
    errors: list[UserError] = []
    lines: list[str] = []
    sources = sources_of(config)
    for place, source in enumerate(sources):
        check_template(source.template)
        check_name(source.path, source.field)
        if not is_local(source.path):
            continue
        local_files(source)  # a place that is not there is said before its columns are looked for
        sources[place] = source = as_read(source, config, bool(classifier))
        count = _read_all(source, config, limit, files, whole, errors)
        lines.append(said_of(source, count if all(whole.values()) else None))
    if errors:
        raise joined(errors)
    refuse_mixed(files)
    found = [row for rows in files.values() for row in rows]
    if classifier and found:
        output_count(found)
    elif classifier is False:
        refuse_for_causal(found)
    read = Found(with_templates(config, sources), found, lines)
    if not all(is_local(source.path) for source in sources):
        return read
    if all(whole.values()):
        splits = with_training_rows(weighted(divide(files, config), sources), config)
        return replace(read, lines=[*lines, _sizes(splits, files, config)])
    _refuse_short(files, whole, config)
    return read


def _read_all(
    source: Source, config: DataConfig, limit: int | None, files: dict[str, list[Row]], whole: dict[str, bool],
    errors: list[UserError],
) -> int:
    """Put the rows of a source's files to those that are there already; how many they are."""
    count = 0
    for split, paths in local_files(source).items():
        most = head_rows(config) if limit is None and config.streaming and split == "train" else limit
        records = chain.from_iterable(read_file(path, source.columns) for path in paths)
        try:
            rows, ended = rows_of(source, records, str(paths[0]), most)
        except DataError as error:
            errors.append(error)
        except ErrorList as several:
            errors.extend(several.errors)
        else:
            count += len(rows)
            files.setdefault(split, []).extend(rows)
            whole[split] = ended and whole.get(split, True)
    return count


def _sizes(splits: Splits, files: dict[str, list[Row]], config: DataConfig) -> str:
    """One line: how many rows each split has, and which of them were drawn from the train file."""
    parts = [f"{len(splits.train):,} to train on"]
    for split in EVALUATED_SPLITS:
        drawn = split not in files and getattr(config, f"{split}_rows") is None
        parts.append(f"{len(getattr(splits, split)):,} {split}{' (drawn)' if drawn else ''}")
    said = f"rows: {', '.join(parts)}"
    if left_out := splits.repeated + splits.leaked:
        said += f"; {left_out:,} left out, which repeat others or stand in two splits"
    if splits.test[0].kind == "choice":
        tested = len(splits.test)
        said += f"; an accuracy over {tested:,} test rows is known to ±{98 / tested**0.5:.0f} points"
    return said


def _refuse_short(files: dict[str, list[Row]], whole: dict[str, bool], config: DataConfig) -> None:
    for split in EVALUATED_SPLITS:
        if whole.get(split) and len(files[split]) < (getattr(config, f"{split}_rows") or 1):
            there = len(files[split])
            raise DataError(
                f"data.{split}_rows", getattr(config, f"{split}_rows"), f"the {split} file has {there} rows",
                f"Set data.{split}_rows={there} or less.",
            )


def at_hand(config: DataConfig) -> bool:
    """Whether every source lies on this machine: nothing would be fetched."""
    return all(
        is_cached(source.path) if is_embedded(source.path) else is_local(source.path)
        for source in sources_of(config)
    )
