"""What a table says by itself: chance, constant answers, weak temperatures, edges of grids, what to do next and why."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig, build_config
from pipeline.config.load import find_recipe, merge_trees, overridden_tree, read_yaml
from pipeline.report.comparison import step_costs
from pipeline.report.inputs import TrainingCurve
from pipeline.report.remarks import chance, chance_line, edges, larger_grids, remarks
from pipeline.run_folder.comparison import Training, plan_trainings


def inputs(**changes: Any) -> Any:
    outputs = np.log(np.array([[[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [0.5, 0.5, 0.0]]]) + 1e-300)
    outputs = np.where(outputs < -600.0, -np.inf, outputs)
    split = SimpleNamespace(outputs=outputs, labels=np.array([0, 1, 1, 1]))
    return SimpleNamespace(**{
        "kind": "choice", "splits": {"test": split}, "search": None, "trainings": None, "curves": {},
        "config": build_config({}), **changes,
    })


def system(key: str, nll: float = 0.3, **changes: Any) -> dict[str, Any]:
    temperature = {"at_bound": False, "carried": True}
    return {"key": key, "name": key, "test": {"before": {"nll": {"value": nll}}}, "temperature": temperature,
            "top_choices": [0.5, 0.5], "train_seeds": [], **changes}


def result(*systems: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"kind": "choice", "chance": {"nll": 0.693, "accuracy": 0.5, "most_frequent": 0.6}, "systems": systems,
            "rows": {"calibration": 50, "test": 100}, "units": {"calibration": 50, "test": 100}, "claim_seeds": 3,
            "comparisons": [], **changes}


def test_chance_is_that_of_the_choices_each_row_has() -> None:
    found = chance(inputs())
    assert found == pytest.approx({
        "accuracy": (0.5 + 0.5 + 2 / 3) / 4, "nll": (2 * np.log(2) + 2 * np.log(3)) / 4, "most_frequent": 0.75,
    })
    said = "guessing has an accuracy of 0.500 and an NLL of 0.693; always the most frequent answer is right in 0.600"
    assert said in chance_line(result())
    scores = SimpleNamespace(labels=np.array([1.0, 3.0]))
    numbers = chance(inputs(kind="regression", splits={"test": scores}))
    assert numbers == {"rmse": 1.0, "pearson": 0.0, "spearman": 0.0}
    assert chance(inputs(kind="completion")) is None and chance_line(result(chance=None)) == ""


def test_single_systems_are_warned_of() -> None:
    bound, weak = ({"at_bound": b, "carried": c} for b, c in ((True, True), (False, False)))
    found = remarks(inputs(), result(
        system("fine"), system("constant", top_choices=[1.0, 0.0]), system("worse", 0.8),
        system("wild", temperature=bound), system("weak", temperature=weak), system("seeded", train_seeds=[1, 2]),
    ))
    beginnings = [
        "One answer for all test rows: constant.", "NLL above that of guessing (0.693) before scaling: worse.",
        "Temperature at the bound of its search: wild.", "50 calibration rows carry no temperature of weak:",
        "2 seeds are too few for a claim",
    ]
    assert len(found) == 5 and all(a.startswith(b) for a, b in zip(found, beginnings, strict=True))
    assert remarks(inputs(), result(system("fine", train_seeds=[1, 2, 3]))) == []


def test_what_holds_of_all_systems_does_not_name_them_one_by_one() -> None:
    weak = {"at_bound": False, "carried": False}
    systems = [system(name, 0.8, temperature=weak) for name in ("base", "plain", "mean_field")]
    guess, carried = remarks(inputs(), result(*systems, units={"calibration": 10, "test": 100}))
    assert guess == "NLL above that of guessing (0.693) before scaling: every system."
    assert carried.startswith("50 calibration rows (10 independent units) carry no temperature of any system:")


def test_choices_at_the_edge_of_a_grid_are_named() -> None:
    fixed = {"adapter.rank": 8, "adapter.kind": "lora"}
    one = Training("a", "lora_dropout", {}, 0, "ab", "done")
    grid = [replace(one, values={"train.learning_rate": rate, **fixed}, chosen=rate == 0.3) for rate in (0.1, 0.2, 0.3)]
    assert edges(grid) == (["LoRA Dropout: lr 0.3 (largest of 3)"], [])
    inside = [replace(t, chosen=t.values["train.learning_rate"] == 0.2) for t in grid]
    assert edges(inside) == ([], [])
    two = [replace(t, method=method) for method in ("none", "lora_dropout") for t in grid[1:]]
    assert remarks(inputs(trainings=two), result()) == [
        "Of two values every choice is at the edge (lr 0.2 and 0.3): the best may lie beyond them.",
    ]
    search = {"warnings": ["Chosen at the edge of what was searched: adapter.rank = 16. The best may lie beyond it."]}
    assert remarks(inputs(search=search, trainings=grid), result()) == [
        *search["warnings"],
        "Chosen at the edge of what was tried: LoRA Dropout: lr 0.3 (largest of 3). The best may lie beyond it.",
    ]


def test_a_choice_among_more_settings_than_plain_lora_had_is_said() -> None:
    one = Training("a", "none", {}, 0, "ab", "done")
    sizes = {"none": 2, "hiddenkey": 3, "lora_dropout": 2, "dropkey": 1}
    tried = [replace(one, method=method, values={"train.learning_rate": rate}, seed=seed)
             for method, count in sizes.items() for rate in range(count) for seed in (0, 1)]
    assert larger_grids(tried) == ["HiddenKey (3, plain LoRA 2)"]
    (said,) = remarks(inputs(trainings=tried), result())
    assert said.startswith("Chosen among more settings than plain LoRA: HiddenKey (3, plain LoRA 2).")
    assert larger_grids([t for t in tried if t.method != "none"]) == []


def test_of_trainings_that_shared_passes_no_cost_is_told() -> None:
    one = Training("a", "none", {}, 0, "ab", "done", step_seconds=2.0)
    other = replace(one, name="b", method="dropkey", step_seconds=3.0)
    assert step_costs([one, other]) == {"a": 1.0, "b": 1.5} and remarks(inputs(trainings=[one, other]), result()) == []
    packed = [replace(one, packed=True), other]
    assert step_costs(packed) == {}
    (said,) = remarks(inputs(trainings=packed), result())
    assert said.startswith("Trained together: seconds of training are those of all")


def test_the_shipped_comparisons_give_plain_lora_as_many_settings_as_any_method() -> None:
    recipe = overridden_tree(read_yaml(find_recipe("compare")), [])
    quick = merge_trees(recipe, {"compare": read_yaml(find_recipe("quick"))["compare"]})
    for config in (build_config(recipe), build_config(quick), RunConfig()):
        tried = [replace(training, state="done") for training, _ in plan_trainings(config)]
        assert len({one.method for one in tried}) >= 3 and larger_grids(tried) == []


@pytest.mark.parametrize(("values", "said"), [
    ([0.9, 0.7, 0.6], "Next: train longer"), ([0.9, 0.5, 0.6], "Next: more training rows"), ([0.9, 0.5, 0.51], None),
    ([0.9], None),
])
def test_the_next_step_follows_from_the_validation_curve(values: list[float], said: str | None) -> None:
    curve = TrainingCurve({1: 0.5}, dict(enumerate(values)))
    found = remarks(inputs(curves={"mean_field": curve}), result(system("mean_field")))
    assert [line for line in found if not line.startswith(said or "x")] == [] and len(found) == (said is not None)


def test_a_training_that_patience_has_ended_is_named() -> None:
    curves = {"mean_field": TrainingCurve({1: 0.7, 8: 0.5}, {}), "plain": TrainingCurve({12: 0.5}, {})}
    said = "mean_field was trained for 8 of 12 steps: 2 validations in a row were no improvement (train.patience)."
    for patience, expected in ((2, [said]), (None, [])):
        config = build_config({"train": {"max_steps": 12, "patience": patience}})
        found = remarks(inputs(curves=curves, config=config), result(system("mean_field"), system("plain")))
        assert [line for line in found if "steps" in line] == expected


def test_rows_that_a_difference_needs_are_counted() -> None:
    wanted = {"split": "test", "scaling": "before", "system": "mean_field", "versus": "plain", "score": "nll"}

    def said(difference: float, half: float) -> list[str]:
        entry = {**wanted, "difference": difference, "low": difference - half, "high": difference + half,
                 "excludes_zero": abs(difference) > half}
        return remarks(inputs(), result(system("mean_field"), comparisons=[entry]))

    assert "would need about 800 test rows" in said(-0.05, 0.1)[0]
    assert "no more rows" in said(-0.001, 0.1)[0] and said(-0.2, 0.1) == []
