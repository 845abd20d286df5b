"""What the command tells about itself: keys, schema, recipes, and the help of every stage."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT
from jsonschema import Draft202012Validator

from pipeline.cli import main, split_words
from pipeline.config.load import config_keys, read_yaml, recipe_files
from pipeline.config.names.reference import Key, all_keys, json_schema
from pipeline.stages.reference.help import SECTIONS, TEXTS
from pipeline.stages.table import OFFERED, STAGES

KEYS = {key.key: key for key in all_keys()}


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def test_every_key_is_told_with_its_meaning() -> None:
    assert list(KEYS) == list(config_keys())
    assert not [key for key in KEYS.values() if not key.meaning] and KEYS["compare.vary"].type.endswith("any value")


@pytest.mark.parametrize(
    ("key", "kind", "bounds", "default"),
    [
        ("train.epochs", "number or null", "> 0, ≤ 1,000,000", None),
        ("train.max_steps", "whole number", "≥ 1", 60),
        ("train.warmup_fraction", "number", "≥ 0, ≤ 1", 0.1),
        ("adapter.rates.lora_A", "number or null", "≥ 0, < 1", None),
        ("adapter.rates", "section", "", None),
        ("adapter.target_modules", "text or list of text", "", "all-linear"),
        ("adapter.rank_pattern", "mapping of names to whole number", "each ≥ 1", {}),
        ("model.quantization", "nf4 | int8 | none", "", "nf4"),
        ("model.path", "text", "not empty", "embedded:smollm2-135m-instruct"),
        ("data.splits", "mapping of train | validation | calibration | test to text or null", "", None),
        ("data.template", "section or null", "", None),
        ("compare.learning_rates", "list of number", "at least one, each > 0", [0.0005, 0.002]),
        ("search.pack", "auto | off or whole number", "≥ 1", "auto"),
    ],
)
def test_a_key_in_words(key: str, kind: str, bounds: str, default: object) -> None:
    found = KEYS[key]
    assert found == Key(key, found.meaning, kind, bounds, default)


def test_keys_are_found_by_beginning_by_part_and_by_another_tools_name(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "keys", "train.learning_rate")
    assert shown == "train.learning_rate = 0.0005\n    number, > 0. Peak learning rate.\n"
    told = [one["key"] for one in json.loads(printed(capsys, "keys", "smoothing", "--json"))]
    assert told == ["train.label_smoothing", "search.early_exit.smoothing"]
    assert [one["key"] for one in json.loads(printed(capsys, "keys", "lora_r", "--json"))] == ["adapter.rank"]
    assert all(len(line) <= 80 for line in printed(capsys, "keys").splitlines())
    assert main(["keys", "nothing"]) == 2 and main(["keys", "a", "b"]) == 2
    assert "is not a known key. See loradrop keys." in capsys.readouterr().err


def test_the_schema_knows_every_recipe_and_refuses_a_wrong_key(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "schema"))
    assert schema == json_schema()
    Draft202012Validator.check_schema(schema)
    editor = Draft202012Validator(schema)
    for path in recipe_files().values():
        editor.validate(read_yaml(path))
    faults = [fault.message for fault in editor.iter_errors({"adapter": {"lora_r": 8}, "train": {"epochs": 0}})]
    assert len(faults) == 2 and any("lora_r" in fault for fault in faults)
    assert schema["$defs"]["TrainConfig"]["properties"]["learning_rate"]["description"] == "Peak learning rate."


def test_recipes_are_told_in_a_sentence_each(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, "recipes", "--json"))
    assert list(told) == list(recipe_files())
    assert all(text.endswith(".") and text.count(". ") == 0 and len(text) < 130 for text in told.values())
    assert told["papers/roberta-large-rte"] == "HiddenKey (arXiv 2403.00812) on GLUE RTE, RoBERTa-large."
    assert all(len(line) <= 80 for line in printed(capsys, "recipes").splitlines())


@pytest.mark.parametrize("stage", ["", *(stage.name for stage in OFFERED)])
def test_help_fits_80_columns_and_ends_with_where_every_key_is(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = printed(capsys, *([stage] if stage else []), "--help")
    assert shown.rstrip().endswith("Every key, with its meaning, type, range and default: loradrop keys.")
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert ("--dry-run" in shown) == (not stage or STAGES[stage].settings != "own")
    assert ("--rows" in shown) == (stage in ("", "data"))


@pytest.mark.parametrize("stage", [stage.name for stage in OFFERED])
def test_every_stage_has_a_text_whose_sections_and_examples_are_true(stage: str) -> None:
    text = TEXTS[stage]
    assert set(text.sections) <= set(SECTIONS) and text.examples
    assert set(SECTIONS) == {key for key in KEYS if "." not in key} - {"label"}
    for example in text.examples:
        words = shlex.split(example.partition(">")[0])
        plain = [word for word in words if not word.startswith("--")]
        assert split_words([word for word in plain if "=" in word or word == stage])[0].name == stage
        assert {word.partition("=")[0] for word in plain if "=" in word} <= set(KEYS)


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_traceback() -> None:
    command = f"{shlex.quote(sys.executable)} -m pipeline.cli schema | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "{\n" and done.stderr == ""
