"""Answers from what members said, without a model: rows with different numbers of choices, both spaces, numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.rows import Row
from pipeline.ensemble.ensemble import Answer, NumberAnswer, _choices, _numbers, as_dict, row_of
from pipeline.ensemble.readout import Readout
from pipeline.errors import DataError
from pipeline.scores.abstention import Threshold

ROWS = [Row("a", "p", ("x", "y", "z")), Row("b", "q", ("x", "y"))]
PROBABILITIES = np.array([[[0.2, 0.3, 0.5], [0.9, 0.1, 0.0]], [[0.6, 0.3, 0.1], [0.7, 0.3, 0.0]]])


def outputs() -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(PROBABILITIES)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_members_are_averaged_first_and_scaled_then(space: str) -> None:
    readout = Readout((0, 1), space, 2.0, "choice")  # type: ignore[arg-type]
    for n, (row, count) in enumerate(zip(ROWS, (3, 2), strict=True)):
        own = PROBABILITIES[:, n, :count]
        mixed = own.mean(axis=0) if space == "probability" else np.sqrt(own.prod(axis=0))
        expected = mixed**0.5 / (mixed**0.5).sum()
        answer = _choices(outputs(), ROWS, readout, None)[n]
        assert isinstance(answer, Answer) and answer.id == row.id
        assert answer.choice == row.choices[expected.argmax()].strip()
        np.testing.assert_allclose(answer.probabilities, expected, atol=1e-12)
        np.testing.assert_allclose(answer.spread, own.std(axis=0), atol=1e-12)
        assert answer.entropy == pytest.approx(-(expected * np.log(expected)).sum())
        assert "answered" not in as_dict(answer)


def test_rows_are_answered_by_their_confidence_before_scaling() -> None:
    readout = Readout((0, 1), "probability", 2.0, "choice")
    for confidence, expected in ((0.81, [False, False]), (0.79, [False, True]), (0.39, [True, True])):
        threshold = Threshold(confidence, 0.1, 0.95, 100, 50, 1)  # the averages' tops are 0.4 and 0.8
        assert [a.answered for a in _choices(outputs(), ROWS, readout, threshold) if isinstance(a, Answer)] == expected


def test_numbers_are_averaged_and_have_a_spread() -> None:
    found = _numbers(np.array([[[1.0], [5.0]], [[3.0], [5.0]]]), ROWS)
    assert found == [NumberAnswer("a", 2.0, 1.0), NumberAnswer("b", 5.0, 0.0)]


@pytest.mark.parametrize("given", ["a text", 3, [("text", "t")]])
def test_a_row_without_columns_is_told_what_rows_are(given: object) -> None:
    with pytest.raises(DataError, match="row 2 = .*is no mapping of columns to values. Give the columns"):
        row_of(given, 2)
    assert row_of({"text": "t"}, 1) == {"text": "t"}
