"""Greedy selection, fitted weights and members as a row needs, on predictions in memory: who learns from which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import log_softmax

from pipeline.config import build_config
from pipeline.report.choices import ensemble_entry
from pipeline.report.inputs import ReportInputs
from pipeline.report.result import build_result
from pipeline.report.scoring import AFTER, BEFORE, score_system
from pipeline.report.systems import build_systems
from pipeline.report.weighted import adaptive_systems, weighted_systems
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.run_folder.members import PredictedMember
from pipeline.run_folder.paths import RunPaths
from pipeline.scores.ensemble import average
from pipeline.scores.weights import fit_weights, without_small

OWN = [PredictedMember("mean-field", "mean_field", "adapter", "cd")]
OWN += [PredictedMember(f"draw {d}", "mask_draw", "adapter", "cd", d) for d in range(8)]
SEARCHED = [PredictedMember(f"trial {k}", "searched", f"{k}/adapter", "ef") for k in range(2)]


def inputs_of(members: list[PredictedMember], noise: list[float], rows: int = 300, **ensemble: Any) -> ReportInputs:
    """Members that see the truth through so much noise of their own; a third of the rows share their unit with another.

    Two members with little noise each know what the other does not.
    """
    random, splits = np.random.default_rng(0), {}
    for name in ("validation", "calibration", "test"):
        truth = random.normal(scale=2.0, size=(rows, 3))
        labels = (log_softmax(truth, axis=1) + random.gumbel(size=(rows, 3))).argmax(axis=1)
        logits = truth + np.array(noise)[:, None, None] * random.normal(size=(len(members), rows, 3))
        units = np.arange(rows) - (np.arange(rows) % 3 == 2)
        units = np.unique(units, return_inverse=True)[1]
        splits[name] = LabelledSplit(log_softmax(logits, axis=-1).astype(np.float32), labels, None, 1.0, units)
    config = build_config({"ensemble": {"size": 8, **ensemble}, "evaluate": {"bootstrap_samples": 100}})
    return ReportInputs(
        RunPaths(Path("run")), config, "", {}, {}, "choice", members, splits, curves={}, trainings=None, search=None
    )


def entry_of(inputs: ReportInputs) -> dict[str, Any]:
    """What is chosen, without all that a report has beside it."""
    scored = [score_system(inputs, one) for one in [*build_systems(inputs), *weighted_systems(inputs)]]
    entry = ensemble_entry(inputs, scored)
    assert entry is not None
    return entry


def test_what_two_members_know_better_together_is_chosen_with_its_weights() -> None:
    inputs = inputs_of(OWN, [1.5, 6.0, 6.0, 1.5, *[6.0] * 5])
    result, _ = build_result(inputs)
    entry = result["ensemble"]
    assert [one["key"] for one in entry["candidates"]][-2:] == ["greedy", "fitted"]
    assert entry["chosen"] == "greedy" and entry["members"] == [None, 2] and entry["chosen_size"] == 1
    assert sum(entry["weights"]) == pytest.approx(1.0) and min(entry["weights"]) > 0.3
    system = next(one for one in result["systems"] if one["key"] == "greedy")
    assert (system["passes"], system["members"]) == (2, ["mean-field", "draw 2"])
    assert system["weights"] == entry["weights"]
    assert any("Validation chooses a greedy selection of 2 members averaged" in line for line in result["reading"])


def test_draws_that_are_alike_are_a_prefix_of_equal_weights() -> None:
    """Weights that fit noise are no clear win, and of equal cost the draws as they come are taken."""
    for noise in (0.3, 1.5):
        entry = entry_of(inputs_of(OWN, [noise] * 9))
        assert entry["chosen"].startswith(("mean_field", "masks_")) and entry["weights"] is None
        assert entry["members"] == ([None] if entry["chosen"] == "mean_field" else list(range(entry["chosen_size"])))


def test_no_validation_row_is_judged_by_weights_that_have_seen_its_unit() -> None:
    inputs = inputs_of(OWN, [1.0, *[2.0] * 8])
    fitted = next(one for one in weighted_systems(inputs) if one.key == "fitted")
    found, split = score_system(inputs, fitted).predictions["validation", BEFORE][0], inputs.splits["validation"]
    right = split.outputs[:, np.arange(split.rows), split.labels]
    assert split.units is not None
    for half in (0, 1):
        own = split.units % 2 == half
        weights = without_small(fit_weights(right[:, ~own]))
        np.testing.assert_allclose(found[own], average(split.outputs[:, own], weights=weights.tolist()))
    test = inputs.splits["test"]
    expected = average(test.outputs, weights=without_small(fit_weights(right)).tolist())
    np.testing.assert_allclose(score_system(inputs, fitted).predictions["test", BEFORE][0], expected)


def test_searched_adapters_are_offered_to_a_selection_of_its_own() -> None:
    inputs = inputs_of([*OWN, *SEARCHED], [2.0] * 9 + [0.5, 4.0])
    systems = {one.key: one for one in weighted_systems(inputs)}
    assert set(systems) == {"greedy", "fitted", "greedy_searched"}
    assert 9 in systems["greedy_searched"].used and max(systems["greedy"].used) < 9
    assert "greedy_searched" not in [one["key"] for one in entry_of(inputs)["candidates"]]
    useless = weighted_systems(inputs_of([*OWN, *SEARCHED], [1.0] * 9 + [9.0, 9.0]))
    assert [one.key for one in useless] == ["greedy", "fitted"], "it would be the same selection once more"
    alone = {one.key: one for one in weighted_systems(inputs_of([OWN[0], *SEARCHED], [0.8, 0.8, 4.0]))}
    assert set(alone) == {"greedy_searched"} and alone["greedy_searched"].used == [0, 1]


def test_what_adaptive_size_saves_and_costs_is_said_against_all_draws() -> None:
    inputs = inputs_of(OWN, [1.0] * 9, adaptive=0.1)
    entry = entry_of(inputs)
    assert not {"greedy", "fitted"} & {one["key"] for one in entry["candidates"]}, "all draws, as a row needs them"
    assert [one["size"] for one in entry["adaptive"]] == [4, 8]
    found = entry["adaptive"][-1]
    (system,) = adaptive_systems(inputs, [8])
    one, split = score_system(inputs, system), inputs.splits["test"]
    whole = average(split.outputs[1:9])
    assert found["passes"] == system.mean_passes < 7.0 and system.passes == 8
    changed = one.predictions["test", BEFORE][0].argmax(axis=1) != whole.argmax(axis=1)
    assert found["changed"]["value"] == changed.mean() < 0.1
    own, theirs = (-table[np.arange(split.rows), split.labels].mean()
                   for table in (one.predictions["test", BEFORE][0], whole))
    assert found["nll"][BEFORE]["value"] == pytest.approx(own - theirs)
    assert found["nll"][AFTER]["low"] <= found["nll"][AFTER]["value"] <= found["nll"][AFTER]["high"]
    assert not adaptive_systems(inputs_of(OWN, [1.0] * 9, average="logit"), [8]), "sums of logarithms have no bound"
