"""Prediction files: what is written is read, and what is damaged is named."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import RunFolderError
from pipeline.run_folder.predictions import (
    ChoicePredictions,
    CompletionPredictions,
    RegressionPredictions,
    read_predictions,
    write_predictions,
)
from pipeline.scores.choices import ChoiceLikelihoods


def choice(log_probs=None):
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[[0.2, 0.8, 0.0], [0.5, 0.25, 0.25]]] * 3, dtype=np.float32))
    return ChoicePredictions(("a", "ü-2"), logs if log_probs is None else log_probs, seconds=1.5)


def completion():
    tokens = -np.random.default_rng(0).random((2, 5)).astype(np.float32)
    return CompletionPredictions(("x", "y", "z"), tokens, np.array([0, 2, 3, 5]), seconds=0.25)


def regression():
    return RegressionPredictions(("n", "m"), np.array([[1.5, -2.0]] * 4, dtype=np.float32), seconds=2.5)


def test_choice_predictions_round_trip(tmp_path):
    write_predictions(tmp_path, "test", choice())
    read = read_predictions(tmp_path, "test")
    assert isinstance(read, ChoicePredictions)
    assert read.row_ids == ("a", "ü-2") and read.seconds == 1.5 and read.members == 3
    assert read.log_probs.dtype == np.float32 and np.array_equal(read.log_probs, choice().log_probs)


def texts(*row_ids, choices=3, members=2, seed=0):
    """Predictions of choices that are texts."""
    random = np.random.default_rng(seed)
    shape = (len(row_ids), choices)
    known = ChoiceLikelihoods(
        -9 * random.random((members, *shape)), random.integers(1, 9, shape), random.integers(1, 30, shape)
    )
    return ChoicePredictions.of_texts(row_ids, known, "sum")


def test_choices_that_are_texts_keep_what_every_rule_needs(tmp_path):
    made = texts("a", "b")
    write_predictions(tmp_path, "test", made)
    read = read_predictions(tmp_path, "test")
    assert read.likelihoods.log_likelihoods.dtype == np.float64
    for name, kept in vars(made.likelihoods).items():
        assert np.array_equal(getattr(read.likelihoods, name), kept)
    assert read.scored_by("per_token").log_probs.tolist() == made.likelihoods.log_probs("per_token").tolist()
    short = replace(made.likelihoods, tokens=made.likelihoods.tokens[:1])
    with pytest.raises(ValueError, match="likelihoods and lengths have the shapes"):
        ChoicePredictions(("a", "b"), made.log_probs, short)


def test_merged_texts_score_as_their_parts():
    wide, narrow = texts("c", "a"), texts("b", choices=2, seed=1)
    whole = ChoicePredictions.merged([wide, narrow], ["a", "b", "c"])
    for rule in ("sum", "per_token", "per_character"):
        found, (first, second) = whole.scored_by(rule).log_probs, (p.scored_by(rule).log_probs for p in (wide, narrow))
        assert np.array_equal(found[:, [2, 0]], first) and np.array_equal(found[:, 1, :2], second[:, 0])
        assert np.isneginf(found[:, 1, 2]).all()
    mixed = ChoicePredictions.merged([wide, ChoicePredictions(("b",), narrow.log_probs)], ["a", "b", "c"])
    assert mixed.likelihoods is None, "what is not there for every row is not kept"


def test_completion_predictions_round_trip(tmp_path):
    write_predictions(tmp_path, "test", completion())
    read = read_predictions(tmp_path, "test")
    assert isinstance(read, CompletionPredictions)
    assert read.row_ids == ("x", "y", "z") and read.members == 2 and read.offsets.tolist() == [0, 2, 3, 5]
    assert np.array_equal(read.token_log_probs, completion().token_log_probs)


def test_regression_predictions_round_trip(tmp_path):
    write_predictions(tmp_path, "test", regression())
    read = read_predictions(tmp_path, "test")
    assert isinstance(read, RegressionPredictions)
    assert read.row_ids == ("n", "m") and read.seconds == 2.5 and read.members == 4
    assert read.values.dtype == np.float32 and np.array_equal(read.values, regression().values)


@pytest.mark.parametrize(
    ("make", "types"),
    [(choice, {"log_probs": "<f4"}), (completion, {"token_log_probs": "<f4", "offsets": "<i8"}),
     (regression, {"values": "<f4"})],
)
def test_every_kind_says_its_arrays_and_is_made_of_them(tmp_path, make, types):
    write_predictions(tmp_path, "test", make())
    with np.load(tmp_path / "test.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["row_ids", "seconds", "kind", "made_from", *types]
        assert {name: arrays[name].dtype.str for name in types} == types
        assert str(arrays["kind"]) == make.__name__ == make().kind and arrays["seconds"].dtype == np.float64
    again = type(make()).from_arrays(make().row_ids, make().arrays(), 0.5)
    assert again.seconds == 0.5 and np.array_equal(again.outputs, make().outputs)
    with pytest.raises(KeyError):
        type(make()).from_arrays(make().row_ids, {}, 0.5)


def test_cells_are_rows_or_tokens():
    assert choice().outputs.shape == (3, 2, 3) and choice().first_cells is None and choice().own_space is None
    assert regression().outputs.shape == (4, 2, 1) and regression().first_cells is None
    assert completion().outputs.shape == (2, 5, 1) and completion().first_cells.tolist() == [0, 2, 3, 5]
    assert (completion().own_space, regression().own_space) == ("probability", "value")


def test_merged_choices_are_as_wide_as_the_widest():
    narrow = ChoicePredictions(("b",), np.log(np.full((2, 1, 2), 0.5, dtype=np.float32)))
    wide = ChoicePredictions(("c", "a"), np.log(np.full((2, 2, 4), 0.25, dtype=np.float32)))
    whole = ChoicePredictions.merged([wide, narrow], ["a", "b", "c"])
    assert whole.row_ids == ("a", "b", "c") and whole.log_probs.dtype == np.float32
    expected = [[0.25] * 4, [0.5, 0.5, 0.0, 0.0], [0.25] * 4]
    assert np.exp(whole.log_probs).tolist() == [expected, expected]


def test_merged_completions_keep_the_tokens_of_their_rows():
    first = CompletionPredictions(("c", "a"), -np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), np.array([0, 1, 3]))
    second = CompletionPredictions(("b",), -np.array([[7.0, 8.0], [9.0, 10.0]]), np.array([0, 2]))
    whole = CompletionPredictions.merged([first, second], ["a", "b", "c"])
    assert whole.row_ids == ("a", "b", "c") and whole.offsets.tolist() == [0, 2, 4, 5]
    assert (-whole.token_log_probs).tolist() == [[2.0, 3.0, 7.0, 8.0, 1.0], [5.0, 6.0, 9.0, 10.0, 4.0]]


@pytest.mark.parametrize("make", [choice, completion, regression])
def test_merged_parts_cover_the_rows(make):
    with pytest.raises((KeyError, ValueError), match="k|not normalised"):
        type(make()).merged([make()], [*make().row_ids, "k"])


def test_the_file_is_what_the_contract_says(tmp_path):
    write_predictions(tmp_path, "test", choice())
    assert [p.name for p in tmp_path.iterdir()] == ["test.npz"]
    with np.load(tmp_path / "test.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"row_ids", "kind", "log_probs", "seconds", "made_from"}
        assert str(arrays["kind"]) == "choice" and arrays["row_ids"].dtype.kind == "U"


def test_wrong_shapes_and_values_are_refused():
    with pytest.raises(ValueError, match="shape"):
        ChoicePredictions(("a",), choice().log_probs)
    with pytest.raises(ValueError, match="normalised"):
        choice(choice().log_probs + 0.1)
    with pytest.raises(ValueError, match="normalised"):
        choice(np.full((3, 2, 3), np.nan))
    with pytest.raises(ValueError, match="none twice"):
        ChoicePredictions(("a", "a"), choice().log_probs)
    with pytest.raises(ValueError, match="offsets must be"):
        CompletionPredictions(("x", "y"), np.zeros((1, 4)), np.array([0, 2, 3]))
    with pytest.raises(ValueError, match="must rise"):
        CompletionPredictions(("x", "y"), np.zeros((1, 4)), np.array([0, 0, 4]))
    with pytest.raises(ValueError, match="finite"):
        CompletionPredictions(("x",), np.array([[0.0, -np.inf]]), np.array([0, 2]))


def test_a_missing_file_says_evaluate(tmp_path):
    with pytest.raises(RunFolderError, match=r"test\.npz: does not exist\. Run the evaluate stage"):
        read_predictions(tmp_path, "test")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "keys", "kind", "pickle", "plain array"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "test.npz"
    write_predictions(tmp_path, "test", choice())
    whole = path.read_bytes()
    if damage in ("cut", "empty", "text"):
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no numbers"}[damage])
    elif damage == "keys":
        np.savez(path, row_ids=np.array(["a"]))
    elif damage == "kind":
        np.savez(path, row_ids=np.array(["a"]), seconds=1.0, kind="other", log_probs=np.zeros((1, 1, 1)))
    elif damage == "pickle":
        ids = np.array([{}], dtype=object)
        np.savez(path, row_ids=ids, seconds=1.0, kind="choice", made_from="{}", log_probs=np.zeros((1, 1, 1)))
    else:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(RunFolderError, match=r"test\.npz: is damaged") as raised:
        read_predictions(tmp_path, "test")
    assert raised.value.exit_code == 2
