"""Prediction files: what is written is read, and what is damaged is named."""

import numpy as np
import pytest

from pipeline.errors import RunFolderError
from pipeline.files import write_json
from pipeline.run_folder.predictions import (
    ChoicePredictions,
    CompletionPredictions,
    Member,
    read_members,
    read_predictions,
    write_members,
    write_predictions,
)


def choice(log_probs=None):
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[[0.2, 0.8, 0.0], [0.5, 0.25, 0.25]]] * 3, dtype=np.float32))
    return ChoicePredictions(("a", "ü-2"), logs if log_probs is None else log_probs, 1.5)


def completion():
    tokens = -np.random.default_rng(0).random((2, 5)).astype(np.float32)
    return CompletionPredictions(("x", "y", "z"), tokens, np.array([0, 2, 3, 5]), 0.25)


def test_choice_predictions_round_trip(tmp_path):
    write_predictions(tmp_path, "test", choice())
    read = read_predictions(tmp_path, "test")
    assert isinstance(read, ChoicePredictions)
    assert read.row_ids == ("a", "ü-2") and read.seconds == 1.5 and read.members == 3
    assert read.log_probs.dtype == np.float32 and np.array_equal(read.log_probs, choice().log_probs)


def test_completion_predictions_round_trip(tmp_path):
    write_predictions(tmp_path, "test", completion())
    read = read_predictions(tmp_path, "test")
    assert isinstance(read, CompletionPredictions)
    assert read.row_ids == ("x", "y", "z") and read.members == 2 and read.offsets.tolist() == [0, 2, 3, 5]
    assert np.array_equal(read.token_log_probs, completion().token_log_probs)


def test_the_file_is_what_the_contract_says(tmp_path):
    write_predictions(tmp_path, "test", choice())
    assert [p.name for p in tmp_path.iterdir()] == ["test.npz"]
    with np.load(tmp_path / "test.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == {"row_ids", "kind", "log_probs", "seconds"}
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
    with pytest.raises(RunFolderError, match=r"members\.json: does not exist\. Run the evaluate stage"):
        read_members(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "keys", "pickle", "plain array"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "test.npz"
    write_predictions(tmp_path, "test", choice())
    whole = path.read_bytes()
    if damage in ("cut", "empty", "text"):
        path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no numbers"}[damage])
    elif damage == "keys":
        np.savez(path, row_ids=np.array(["a"]))
    elif damage == "pickle":
        np.savez(path, row_ids=np.array([{}], dtype=object), seconds=1.0, kind="choice", log_probs=np.zeros((1, 1, 1)))
    else:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(RunFolderError, match=r"test\.npz: is damaged") as raised:
        read_predictions(tmp_path, "test")
    assert raised.value.exit_code == 2


def test_members_round_trip_with_free_fields(tmp_path):
    members = [Member("base", "base"), Member("d3", "mask_draw", "adapter", "ff", 3, {"rate": 0.5, "rank": 8})]
    write_members(tmp_path, members)
    assert read_members(tmp_path) == members


@pytest.mark.parametrize("entries", [[{"name": "a", "group": "other"}], [{"group": "base"}], ["a"], {"a": 1}, []])
def test_damaged_members_are_named(tmp_path, entries):
    write_json(tmp_path / "members.json", entries)
    with pytest.raises(RunFolderError, match=r"members\.json"):
        read_members(tmp_path)
