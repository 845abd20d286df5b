"""Predictions meet labels: each kind finds its right answers by row id, and says which are missing."""

import numpy as np
import pytest

from pipeline.data.rows import Row
from pipeline.errors import RunFolderError
from pipeline.prediction.predict import validation_scores
from pipeline.run_folder.labelled import join_labels
from pipeline.run_folder.predictions import ChoicePredictions, CompletionPredictions, RegressionPredictions

LOGS = np.log(np.array([[[0.25, 0.75], [0.5, 0.5]], [[0.75, 0.25], [0.125, 0.875]]], dtype=np.float32))
CHOICES = ChoicePredictions(("a", "b"), LOGS, seconds=3.0)
TOKENS = CompletionPredictions(("a", "b"), -np.array([[1.0, 2.0, 4.0]], dtype=np.float32), np.array([0, 1, 3]))
NUMBERS = RegressionPredictions(("a", "b"), np.array([[1.0, 4.0]], dtype=np.float32))


def choice_rows(first=1, second=0):
    """In another order than the predictions."""
    return [Row("b", "B", ("x", "y"), second), Row("a", "A", ("x", "y"), first)]


def test_choices_with_their_labels():
    split = join_labels(CHOICES, choice_rows(), "here")
    assert split.labels.tolist() == [1, 0] and np.array_equal(split.outputs, LOGS)
    assert split.offsets is None and split.rows == 2 and split.seconds == 3.0 and split.units is None
    assert split.averaging_space("logit") == "logit" and split.averaging_space("probability") == "probability"


def test_completions_have_a_cell_per_token():
    split = join_labels(TOKENS, [Row("b", "B", completion="y"), Row("a", "A", completion="x")], "here")
    assert split.outputs.tolist() == [[[-1.0], [-2.0], [-4.0]]] and split.labels.tolist() == [0, 0, 0]
    assert split.offsets.tolist() == [0, 1, 3] and split.rows == 2
    assert split.averaging_space("logit") == "probability"
    assert split.row_mean(split.outputs[..., 0]).values.tolist() == [[-1.0, -6.0]]


def test_numbers_with_their_scores():
    split = join_labels(NUMBERS, [Row("b", "B", score=3.0), Row("a", "A", score=0.5)], "here")
    assert split.labels.tolist() == [0.5, 3.0] and split.labels.dtype == np.float64
    assert split.outputs.tolist() == [[[1.0], [4.0]]] and split.averaging_space("logit") == "value"


def test_rows_of_one_question_are_one_unit():
    rows = [Row("a", "same", score=1.0), Row("b", "same", score=2.0)]
    assert join_labels(NUMBERS, rows, "here").units.tolist() == [0, 0]


@pytest.mark.parametrize("predictions", [CHOICES, TOKENS, NUMBERS])
def test_other_rows_are_refused_in_every_kind(predictions):
    with pytest.raises(RunFolderError, match="here: has 1 rows that the data lack, and lacks 2 rows of the data"):
        join_labels(predictions, [Row("a"), Row("c"), Row("d")], "here")


@pytest.mark.parametrize("label", [None, 2, -1])
def test_a_label_that_was_not_predicted_is_named(label):
    with pytest.raises(RunFolderError, match=f"here, row b: has no prediction for the label {label}.*evaluate again"):
        join_labels(CHOICES, choice_rows(second=label), "here")


def test_a_choice_that_its_row_does_not_have_is_no_label():
    logs = np.array([[[np.log(0.5), np.log(0.5), -np.inf], np.log([0.25, 0.25, 0.5])]])
    rows = [Row("a", "A", ("x", "y", "z"), 2), Row("b", "B", ("x", "y", "z"), 2)]
    with pytest.raises(RunFolderError, match="here, row a: has no prediction for the label 2"):
        join_labels(ChoicePredictions(("a", "b"), logs), rows, "here")


def test_a_row_without_a_score_is_refused():
    with pytest.raises(RunFolderError, match="here: has predictions of rows without a score"):
        join_labels(NUMBERS, [Row("a", "A", score=1.0), Row("b", "B")], "here")


def test_validation_scores_are_those_of_member_0():
    scores = validation_scores(CHOICES, choice_rows())
    assert scores == pytest.approx({"nll": -np.log([0.75, 0.5]).mean(), "accuracy": 1.0})
    rows = [Row("a", "A", completion="x"), Row("b", "B", completion="y")]
    assert validation_scores(TOKENS, rows) == {"nll": pytest.approx(7 / 3)}
    scores = validation_scores(NUMBERS, [Row("a", "A", score=0.5), Row("b", "B", score=3.0)])
    mean_square = (0.25 + 1.0) / 2
    assert scores["rmse"] == pytest.approx(mean_square**0.5) and scores["pearson"] == pytest.approx(1.0)
    assert scores["nll"] == pytest.approx(0.5 * np.log(2 * np.pi * np.e * mean_square))
    with pytest.raises(RunFolderError, match="validation predictions: has 0 rows that the data lack, and lacks 1"):
        validation_scores(CHOICES, [*choice_rows(), Row("c", "C", ("x", "y"), 0)])
