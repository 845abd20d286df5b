"""Rows for evaluation may come from elsewhere than they did in a training, but none of them may be one it was shown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.config import DataConfig, EvaluationDataConfig
from pipeline.config.load import validate
from pipeline.data.splits import EVALUATED_SPLITS, Splits, load_splits
from pipeline.errors import RunFolderError, UserError
from pipeline.run_folder.chain import TrainedOn, trained_on

_PUT_BACK = "Put back the data that it was trained with, or train again in another --run-dir."


def require_unseen(adapters: Iterable[Path], data: DataConfig, splits: Splits) -> bool:
    """Refuse adapters whose training was shown a row that is evaluated now; whether one had other rows than these.

    An adapter names the data that it was made from, by their hash, and where its validation, calibration and test
    came from. Where that is another source than now, its training rows are read again, as they were.

    Args:
        adapters: folders of whole adapters.
        splits: what `data` says.

    Raises:
        RunFolderError: an adapter was made from other data than that, or was shown a row that is evaluated.
    """
    found = {folder: made for folder in adapters if (made := trained_on(folder)).data_sha256 != splits.fingerprint}
    before: dict[str, Splits] = {}
    for folder, made in found.items():
        source = json.dumps(made.evaluation, sort_keys=True)
        if source not in before:
            before[source] = _rows_of_then(folder, made, data)
        if before[source].fingerprint != made.data_sha256:
            raise RunFolderError(str(folder), None, "was made from other data", _PUT_BACK)
        shown = {row.question for row in before[source].train}
        seen = [row.id for split in EVALUATED_SPLITS for row in getattr(splits, split) if row.question in shown]
        if seen:
            what = f"was trained on {len(seen)} of the rows that data.evaluation gives, such as {seen[0]}"
            raise RunFolderError(str(folder), None, what, "Leave them out of its files.")
    return bool(found)


def _rows_of_then(folder: Path, made: TrainedOn, data: DataConfig) -> Splits:
    try:
        source = None if made.evaluation is None else validate(EvaluationDataConfig, made.evaluation)
    except (UserError, TypeError, ValueError) as error:
        what = "does not say where the rows of its validation came from"
        raise RunFolderError(str(folder), None, what, _PUT_BACK) from error
    if source == data.evaluation:
        raise RunFolderError(str(folder), None, "was made from other data", _PUT_BACK)
    if data.streaming:  # of which only the first rows are ever held
        what = "was trained on a stream, whose rows cannot be compared with those of another data.evaluation"
        raise RunFolderError(str(folder), None, what, _PUT_BACK)
    return load_splits(data.model_copy(update={"evaluation": source}))
