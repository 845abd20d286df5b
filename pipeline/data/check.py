"""What can be said about the data before anything is loaded: a second, no network, no torch."""

from __future__ import annotations

from pipeline.config import DataConfig
from pipeline.config.data import EMBEDDED_DATA
from pipeline.data.embedded import movie_reviews_cached
from pipeline.data.encode_classifier import output_count, refuse_for_causal
from pipeline.data.read import read_file
from pipeline.data.rows import Row
from pipeline.data.sources import check_name, is_local, local_files, parse, sources_of
from pipeline.data.splits import EVALUATED_SPLITS, divide
from pipeline.data.template import check_template
from pipeline.errors import DataError


def check_data(config: DataConfig, limit: int = 1000, classifier: bool | None = False) -> list[Row]:
    """Read and return the first `limit` rows of each local file; files that end within it also tell whether they
    suffice.

    Hub and embedded data are checked by name only; their rows are checked when they are loaded.

    Args:
        classifier: True: all rows must have the same choices, or scores; False: neither scores nor pairs of texts;
            None: not known yet.

    Raises:
        DataError: the fault (an `ErrorList` of up to five where there are several).
    """
    files: dict[str, list[Row]] = {}
    whole: dict[str, bool] = {}
    sources = sources_of(config)
    for source in sources:
        check_template(source.template)
        check_name(source.path)
        if is_local(source.path):
            for split, path in local_files(source).items():
                files[split], whole[split] = parse(read_file(path), source.template, str(path), limit)
    found = [row for rows in files.values() for row in rows]
    if classifier and found:
        output_count(found)
    elif classifier is False:
        refuse_for_causal(found)
    if not all(is_local(source.path) for source in sources):
        return found
    if all(whole.values()):
        divide(files, config)
        return found
    for split in EVALUATED_SPLITS:
        if whole.get(split) and len(files[split]) < (getattr(config, f"{split}_rows") or 1):
            there = len(files[split])
            raise DataError(
                f"data.{split}_rows", getattr(config, f"{split}_rows"), f"the {split} file has {there} rows",
                f"Set data.{split}_rows={there} or less.",
            )
    return found


def at_hand(config: DataConfig) -> bool:
    """Whether every source lies on this machine: nothing would be fetched."""
    return all(
        movie_reviews_cached() if source.path == EMBEDDED_DATA else is_local(source.path)
        for source in sources_of(config)
    )
