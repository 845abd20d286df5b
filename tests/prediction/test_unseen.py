"""No row that is evaluated was shown in a training, wherever rows for evaluation come from now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig, build_config
from pipeline.data.splits import Splits, load_splits
from pipeline.errors import RunFolderError
from pipeline.files import MANIFEST, write_json, write_text
from pipeline.prediction.unseen import require_unseen
from pipeline.run_folder.chain import Origin

SPLITS = ("validation", "calibration", "test")


def rows(first: int, last: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "choices": [" a", " b"], "label": n % 2} for n in range(first, last)]


def write_rows(path: Path, found: list[dict[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in found))


def data_of(folder: Path, source: str | None) -> DataConfig:
    evaluation = None if source is None else {"path": str(folder / source), "splits": {s: s for s in SPLITS}}
    sizes = {"validation_rows": 4, "calibration_rows": 4, "test_rows": 4, "train_rows": 10}
    return build_config({"data": {"path": str(folder / "rows.jsonl"), "evaluation": evaluation, **sizes}}).data


def published(folder: Path, splits: Splits, evaluation: Any) -> Path:
    write_json(folder / MANIFEST, {"origin": Origin("config", splits.fingerprint).as_dict(), "evaluation": evaluation})
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """rows.jsonl, from which all splits are drawn; `new` and `newer`, other rows for evaluation."""
    write_rows(tmp_path / "rows.jsonl", rows(0, 30))
    for name in ("new", "newer"):
        for n, split in enumerate(SPLITS):
            first = 100 * (n + 1 + 5 * (name == "newer"))
            write_rows(tmp_path / name / f"{split}.jsonl", rows(first, first + 6))
        write_rows(tmp_path / name / "train.jsonl", rows(900, 906))
    return tmp_path


def test_rows_from_elsewhere_are_evaluated_unless_they_were_trained_on(world: Path) -> None:
    then, now = data_of(world, None), data_of(world, "new")
    splits = load_splits(then)
    adapter = published(world / "adapter", splits, None)
    assert not require_unseen([adapter], then, splits)
    assert {row.id for row in load_splits(now).train} != {row.id for row in splits.train}, "what is drawn has changed"
    assert require_unseen([adapter], now, load_splits(now))

    shown = [{"prompt": row.prompt, "choices": list(row.choices), "label": row.label} for row in splits.train[:3]]
    write_rows(world / "new" / "test.jsonl", [*shown, *rows(300, 301)])
    found = load_splits(now)
    assert not {row.prompt for row in found.test} & {row.prompt for row in found.train}, "of now's training rows none"
    with pytest.raises(RunFolderError, match=r"adapter: was trained on 3 of the rows that data\.evaluation gives"):
        require_unseen([adapter], now, found)


def test_from_one_source_to_another_and_back(world: Path) -> None:
    then, now = data_of(world, "new"), data_of(world, "newer")
    assert then.evaluation is not None
    splits = load_splits(then)
    adapter = published(world / "adapter", splits, then.evaluation.model_dump(mode="json"))
    assert require_unseen([adapter, adapter], now, load_splits(now))
    assert not require_unseen([adapter], then, splits)
    drawn = data_of(world, None)
    with pytest.raises(RunFolderError, match="was trained on"):  # of what it was shown some is test now
        require_unseen([adapter], drawn, load_splits(drawn))


def test_other_data_are_refused_as_ever(world: Path) -> None:
    then, now = data_of(world, None), data_of(world, "new")
    adapter = published(world / "adapter", load_splits(then), None)
    write_rows(world / "rows.jsonl", rows(3, 33))
    for data in (then, now):
        with pytest.raises(RunFolderError, match=r"adapter: was made from other data\. Put back"):
            require_unseen([adapter], data, load_splits(data))
    for content in ({}, {"origin": [1]}, {"origin": {"data_sha256": 5}}):
        write_json(adapter / MANIFEST, content)
        with pytest.raises(RunFolderError, match="was made from other data"):
            require_unseen([adapter], then, load_splits(then))
    write_json(adapter / MANIFEST, {"evaluation": [1]})
    with pytest.raises(RunFolderError, match="does not say where"):
        require_unseen([adapter], now, load_splits(now))
    streamed = now.model_copy(update={"streaming": True})
    write_json(adapter / MANIFEST, {"evaluation": None})
    with pytest.raises(RunFolderError, match="was trained on a stream"):
        require_unseen([adapter], streamed, load_splits(streamed))
