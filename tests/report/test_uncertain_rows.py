"""The report on uncertainty, of a synthetic run: its numbers, its rows and their texts, what is not defined."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.data.rows import Row
from pipeline.report.inputs import read_inputs
from pipeline.report.result import left_out
from pipeline.report.scoring import score_system
from pipeline.report.systems import System
from pipeline.report.uncertainty.scores import rows_entry, uncertainty_entries
from pipeline.report.uncertainty.tables import row_lists, uncertainty_table
from pipeline.run_folder.predictions import read_predictions

from .test_report import write_run

CHOSEN = {"plain": [1], "mean_field": [2], "masks_8": list(range(3, 11))}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run's inputs and three of its systems."""
    root = tmp_path_factory.mktemp("uncertain") / "run"
    splits = SimpleNamespace(**write_run(root), fingerprint="rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.inputs.load_splits", lambda _: splits)
        inputs = read_inputs(root)
    scored = [score_system(inputs, System(key, key, key, (tuple(members),))) for key, members in CHOSEN.items()]
    return SimpleNamespace(root=root, inputs=inputs, scored=scored, entries=uncertainty_entries(inputs, scored))


def predicted(report: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(members' probabilities (M, N, C), labels) by nothing of ours but the reader."""
    predictions = read_predictions(report.inputs.paths.predictions, "test")
    by_id = {row.id: row.label for row in report.inputs.test_rows}
    outputs = np.exp(predictions.outputs[CHOSEN[key]].astype(np.float64))
    return outputs, np.array([by_id[row_id] for row_id in predictions.row_ids])


@pytest.mark.parametrize("key", CHOSEN)
def test_numbers_are_those_of_the_members_written_out(report: Any, key: str) -> None:
    members, labels = predicted(report, key)
    mixture, found = members.mean(axis=0), report.entries[key]
    wrong, confidence = mixture.argmax(axis=1) != labels, mixture.max(axis=1)
    entropies = -(mixture * np.log(mixture)).sum(axis=1)
    assert found["entropy"]["value"] == pytest.approx(entropies.mean(), rel=1e-6)
    assert found["auroc_confidence"]["value"] == pytest.approx(roc_auc_score(wrong, -confidence), rel=1e-6)
    order = np.argsort(-confidence)
    area = np.mean(np.cumsum(wrong[order]) / np.arange(1, len(wrong) + 1))
    assert found["aurc"]["value"] == pytest.approx(area, rel=1e-6) and found["e_aurc"]["value"] < found["aurc"]["value"]
    assert all(one["low"] <= one["value"] <= one["high"] for one in found.values())
    if len(members) == 1:
        assert "mutual_information" not in found
        return
    apart = entropies - -(members * np.log(members)).sum(axis=2).mean(axis=0)
    assert found["mutual_information"]["value"] == pytest.approx(apart.mean(), rel=1e-5)
    total = found["expected_entropy"]["value"] + found["mutual_information"]["value"]
    assert total == pytest.approx(found["entropy"]["value"])
    assert found["auroc_mutual_information"]["value"] == pytest.approx(roc_auc_score(wrong, apart), abs=1e-4)


def test_rows_to_see_are_the_extremes_of_the_system_with_the_most_passes(report: Any) -> None:
    members, labels = predicted(report, "masks_8")
    mixture, entry = members.mean(axis=0), rows_entry(report.inputs, report.scored)
    assert entry is not None and entry["system"] == "masks_8"
    place = {row.id: n for n, row in enumerate(report.inputs.test_rows)}
    apart = -(mixture * np.log(mixture)).sum(axis=1) + (members * np.log(members)).sum(axis=2).mean(axis=0)
    shown = [place[one["id"]] for one in entry["disagreement"]]
    assert len(shown) == 10 and sorted(apart[shown]) == pytest.approx(np.sort(apart)[-10:].tolist(), abs=1e-6)
    assert np.diff(apart[shown]).max() < 1e-6
    wrong = np.flatnonzero(mixture.argmax(axis=1) != labels)
    surest = wrong[np.argsort(-mixture.max(axis=1)[wrong])][:10]
    assert [place[one["id"]] for one in entry["confidently_wrong"]] == surest.tolist()
    first = entry["confidently_wrong"][0]
    assert (first["right"], first["predicted"]) == (labels[surest[0]], 1 - labels[surest[0]])
    assert first["probabilities"] == pytest.approx(mixture[surest[0]].tolist(), rel=1e-6)
    of_members = members[:, surest[0]]
    assert first["members"]["chosen"] == of_members.argmax(axis=1).tolist()
    assert first["members"]["probability"] == pytest.approx(of_members[:, first["predicted"]].tolist(), rel=1e-6)


def test_without_an_ensemble_the_runs_own_adapter_is_shown_and_nobody_disagrees(report: Any) -> None:
    entry = rows_entry(report.inputs, report.scored[:2])
    assert entry is not None and entry["system"] == "mean_field"
    assert entry["disagreement"] == [] and len(entry["confidently_wrong"]) == 10


def test_what_is_not_defined_is_left_open(report: Any) -> None:
    """Every answer is right: there is no error to find, and no confident one to show."""
    test = report.inputs.splits["test"]
    right = replace(test, labels=report.scored[2].predictions["test", "before"][0].argmax(axis=-1))
    inputs = replace(report.inputs, splits={**report.inputs.splits, "test": right})
    scored = [replace(one, inputs=inputs) for one in report.scored]
    found, entry = uncertainty_entries(inputs, scored)["masks_8"], rows_entry(inputs, scored)
    assert found is not None and entry is not None and entry["confidently_wrong"] == []
    assert found["auroc_confidence"] is None and found["auroc_mutual_information"] is None
    assert found["aurc"] == found["e_aurc"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    table = uncertainty_table({"kind": "choice", "systems": [{"name": "x", "uncertainty": found}]})
    assert table is not None and table[1][0][-1] == ("–", "")
    numbers = uncertainty_entries(replace(inputs, kind="regression"), scored)
    assert set(numbers.values()) == {None}


def test_seeds_are_runs_of_one_system(report: Any) -> None:
    pair = score_system(report.inputs, System("pair", "pair", "pair", ((1,), (2,)), seeds=(0, 1)))
    found = uncertainty_entries(report.inputs, [pair])["pair"]
    values = [report.entries[key]["aurc"]["value"] for key in ("plain", "mean_field")]
    assert found is not None and found["aurc"]["value"] == pytest.approx(np.mean(values))


def test_agreement_with_raters_is_left_out_in_words_where_some_rows_lack_it(report: Any) -> None:
    said = "Not every test row says how people rated it"
    assert report.inputs.splits["test"].raters is not None
    assert not any(one.startswith(said) for one in left_out(report.inputs))
    test = replace(report.inputs.splits["test"], raters=None)
    assert any(one.startswith(said) for one in left_out(replace(report.inputs, splits={"test": test})))


def test_long_texts_and_many_choices_are_shortened() -> None:
    row = Row("1", "begin " + "x" * 900 + " end", tuple(f"choice {n} " + "y" * 90 for n in range(9)), 8)
    entry = {"id": "1", "right": 8, "predicted": 0, "probabilities": [0.5, 0.2, 0.1, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0],
             "mutual_information": 0.1, "members": {"chosen": [0, 0, 1], "probability": [0.2, 0.5, 0.4]}}
    (shown,) = row_lists({"rows_to_see": {"disagreement": [entry], "confidently_wrong": []}}, [row])["disagreement"]
    (text,) = shown["texts"]
    assert text.startswith("begin") and text.endswith("end") and len(text) <= 400
    assert [choice["probability"] for choice in shown["choices"]] == [0.5, 0.2, 0.1, 0.0], "the right one is among them"
    assert shown["choices"][-1]["right"] and len(shown["choices"][0]["text"]) == 80 and shown["range"] == "0.20 – 0.50"
    assert row_lists({"rows_to_see": None}, [row]) == {}
