"""The search space: what a file may say, and that every fault is found before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import ConfigError, RunConfig, build_config
from tune.dimensions import Options, Range, Space
from tune.ledger import TrialRecord
from tune.search import _unequal_tuning, edge_warnings
from tune.space import SERVED_RANKS, Arm, load_arms, load_space, trial_config

BASE = RunConfig()


def config_with(path: Path, text: str, trials: int = 6, **sections: object) -> RunConfig:
    path.write_text(text, encoding="utf-8")
    return build_config({"search": {"space": str(path), "trials": trials}, **sections})


@pytest.mark.parametrize(("name", "trials"), [("default", 6), ("quick", 4)])
def test_shipped_spaces_are_legal_for_the_default_run(name: str, trials: int) -> None:
    space = load_space(build_config({"search": {"space": name, "trials": trials}}))
    assert "adapter.rate" in space.dimensions
    ranks = space.dimensions.get("adapter.rank", Options(SERVED_RANKS))
    assert set(ranks.extremes()) <= set(SERVED_RANKS)


FAULTS = {
    "adapter.rats: {choice: [0.1]}": "Did you mean adapter.rate",
    "adapter.rates.lora_C: {choice: [0.1]}": "Did you mean adapter.rates.lora_B?",
    "adapter.rank: {choice: [8], if_used: true}": "is always used",
    "adapter.rates.ffn_hidden: {choice: [0.1]}": "adapter.rates.ffn_hidden needs a method with a site at ffn_hidden",
    "adapter.rates.ffn_hidden: {choice: [0.1], if_used: true}": "no dimension that the method in force uses",
    "adapter.rate: [0.1, 0.2]": "must be a mapping",
    "adapter: {choice: [0.1]}": "adapter: is not a key a search can vary",
    "data.max_tokens: {choice: [64, 128]}": "data.max_tokens: is not a key a search can vary",
    "train.max_steps: {choice: [10, 20]}": "search.max_steps sets the length",
    "adapter.rate: {choices: [0.1]}": "Did you mean choice?",
    "adapter.rate: {choice: [0.1], uniform: [0.1, 0.2]}": "needs exactly one of",
    "adapter.rate: {}": "needs exactly one of",
    "adapter.rate: {choice: []}": "at least one value",
    "adapter.rate: {choice: [0.1, 0.1]}": "none twice",
    "adapter.rate: {uniform: [0.6, 0.1]}": "low < high",
    "adapter.rate: {uniform: [0.1]}": "[low, high]",
    "adapter.rate: {uniform: [low, high]}": "valid number",
    "train.learning_rate: {loguniform: [0.0, 0.1]}": "0 < low",
    "adapter.rate: {uniform: [0.5, 1.0]}": "adapter.rate=1.0, which is no valid run",
    "adapter.rank: {choice: [8, 0]}": "adapter.rank=0, which is no valid run",
    "adapter.rank: {uniform: [9, 15]}": "no rank that vLLM serves",
    "train.draws: {uniform: [1.5, 4]}": "whole numbers",
    "train.micro_batch: {choice: [4, 8]}\ntrain.global_batch: {choice: [16, 20]}": "train.global_batch=20, which is no",
    "": "has no dimension",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(config_with(tmp_path / "space.yaml", text, trials=1))
    assert FAULTS[text] in str(caught.value)


@pytest.mark.parametrize(
    ("method", "rates"),
    [
        ("none", []),
        ("lora_dropout", ["adapter.rate"]),
        ("dropkey", ["adapter.rate"]),
        ("hiddenkey_minus", ["adapter.rates.attention_logits", "adapter.rates.ffn_hidden"]),
        ("lora_dropout+hiddencut", ["adapter.rates.lora_A", "adapter.rates.lora_B", "adapter.rates.ffn_hidden"]),
        ([{"position": "lora_rank", "rate": 0.2}], ["adapter.rates.lora_rank"]),
        ("hiddenkey", ["adapter.rates.attention_logits", "adapter.rates.ffn_hidden", "adapter.consistency.weight"]),
    ],
)
def test_the_default_space_has_the_rates_of_the_method_in_force(method: object, rates: list[str]) -> None:
    config = build_config({"adapter": {"method": method}})
    space = load_space(config)
    assert list(space.dimensions) == [*rates, "adapter.rank", "train.learning_rate"]
    chosen = trial_config(config, dict.fromkeys(rates, 0.123), "trial").adapter.resolved_method()
    assert {site.rate for site in chosen.sites} == ({0.123} if rates else set())
    assert chosen.consistency.weight == (0.123 if method == "hiddenkey" else 1.0)


def test_the_default_space_has_the_range_of_the_paper_for_the_weight_of_a_consistency_term() -> None:
    weight = Range(0.01, 10.0, log=True)
    preset = build_config({"adapter": {"method": "hiddenkey"}})
    assert load_space(preset).dimensions["adapter.consistency.weight"] == weight
    added = build_config({"adapter": {"method": "dropkey", "consistency": {"kind": "js"}}})
    assert load_space(added).dimensions["adapter.consistency.weight"] == weight
    without = build_config({"adapter": {"method": "hiddenkey", "consistency": {"kind": "none"}}})
    assert "adapter.consistency.weight" not in load_space(without).dimensions


def test_a_space_that_does_not_fit_the_method_is_refused(tmp_path: Path) -> None:
    config = config_with(tmp_path / "s.yaml", "adapter.rate: {uniform: [0.1, 0.5]}", adapter={"method": "hiddenkey"})
    with pytest.raises(ConfigError, match=r"adapter\.rate does not fit the method 'hiddenkey'"):
        load_space(config)


def test_an_unknown_space_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="default, quick"):
        load_space(build_config({"search": {"space": "defualt"}}))


@pytest.mark.parametrize(
    ("text", "trials", "said"),
    [
        ("adapter.rank: {choice: [8, 16]}\nadapter.rate: {choice: [0.1, 0.2]}", 5, "exceeds the 4 points"),
        ("adapter.rank: {grid: [8, 16]}\nadapter.rate: {grid: [0.1, 0.2]}", 3, "below the 4 grid points"),
        ("train.draws: {uniform: [1, 3]}", 4, "exceeds the 3 points"),
    ],
)
def test_trials_must_fit_the_points(tmp_path: Path, text: str, trials: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_space(config_with(tmp_path / "space.yaml", text, trials))


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    space = load_space(config_with(tmp_path / "s.yaml", "train.learning_rate: {loguniform: [2e-4, 2e-3]}"))
    assert space.dimensions["train.learning_rate"] == Range(2e-4, 2e-3, log=True)


def test_a_range_of_ranks_means_the_served_ones_and_a_choice_is_free(tmp_path: Path) -> None:
    space = load_space(config_with(tmp_path / "a.yaml", "adapter.rank: {loguniform: [8, 100]}", trials=4))
    assert space.dimensions["adapter.rank"] == Options((8, 16, 32, 64))
    space = load_space(config_with(tmp_path / "b.yaml", "adapter.rank: {choice: [4, 12]}", trials=2))
    assert space.dimensions["adapter.rank"] == Options((4, 12))


def test_a_trial_is_the_base_configuration_with_the_values_and_nothing_else() -> None:
    config = build_config({"label": "smoke", "search": {"max_steps": 7}, "train": {"seed": 5}})
    trial = trial_config(config, {"adapter.rate": 0.25, "train.learning_rate": 1e-3}, "trial_003")
    assert (trial.adapter.rate, trial.train.learning_rate, trial.train.max_steps) == (0.25, 1e-3, 7)
    assert trial.train.validate_every_steps == 3  # so that it can be stopped before its end
    assert trial.label == "smoke: trial_003"
    changed = {
        (section, key)
        for section, fields in config.model_dump().items()
        if isinstance(fields, dict)
        for key, value in fields.items()
        if trial.model_dump()[section][key] != value
    }
    assert changed == {
        ("adapter", "rate"), ("train", "learning_rate"), ("train", "max_steps"), ("train", "checkpoint_every_steps"),
        ("train", "keep_checkpoints"), ("train", "validate_every_steps"),
    }  # fmt: skip


@given(st.floats(0, 1, exclude_max=True), st.floats(1e-6, 1e3), st.floats(1.001, 1e4), st.booleans())
def test_a_range_stays_inside_and_keeps_its_measure(u: float, low: float, ratio: float, log: bool) -> None:
    dimension = Range(low, low * ratio, log=log)
    value = dimension.at(u)
    assert low <= value <= low * ratio
    exact = low * ratio**u if log else low + u * (low * ratio - low)
    assert math.isclose(value, exact, rel_tol=0.006)  # three significant digits


@given(st.integers(1, 50), st.integers(1, 50))
def test_whole_numbers_are_equally_likely(low: int, more: int) -> None:
    dimension = Range(low, low + more, whole=True)
    cells = 10 * (more + 1)
    drawn = [dimension.at((i + 0.5) / cells) for i in range(cells)]
    assert all(isinstance(value, int) for value in drawn)
    assert [drawn.count(value) for value in range(low, low + more + 1)] == [10] * (more + 1)


@pytest.mark.parametrize(("dimension", "inside", "edge"), [
    (Range(0.1, 0.6), [0.2, 0.5, 0.15], [0.1, 0.12, 0.58, 0.6]),
    (Range(1e-4, 1e-2, log=True), [2e-4, 1e-3, 5e-3], [1.1e-4, 9e-3]),
    (Options((8, 16, 32)), [16], [8, 32]),
    (Options(("a", "b")), ["a", "b"], []),
    (Options((True, False)), [True], []),
    (Options((8,)), [8], []),
    (Range(4, 4), [4], []),
])
def test_a_chosen_value_at_the_edge_is_noticed(dimension: Options | Range, inside: list, edge: list) -> None:
    assert not any(dimension.at_edge(value) for value in inside)
    assert all(dimension.at_edge(value) for value in edge)


def test_the_warning_names_what_lies_at_the_edge() -> None:
    space = Space("x", {"adapter.rank": Options((8, 16)), "adapter.rate": Range(0.1, 0.6)})
    best = TrialRecord("trial_000", 0, {"adapter.rank": 16, "adapter.rate": 0.3}, "h")
    said = "at the edge of what was searched: adapter.rank = 16. The best may lie beyond it."
    assert edge_warnings(Arm("method", BASE, space, 2), best) == [f"Chosen {said}"]
    assert edge_warnings(Arm("plain", BASE, space, 2), best) == [f"Chosen for plain LoRA {said}"]
    assert edge_warnings(Arm("method", BASE, space, 2), TrialRecord("x", 0, {"adapter.rate": 0.3}, "h")) == []


@pytest.mark.parametrize("method", ["lora_dropout", "hiddenkey", [{"position": "lora_rank", "rate": 0.2}]])
def test_plain_lora_is_tuned_over_what_it_has_of_the_space(method: object) -> None:
    """As many trials as the method; nothing of dropout, and the rest as the method has it."""
    config = build_config({"adapter": {"method": method, "alpha": 64.0}, "search": {"trials": 5}})
    own, plain = load_arms(config)
    assert (own.name, own.config, own.trials) == ("method", config, 5)
    assert (plain.name, plain.trials, plain.trial_name(3)) == ("plain", 5, "plain_003")
    shared = ("adapter.rank", "train.learning_rate")
    assert plain.space.dimensions == {key: own.space.dimensions[key] for key in shared}
    assert not plain.config.adapter.resolved_method().sites and plain.config.adapter.alpha == 64.0
    values = {"adapter.rank": 16, "train.learning_rate": 1e-3}
    assert trial_config(plain.config, values, "plain_003").adapter.rank == 16


def test_a_finite_space_gives_plain_lora_fewer_trials(tmp_path: Path) -> None:
    dropout = "adapter.rate: {grid: [0.1, 0.2, 0.3]}\ntrain.draws: {choice: [2, 4]}\n"
    text = f"{dropout}train.learning_rate: {{grid: [1e-3, 1e-4]}}"
    own, plain = load_arms(config_with(tmp_path / "s.yaml", text, trials=6))
    assert (own.trials, plain.trials, list(plain.space.dimensions)) == (6, 2, ["train.learning_rate"])
    (said,) = _unequal_tuning(own.config, [own, plain])
    assert said.startswith("Plain LoRA was tuned with 2 settings, the method with 6")


@pytest.mark.parametrize(("text", "sections", "said"), [
    ("train.learning_rate: {choice: [1e-3, 1e-4]}", {"adapter": {"method": "none"}}, None),
    ("adapter.rate: {choice: [0.1, 0.2]}", {}, "Plain LoRA is not tuned: the space varies nothing that it has."),
    ("train.learning_rate: {choice: [1e-3, 1e-4]}", {"search": {"plain": False}}, "no tuning of its own"),
])
def test_where_plain_lora_is_not_tuned_it_is_said(
    tmp_path: Path, text: str, sections: dict[str, dict[str, object]], said: str | None
) -> None:
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    search = {"space": str(tmp_path / "s.yaml"), "trials": 2, **sections.get("search", {})}
    config = build_config({**sections, "search": search})
    arms = load_arms(config)
    assert [arm.name for arm in arms] == ["method"]
    warnings = _unequal_tuning(config, arms)
    assert warnings == [] if said is None else said in warnings[0]
