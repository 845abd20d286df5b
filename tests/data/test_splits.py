"""Who owns which rows."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import DataConfig
from pipeline.data.rows import Row
from pipeline.data.splits import TAKING_ORDER, Splits, divide, load_splits
from pipeline.errors import DataError

NAMES = ("train", "validation", "calibration", "test")


def rows_of(count: int, start: int = 0) -> list[Row]:
    return [Row(str(i), f"Question {i}", (" a", " b"), i % 2) for i in range(start, start + count)]


def config_of(train: int | None, validation: int, calibration: int, test: int, seed: int = 0) -> DataConfig:
    return DataConfig(
        path="x", train_rows=train, validation_rows=validation, calibration_rows=calibration, test_rows=test, seed=seed
    )


def prompts(splits: Splits) -> dict[str, list[str]]:
    return {name: [row.prompt for row in getattr(splits, name)] for name in NAMES}


sizes = st.tuples(st.none() | st.integers(1, 20), st.integers(1, 10), st.integers(1, 10), st.integers(1, 10))


@settings(deadline=None)
@given(sizes, st.integers(0, 2**32), st.randoms())
def test_sizes_are_met_disjointly_whatever_the_order_in_the_file(asked: Any, seed: int, random: Any) -> None:
    rows, config = rows_of(60), config_of(*asked, seed=seed)
    splits = divide({"train": rows}, config)
    counts = [len(getattr(splits, name)) for name in NAMES]
    assert counts == [asked[0] or 60 - sum(asked[1:]), *asked[1:]]
    used = [row.id for name in NAMES for row in getattr(splits, name)]
    assert len(set(used)) == len(used)
    random.shuffle(rows)
    again = divide({"train": rows}, config)
    assert again == splits


def test_test_rows_do_not_depend_on_other_sizes_and_train_rows_are_nested() -> None:
    small = prompts(divide({"train": rows_of(60)}, config_of(5, 10, 10, 10)))
    large = prompts(divide({"train": rows_of(60)}, config_of(20, 10, 10, 10)))
    other = prompts(divide({"train": rows_of(60)}, config_of(5, 2, 7, 10)))
    assert small["test"] == large["test"] == other["test"]
    assert small["train"] == large["train"][:5]


def test_the_seed_draws_the_split_uniformly() -> None:
    hits = Counter(
        row.id for seed in range(2000) for row in divide({"train": rows_of(10)}, config_of(1, 1, 1, 3, seed)).test
    )
    chi_square = sum((hits[str(i)] - 600) ** 2 / 600 for i in range(10))
    assert chi_square < 27.9  # 99.9 % point of chi-square with 9 degrees of freedom; without replacement it is smaller


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), min_size=1, max_size=60), st.integers(0, 5))
def test_no_question_has_two_owners(pairs: list[tuple[int, int]], seed: int) -> None:
    rows = [Row(str(i), f"Q{q}", completion=f"A{a}") for i, (q, a) in enumerate(pairs)]
    try:
        splits = divide({"train": rows}, config_of(None, 2, 2, 2, seed))
    except DataError as error:
        assert len(set(pairs)) < 2 + 2 + 2 + 1 or len({q for q, _ in pairs}) < 7, error
        return
    owners: dict[str, set[str]] = {}
    for name in NAMES:
        for row in getattr(splits, name):
            owners.setdefault(row.question, set()).add(name)
    assert all(len(names) == 1 for names in owners.values())
    assert splits.repeated == len(pairs) - len(set(pairs))
    assert [len(rows) for rows in (splits.validation, splits.calibration, splits.test)] == [2, 2, 2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.none() | st.integers(0, 15)), min_size=30, max_size=80),
       st.integers(0, 5), st.randoms())
def test_no_unit_has_two_owners(pairs: list[tuple[int, int | None]], seed: int, random: Any) -> None:
    """Units hang together over questions that they share; rows without one stand by themselves."""
    rows = [Row(str(i), f"Q{q}", completion=f"A{i}", unit=None if u is None else f"U{u}")
            for i, (q, u) in enumerate(pairs)]
    try:
        splits = divide({"train": rows}, config_of(None, 2, 2, 2, seed))
    except DataError:
        return
    owners: dict[str, set[str]] = {}
    for name in NAMES:
        for row in getattr(splits, name):
            for what in filter(None, (row.question, row.unit)):
                owners.setdefault(what, set()).add(name)
    assert all(len(names) == 1 for names in owners.values())


def test_the_order_in_the_file_does_not_decide_about_units() -> None:
    rows = [Row(str(i), f"Q{i}", completion="A", unit=f"U{i // 4}" if i < 40 else None) for i in range(60)]
    config = config_of(12, 7, 7, 10)
    assert divide({"train": rows}, config) == divide({"train": rows[::-1]}, config)


def test_splits_without_units_are_those_of_the_rows_alone() -> None:
    """Held by their fingerprint: a split that moved would make every older run another one."""
    rows = [Row(str(i), f"Question {i // 2}", completion=f"A{i}") for i in range(60)]
    found = divide({"train": rows}, config_of(None, 5, 5, 5))
    assert found.fingerprint.startswith("9a3243b552c769f3")


def test_too_few_units_are_said_so() -> None:
    rows = [Row(str(i), f"Q{i}", completion="A", unit=f"U{i % 3}") for i in range(60)]
    said = r"60 distinct rows \(with 3 different units\).*at least 4 rows with different units"
    with pytest.raises(DataError, match=said):
        divide({"train": rows}, config_of(None, 5, 5, 5))


def test_repeated_texts_are_dropped_even_with_another_label_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    line = '{{"prompt": "Q{0}", "choices": ["a", "b"], "label": {1}}}\n'
    path.write_text("".join(line.format(i, 0) for i in range(8)) + line.format(3, 1) + line.format(4, 0))
    config = config_of(None, 2, 2, 2).model_copy(update={"path": str(path)})
    with caplog.at_level(logging.WARNING):
        splits = load_splits(config)
    assert "dropped 2 repeated rows" in caplog.text and splits.repeated == 2
    assert [row.label for rows in (splits.train, splits.validation, splits.calibration, splits.test)
            for row in rows] == [0] * 8


def test_rows_of_a_test_file_are_taken_out_of_the_train_file() -> None:
    files = {"train": rows_of(30), "test": rows_of(10, start=25)}
    splits = divide(files, config_of(None, 3, 3, 10))
    assert splits.leaked == 5
    assert {row.prompt for row in splits.test} == {f"Question {i}" for i in range(25, 35)}
    assert len(splits.train) == 30 - 5 - 3 - 3


def test_a_missing_calibration_file_is_drawn_from_train_not_from_validation() -> None:
    files = {"train": rows_of(30), "validation": rows_of(5, 100), "test": rows_of(5, 200)}
    splits = divide(files, config_of(None, 5, 4, 5))
    assert {row.prompt for row in splits.calibration} <= {row.prompt for row in rows_of(30)}
    assert (len(splits.calibration), len(splits.train), len(splits.validation)) == (4, 26, 5)


def test_the_fingerprint_follows_rows_and_split() -> None:
    rows = rows_of(40)
    base = divide({"train": rows}, config_of(None, 5, 5, 5)).fingerprint
    changed = [*rows[:-1], Row(rows[-1].id, rows[-1].prompt, rows[-1].choices, 1 - rows[-1].label)]  # type: ignore[operator]
    assert len(base) == 64
    assert base == divide({"train": rows}, config_of(None, 5, 5, 5)).fingerprint
    assert base != divide({"train": changed}, config_of(None, 5, 5, 5)).fingerprint
    assert base != divide({"train": rows}, config_of(None, 5, 5, 6)).fingerprint
    assert base != divide({"train": rows}, config_of(None, 5, 5, 5, seed=1)).fingerprint


@pytest.mark.parametrize(
    ("asked", "field", "demand"),
    [
        ((None, 5, 5, 10), "data.train_rows:", "10 test + 5 calibration + 5 validation + at least 1 train"),
        ((15, 2, 2, 2), "data.train_rows = 15:", "2 test + 2 calibration + 2 validation + 15 train"),
        ((None, 2, 2, 99), "data.test_rows = 99:", "99 test"),
    ],
)
def test_too_few_rows_name_the_key_the_number_and_what_works(asked: Any, field: str, demand: str) -> None:
    with pytest.raises(DataError) as caught:
        divide({"train": rows_of(20)}, config_of(*asked))
    text = str(caught.value)
    assert text.startswith(field) and "20 distinct rows" in text and demand in text
    settings = dict(part.removeprefix("data.").split("=") for part in text.partition("for example: ")[2].split())
    chosen = {key: None if value == "null" else int(value) for key, value in settings.items()}
    assert divide({"train": rows_of(20)}, config_of(*asked).model_copy(update=chosen)).train


def test_one_prompt_for_all_rows_cannot_be_divided() -> None:
    rows = [Row(str(i), "Write a story.", completion=f"Story {i}") for i in range(50)]
    with pytest.raises(DataError, match=r"with 1 different prompts.*Give at least 4 rows with different prompts"):
        divide({"train": rows}, config_of(None, 2, 2, 2))


def test_every_split_is_taken_once() -> None:
    assert sorted(TAKING_ORDER) == sorted(NAMES)
