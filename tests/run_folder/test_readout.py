"""The read-out in a manifest: the temperature of exactly what is exported, and the space in which it acts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.simulated import calibrated
from scipy.special import log_softmax

from pipeline.data.rows import Row
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, CompletionPredictions, write_predictions
from pipeline.run_folder.readout import exported_readout
from pipeline.scores.choices import ChoiceLikelihoods
from pipeline.scores.ensemble import average
from pipeline.scores.temperature import fit_temperature

ROWS = tuple("abcdefghij" * 6)
IDS = tuple(f"{letter}{n}" for n, letter in enumerate(ROWS))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    members = [PredictedMember("base", "base"), PredictedMember("mean-field", "mean_field", "a", "own")]
    members += [PredictedMember(f"draw {d}", "mask_draw", "a", "own", d) for d in range(4)]
    write_members(RunPaths(tmp_path).predictions, members)
    return RunPaths(tmp_path)


def test_the_temperature_is_that_of_the_exported_draws(paths: RunPaths) -> None:
    """Three draws, which are no size of a table; not the mean over subsets of three."""
    random = np.random.default_rng(0)
    shared, labels = calibrated(60, 2, random, 3.0)
    tables = log_softmax(shared + np.arange(6)[:, None, None] * random.normal(size=(6, 60, 2)), axis=-1)
    write_predictions(paths.predictions, "calibration", ChoicePredictions(IDS, tables))
    rows = [Row(i, choices=("x", "y"), label=int(y)) for i, y in zip(IDS, labels, strict=True)]
    for space in ("probability", "logit"):
        found = exported_readout(paths, rows, space, [0, 1, 2], "own")
        expected = fit_temperature(average(tables.astype(np.float32)[[2, 3, 4]], space), labels)
        assert found["average"] == space and found["temperature"]["value"] == pytest.approx(expected)
        assert found["temperature"]["low"] < expected < found["temperature"]["high"]
        assert "normalised over the choices" in found["temperature"]["acts_on"]
    own = exported_readout(paths, rows, "logit", [None], "own")["temperature"]["value"]
    assert own == pytest.approx(fit_temperature(tables.astype(np.float32)[1], labels))
    weighted = exported_readout(paths, rows, "logit", [None, 2], "own", weights=[0.25, 0.75])
    assert weighted["weights"] == [0.25, 0.75] and found["weights"] == pytest.approx([1 / 3] * 3)
    mixed = average(tables.astype(np.float32)[[1, 1, 1, 4]][[0, 3, 3, 3]], "logit")
    assert weighted["temperature"]["value"] == pytest.approx(fit_temperature(mixed, labels))
    missing = exported_readout(paths, rows, "logit", [3, 4], "own")
    assert missing["temperature"] is None and missing["reason"] == "not predicted: draw 4. Evaluate again."
    assert "the mean-field adapter" in exported_readout(paths, rows, "logit", [None], "another")["reason"]


def test_calibration_rows_of_one_question_count_once(paths: RunPaths) -> None:
    """Fifteen rows four times each say no more of the temperature than fifteen."""
    log_probs, labels = calibrated(15, 2, np.random.default_rng(1), 2.0)
    tables = np.repeat(np.broadcast_to(log_probs, (6, 15, 2)), 4, axis=1)
    write_predictions(paths.predictions, "calibration", ChoicePredictions(IDS, tables))
    found = []
    for unit in (lambda n: None, lambda n: str(n // 4)):
        rows = [Row(i, choices=("x", "y"), label=int(labels[n // 4]), unit=unit(n)) for n, i in enumerate(IDS)]
        found.append(exported_readout(paths, rows, "logit", [0], "own")["temperature"])
    alone, shared = found
    assert (alone["calibration_units"], shared["calibration_units"]) == (60, 15)
    expected = fit_temperature(tables[0], np.repeat(labels, 4), np.repeat(np.arange(15), 4))
    assert shared["value"] == pytest.approx(expected)
    assert abs(np.log(shared["value"])) < abs(np.log(alone["value"])) and alone["carried"] and not shared["carried"]


def test_completions_are_averaged_as_probabilities_whatever_was_configured(paths: RunPaths) -> None:
    tokens = np.full((6, 60), -0.5, dtype=np.float32)
    write_predictions(paths.predictions, "calibration", CompletionPredictions(IDS, tokens, np.arange(61)))
    rows = [Row(i, prompt="p", completion="c") for i in IDS]
    found = exported_readout(paths, rows, "logit", [0, 1], "own")
    assert found["average"] == "probability" and found["temperature"] is None and "completion" in found["reason"]


def test_without_predictions_the_reason_is_said(paths: RunPaths) -> None:
    found = exported_readout(paths, [], "logit", [0], "own")
    assert found["temperature"] is None and found["reason"].startswith("no calibration predictions")


def test_the_temperature_is_of_choices_scored_as_the_run_says_now(paths: RunPaths) -> None:
    """The predictions were written under `sum`; `data.choice_score` may change after training."""
    random = np.random.default_rng(2)
    likelihoods = ChoiceLikelihoods(
        random.normal(size=(6, 60, 2)) * 3.0 - 6.0, random.integers(1, 6, (60, 2)), random.integers(1, 20, (60, 2))
    )
    write_predictions(paths.predictions, "calibration", ChoicePredictions.of_texts(IDS, likelihoods, "sum"))
    labels = random.integers(0, 2, 60)
    rows = [Row(i, choices=("x", "y"), label=int(y)) for i, y in zip(IDS, labels, strict=True)]
    found = {rule: exported_readout(paths, rows, "logit", [None], "own", rule)["temperature"]["value"]
             for rule in ("sum", "per_token")}
    for rule, value in found.items():
        assert value == pytest.approx(fit_temperature(likelihoods.log_probs(rule)[1], labels), rel=1e-5)
    assert found["sum"] != pytest.approx(found["per_token"], rel=0.05)
