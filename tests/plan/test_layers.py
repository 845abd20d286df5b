"""Defaults, recipe, file and overrides on top of each other, and where each value says that it is from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.config import RunConfig, dump_config, load_config
from pipeline.config.load import read_yaml, recipe_files, with_values
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError
from pipeline.plan.layers import Layers, annotated, leaves, summary
from pipeline.plan.request import Request
from pipeline.plan.resolve import (
    OF_THE_DATA,
    OWN_DATA,
    new_layers,
    resolve_epochs,
    resolve_new,
    saved_layers,
)
from pipeline.run_folder.comparison import plan_trainings


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"text {i}", "choices": [" a", " b"], "label": i % 2}) for i in range(960)]
    path.write_text("\n".join(lines))
    return path


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_stands_on_what_is_taken_without_one(tmp_path: Path, rows: Path) -> None:
    mine = write(tmp_path / "mine.yaml", f"data: {{path: {rows}}}\n")
    for stage in ("train", "compare"):
        recipe = "compare" if stage == "compare" else "default"
        given = resolve_new(Request(overrides=(f"data.path={rows}",)), stage, recipe)
        assert resolve_new(Request(mine), stage, recipe) == given and given.adapter.alpha == 32.0
    nothing = write(tmp_path / "nothing.yaml", "adapter: {rank: 4}\n")
    assert resolve_new(Request(nothing), "train") == load_config("default", ["adapter.rank=4"])


@pytest.mark.parametrize("recipe", ["default", "compare", "encoder"])
def test_what_is_of_the_demos_rows_is_not_taken_with_others(recipe: str, rows: Path) -> None:
    demo, usual = read_yaml(recipe_files()[recipe]), dict(leaves(RunConfig().model_dump(mode="json")))
    own = new_layers(Request(recipe if recipe == "encoder" else None, overrides=(f"data.path={rows}",)), "x", recipe)
    values = dict(leaves(own.config.model_dump(mode="json")))
    assert values.pop("train.epochs") == 3.0 and values.pop("data.path") == str(rows)
    of_the_demo = [key for key, _ in leaves(demo) if key in OF_THE_DATA or key.partition(".")[0] in OF_THE_DATA]
    assert {"train.max_steps", "data.max_tokens"} < set(of_the_demo)
    assert not [key for key in of_the_demo if key in values and values[key] != usual[key]]
    kept = {key: value for key, value in leaves(demo) if key not in (*of_the_demo, "compare.methods")}
    assert len(kept) > 8 and {key: values[key] for key in kept} == kept


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ([], (3.0, 60)), (["train.max_steps=9"], (None, 9)), (["train.epochs=1"], (1.0, 60)),
        (["train.epochs=1", "train.epochs=null", "train.max_steps=9"], (None, 9)),
    ],
)
def test_own_data_have_epochs_unless_a_length_is_given(
    tmp_path: Path, rows: Path, given: list[str], length: tuple[float | None, int]
) -> None:
    words = (f"data.path={rows}", *given)
    train = resolve_new(Request(overrides=words), "train").train
    assert (train.epochs, train.max_steps) == length
    tree = {"train": dict(word.removeprefix("train.").split("=") for word in given)}
    mine = write(tmp_path / "mine.yaml", f"train: {{{', '.join(f'{k}: {v}' for k, v in tree['train'].items())}}}\n")
    train = resolve_new(Request(mine, overrides=words[:1]), "train").train
    assert (train.epochs, train.max_steps) == length
    quick = resolve_new(Request(overrides=words[:1], quick=True), "train")
    assert (quick.train.epochs, quick.train.max_steps, quick.data.train_rows) == (None, 4, 48)


def test_a_recipe_is_whole_and_the_papers_keep_their_lengths(rows: Path) -> None:
    config = resolve_new(Request("papers/roberta-large-rte", overrides=(f"data.path={rows}",)), "train")
    assert config == load_config("papers/roberta-large-rte", [f"data.path={rows}"]) and config.train.epochs == 30
    assert resolve_new(Request(str(recipe_files()["encoder"])), "train") == load_config("encoder")


def test_every_value_says_where_it_is_from(tmp_path: Path, rows: Path) -> None:
    mine = write(tmp_path / "mine.yaml", f"data: {{path: {rows}}}\nadapter: {{rank: 4, rates: {{lora_A: 0.1}}}}\n")
    words = ("adapter.rates.lora_B=0.2", "ensemble.size=2", "train.draws=2")
    layers = new_layers(Request(mine, overrides=words, quick=True), "train")
    assert {key: layers.sources.get(key) for key in (
        "model.revision", "adapter.alpha", "data.path", "adapter.rank", "adapter.rates.lora_A", "adapter.rates.lora_B",
        "ensemble.size", "train.draws", "train.max_steps", "train.epochs", "label",
    )} == {
        "model.revision": None, "adapter.alpha": "recipe default", "data.path": mine, "adapter.rank": mine,
        "adapter.rates.lora_A": mine, "adapter.rates.lora_B": "command line", "ensemble.size": "command line",
        "train.draws": "command line", "train.max_steps": "--quick", "train.epochs": "--quick", "label": "--quick",
    }  # fmt: skip
    assert set(layers.sources) == {key for key, _ in leaves(layers.tree)}
    whole = layers.with_overrides(["adapter.rates={ffn_hidden: 0.3}"])
    assert [key for key in whole.sources if key.startswith("adapter.rates")] == ["adapter.rates.ffn_hidden"]


def test_the_printed_configuration_is_the_configuration(tmp_path: Path, rows: Path) -> None:
    template = "data.template={prompt: \"{prompt}\\n# no comment, and so long that it takes several lines of YAML " + (
        "x " * 40) + "\", choices: [' a', ' b'], label: label}"
    layers = new_layers(Request(overrides=(f"data.path={rows}", template, "adapter.rank=4")), "train")
    config = with_values(resolve_epochs(layers.config), {"train.micro_batch": 4})
    text = annotated(layers, config)
    assert yaml.safe_load(text) == config.model_dump(mode="json")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("template:")
    assert lines[at + 1] == "# command line" and lines[at + 2].startswith("prompt: ")
    assert {"rank: 4 # command line", "alpha: 32.0 # recipe default", "micro_batch: 4 # derived", "seed: 0",
            f"path: {rows} # command line", "max_steps: 108 # derived"} <= set(lines)
    said = "\n".join(summary(layers, config))
    assert "recipe default: adapter.alpha=32.0\n" in said and "derived: train.max_steps=108 train.micro_batch=4" in said
    assert "model.quantization" not in said and len(said.splitlines()) < 10  # what is as it is without them is left out


def test_a_command_says_where_its_settings_are_from(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.processes.run_world_stage", lambda *_: 0)
    settings = [word for word in tiny_settings if not word.startswith("train.max_steps")]
    assert main(["train", "--run-dir", str(tmp_path / "a"), "train.epochs=1", *settings]) == 0
    said = capsys.readouterr().err
    assert "derived: " in said and "train.max_steps=8" in said and "own data" not in said
    assert main(["train", "--run-dir", str(tmp_path / "b"), *settings, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err.count("own data: 3 epochs; train.epochs or train.max_steps says otherwise") == 1
    assert f"epochs: 3.0{' ' * 33}  # {OWN_DATA}" in said.out and "max_steps: 60" not in said.out
    assert main(["compare", "--run-dir", str(tmp_path / "c"), *settings, "--dry-run"]) == 0
    assert "seed 0: 3 epochs" in capsys.readouterr().out


def test_a_later_stage_says_that_its_settings_are_the_runs(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("default")))
    layers = saved_layers(Request(run_dir=str(tmp_path), overrides=("launch.processes=1",)), "evaluate")
    assert {layers.sources[key] for key in ("adapter.rank", "launch.processes")} == {"run folder", "command line"}


def test_a_long_training_in_epochs_validates_twenty_times(rows: Path) -> None:
    def steps(*words: str) -> tuple[int, int]:
        train = resolve_epochs(resolve_new(Request(overrides=(f"data.path={rows}", *words)), "train")).train
        return train.max_steps, train.validate_every_steps

    assert steps() == (108, 20)
    assert steps("train.epochs=100") == (3600, 180) and steps("train.epochs=100.1") == (3604, 181)
    assert steps("train.epochs=100", "train.validate_every_steps=20") == (3600, 20)
    assert steps("train.max_steps=1000") == (1000, 20)


def test_a_method_of_a_comparison_may_have_epochs_of_its_own(rows: Path) -> None:
    config = load_config(None, [
        f"data.path={rows}", "compare.learning_rates=[1e-3]", "train.max_steps=9", "train.global_batch=16",
        "compare.methods=[none, {name: long, adapter: {}, train: {epochs: 2}},"
        " {name: small, adapter: {}, train: {epochs: 1.5, global_batch: 8}}]",
    ])
    assert [own.train.epochs for _, own in plan_trainings(config)] == [None, 2, 1.5], "as a dry run tells them"
    trained = len(load_splits(config.data).train)
    steps = [own.train.max_steps for _, own in plan_trainings(resolve_epochs(config))]
    assert steps == [9, -(-2 * trained // 16), -(-3 * trained // 16)]
    shared = with_values(config, {"train.epochs": 4})
    longer = [own.train.max_steps for _, own in plan_trainings(resolve_epochs(shared))]
    assert longer == [-(-4 * trained // 16), *steps[1:]]
    for train in ("{epochs: 0}", "{epochs: two}", "{epochs: 1, max_steps: 2}", "{epochs: 1, global_batch: 0}"):
        wrong = load_config(None, [
            f"data.path={rows}", f"compare.methods=[{{name: x, adapter: {{}}, train: {train}}}]",
        ])
        with pytest.raises(ConfigError, match=r"compare\.methods: x"):
            plan_trainings(resolve_epochs(wrong))


def test_a_configuration_in_epochs_survives_being_written() -> None:
    config = load_config(None, ["train.epochs=2"])
    assert Layers().with_tree("x", yaml.safe_load(dump_config(config))).config == config
    assert with_values(config, {"train.seed": 3}).train.epochs == 2
