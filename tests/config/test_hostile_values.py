"""What settings may not be made of: refused in a sentence that names the key, or file and line, and the way out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.config import CompareConfig, RunConfig, build_config, dump_config, load_config, plain_yaml
from pipeline.config.deepspeed import read_ds_config
from pipeline.config.load import find_recipe
from pipeline.config.plain_yaml import DEEPEST, MOST_BYTES, parse_yaml
from pipeline.config.section import Section
from pipeline.config.space import find_space, read_space
from pipeline.errors import ConfigError, UserError
from pipeline.run_folder.paths import load_saved

LONG = "9" * 5000
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (f"train.seed={LONG}", "train.seed .*no number that can be read"),
        (f"label=-0x{LONG}", "label .*no number that can be read"),
        ("train.seed=0x_", "train.seed .*no number that can be read"),
        (f"train.seed={'1:' * 60}1", "train.seed .*no number that can be read"),
        (f"train.seed={'9' * 40}", "train.seed .*does not fit 64 bits"),
        ("train.seed=9223372036854775808", "train.seed .*does not fit 64 bits"),
        ("train.max_steps=2020-01-01", "train.max_steps = '2020-01-01': input should be a valid integer"),
        ("train.seed=!!int abc", "train.seed .*YAML tag"),
        ("label=!!python/object/apply:os.system [true]", "label .*YAML tag"),
        ("label=&x y", "label .*anchor or alias 'x'"),
        ("label=*x", "label .*anchor or alias 'x'"),
        (f"label={'[' * 50}", f"label .*nested more than {DEEPEST} deep"),
        (f"compare.vary={'{a: ' * 40}{'}' * 40}", f"nested more than {DEEPEST} deep"),
        (f"train{'.a' * 100}=1", "key.path=value"),
        ('label="\\ud83d"', r"label .*has the character '\\ud83d' in a text"),
        ("label='\udcff'", "label .*is not a valid YAML value"),
        ('data.path="rows\\0.jsonl"', r"data.path .*has the character '\\x00' in a text"),
        ('label="\\U7fffffff"', "label .*is not a valid YAML value"),
        ('label="\\e[31mred"', "label .*one line without control characters"),
        ("label=\x1b[31mred", "label .*is not a valid YAML value"),
        ("la\x1bbel=1", r"override = 'la\\x1bbel=1'.*key.path=value"),
        ("train={seed: 1, seed: 2}", "names 'train.seed' twice|names 'seed' twice"),
        ("train={? [a] : 3}", "Keys are words"),
        ("data.path=", "data.path = ''"),
        ("train.deepspeed=", "train.deepspeed = ''"),
    ],
)
def test_values_that_are_none(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}") as caught:
        load_config(None, [override])
    assert len(str(caught.value)) < 600


FLOATS = """adapter.alpha adapter.adalora.orthogonality adapter.adalora.warmup adapter.adalora.final
adapter.consistency.weight train.epochs train.learning_rate train.lora_plus_ratio train.weight_decay
train.label_smoothing train.max_gradient_norm train.warmup_fraction train.spike.factor launch.grace_seconds""".split()


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
def test_no_float_is_infinite_or_nan(key: str, value: str) -> None:
    with pytest.raises(UserError, match=key):
        load_config(None, ["adapter.kind=adalora", "adapter.method=hiddenkey", f"{key}={value}"])


def test_every_section_refuses_what_is_not_finite() -> None:
    """One rule, which no section turns off: also inside lists, mappings and unions."""

    def sections(of: type[Section]) -> list[type[Section]]:
        return [of, *(below for one in of.__subclasses__() for below in sections(one))]

    assert all(one.model_config.get("allow_inf_nan") is False for one in sections(Section))
    for override in ("compare.learning_rates=[.inf]", "adapter.alpha_pattern={q_proj: .nan}",
                     "adapter.method=[{position: lora_A, rate: 0.1, layers: [.nan, 1.0]}]"):
        with pytest.raises(UserError, match="finite"):
            load_config(None, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank_pattern={q_proj: -3}", "adapter.rank_pattern.q_proj = -3"),
        ("adapter.rank_pattern={'q[0-9]': 0}", r"adapter.rank_pattern.q\[0-9\] = 0"),
        ("adapter.rank_pattern={'(': 3}", "adapter.rank_pattern.*regular expression"),
        ("adapter.alpha_pattern={q_proj: -1.0}", "adapter.alpha_pattern.q_proj = -1.0"),
        ("adapter.alpha_pattern={'': 1.0}", "adapter.alpha_pattern"),
        ("adapter.target_modules=[]", "adapter.target_modules = .*name the modules"),
        ("adapter.target_modules=", "adapter.target_modules = '': must name the modules"),
        ("adapter.target_modules=['']", "adapter.target_modules = .*name the modules"),
        ("adapter.target_modules='('", r"adapter.target_modules = '\(': must be a regular expression"),
        ("adapter.target_modules='a{99999999999999999999}'", "must be a regular expression"),
        (f"adapter.target_modules='{'(' * 3000}{')' * 3000}'", "must be a regular expression"),
        ("train.epochs=1e300", "train.epochs"),
        (f"compare.vary={{adapter.rank: {list(range(1, 200))}, train.draws: {list(range(2, 200, 2))}}}", "trainings"),
        ("compare.vary={adapter.rank: []}", "compare asks for 0 trainings"),
    ],
)
def test_what_could_train_nothing_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_config(None, [override])


def test_what_is_legitimate_passes() -> None:
    settings = [
        "label=2020-01-01", "model.revision=2024-01-31", f"train.seed={2**63 - 1}", "train.learning_rate=1e-4",
        "adapter.target_modules='.*[qv]_proj'", "adapter.rank_pattern={'layers\\.[01]\\..*': 4}",
        "adapter.alpha_pattern={q_proj: 8}", "compare.vary={adapter.rank: [4, 8], adapter.target_modules: [[q_proj]]}",
        'data.template={prompt: "{a}\\x1e\\t\\n😀", choices: [" 0", " 010"]}',
    ]
    config = load_config(None, settings)
    assert (config.label, config.model.revision, config.train.seed) == ("2020-01-01", "2024-01-31", 2**63 - 1)
    assert config.data.template is not None and config.data.template.prompt == "{a}\x1e\t\n😀"
    assert config.compare.vary["adapter.target_modules"] == (("q_proj",),)
    assert build_config(parse_yaml(dump_config(config))) == config


@pytest.mark.parametrize("seed", [-1, 2**63])
@pytest.mark.parametrize("section", ["train", "data", "search", "ensemble"])
def test_seeds_have_63_bits_however_they_come(section: str, seed: int) -> None:
    with pytest.raises(UserError, match=rf"{section}\.seed"):
        build_config({section: {"seed": seed}})
    with pytest.raises(UserError, match=r"compare\.seeds"):
        build_config({"compare": {"seeds": [seed]}})


def test_lists_are_tuples_in_every_section() -> None:
    assert CompareConfig.model_validate({"methods": ["none"], "vary": {"adapter.rank": [1]}}).vary == {
        "adapter.rank": (1,)
    }
    tree = {"adapter": {"method": {"sites": [{"position": "ffn_hidden", "rate": 0.1, "layers": [0.5, 1.0]}]}}}
    (site,) = RunConfig.model_validate(tree).adapter.resolved_method().sites
    assert site.layers == (0.5, 1.0)


FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("bomb", lambda path: path.write_text(BOMB), ":1: has the YAML anchor or alias 'a'. Write the value out"),
    ("twice", lambda path: path.write_text("train:\n  seed: 1\n  draws: 4\n  seed: 2\n"), ":4: names 'train.seed'"),
    ("sections", lambda path: path.write_text("train: {seed: 1}\nmodel: {}\ntrain: {draws: 2}\n"), ":3: names 'train'"),
    ("digits", lambda path: path.write_text(f"train:\n  seed: {LONG}\n"), ":2: has '999"),
    ("tag", lambda path: path.write_text("train:\n  seed: !!int abc\n"), ":2: has the YAML tag"),
    ("deep", lambda path: path.write_text(f"label: {'[' * 50}"), f":1: is nested more than {DEEPEST} deep"),
    ("wide", lambda path: path.write_text(f"label: [{'a,' * 200}]"), "holds more than 100 values"),
    ("large", lambda path: path.write_text("#" * (MOST_BYTES + 1)), "has more than 262,144 bytes"),
    ("huge", lambda path: (path.touch(), os.truncate(path, 2**40)), "has more than 262,144 bytes"),
    ("nul", lambda path: path.write_bytes(b"label: a\0b\n"), "is not valid YAML"),
    ("utf-8", lambda path: path.write_bytes(b"label: \xff\n"), "cannot be read"),
    ("pipe", os.mkfifo, "is no regular file"),
    ("folder", Path.mkdir, "is no regular file"),
    ("device", lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    ("circle", lambda path: path.symlink_to(path.name), "neither a file nor"),
]


@pytest.mark.parametrize(("name", "make", "said"), FILES, ids=[name for name, _, _ in FILES])
def test_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], object], said: str
) -> None:
    monkeypatch.setattr(plain_yaml, "MOST_VALUES", 100)  # 10,000 take a second
    path = tmp_path / "settings.yaml"
    make(path)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "settings.yaml" in str(caught.value) and said in str(caught.value)
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        read_space(find_space(str(path)))


@pytest.mark.parametrize("text", ["export: 5", "export: [members]", "export: members"])
def test_a_run_folder_with_a_section_of_another_kind(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="export"):
        load_saved(tmp_path / "config.yaml")


@pytest.mark.parametrize("source", ["", "x" * 5000, "a\0b", "no-such"])
def test_names_that_are_none(source: str) -> None:
    with pytest.raises(ConfigError, match="--config"):
        find_recipe(source)
    with pytest.raises(ConfigError, match=r"search\.space"):
        find_space(source)


def test_the_first_of_many_faults_are_shown() -> None:
    with pytest.raises(UserError, match="has 4000 faults; these are the first") as caught:
        build_config({"train": {f"max_stepz{i}": 1 for i in range(4000)}})
    assert str(caught.value).count("\n") == 10


def test_equal_lists_are_written_out_in_each_place() -> None:
    """An alias in a file of ours would be refused when it is read."""
    config = RunConfig.model_validate({"compare": {"seeds": [1], "vary": {"train.draws": [1], "adapter.rank": [1]}}})
    text = dump_config(config)
    assert "&" not in text and build_config(yaml.safe_load(text)) == config


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "must be an object"), ("{", "not a JSON file"), ("[" * 100_000, "nested more than"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than"), ('{"zero_optimization": 5}', "must be an object"),
        ('{"zero_optimization": {"stage": "two"}}', "must be 0, 1, 2 or 3"), ('{"bf16": []}', "must be an object"),
        ('{"zero_optimization": {"stage": true}}', "must be 0, 1, 2 or 3"), (f'{{"a": {LONG}}}', "not a JSON file"),
    ],
)
def test_deepspeed_files_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_ds_config(str(path))
    assert read_ds_config("zero2")["zero_optimization"]["stage"] == 2
