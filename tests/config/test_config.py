"""Configuration: every fault names the key, the value and the way out; what is saved is what was meant."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.config import AdapterConfig, RunConfig, TrainConfig, build_config, dump_config, load_config
from pipeline.config.load import config_keys, merge_trees, overridden_tree, with_values
from pipeline.config.method import LEGAL, PRESETS, Site
from pipeline.errors import ConfigError, ErrorList, UserError


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("adapter.rnak=3", ["adapter.rnak", "adapter.rank"]),
        ("trian.max_steps=3", ["trian", "Did you mean train?"]),
        ("adapter.rate=1.0", ["adapter.rate", "1.0", "less than 1"]),
        ("adapter.rate=-0.1", ["adapter.rate", "-0.1", "0"]),
        ("train.max_steps=many", ["train.max_steps", "'many'", "integer"]),
        ("train.max_steps=0", ["train.max_steps", "0"]),
        ("adapter.method=lora_dropuot", ["lora_dropuot", "lora_dropout"]),
        ("train.global_batch=12", ["train.global_batch = 12", "multiple", "train.micro_batch = 8"]),
        ("model.quantization=nf5", ["model.quantization", "nf5", "nf4"]),
        ("train.max_steps", ["key.path=value"]),
        ("compare.seeds=2", ["compare.seeds = 2", "a list, such as [a, b]"]),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("default", [override])
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.exit_code == 2


def test_new_values_leave_alone_what_they_are_given_in() -> None:
    """A mapping that a later key changes is a copy: `compare` and `run` give the same one for every training."""
    given = {"adapter.method": "hiddenkey", "adapter.consistency": {}, "adapter.consistency.weight": 0.1}
    assert with_values(build_config({}), given).adapter.resolved_method().consistency.weight == 0.1
    assert given["adapter.consistency"] == {}


def test_all_faults_are_shown_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["adapter.rnak=3", "train.max_steps=x", "ensemble.size=-1"])
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("name", ["default", "quick"])
def test_recipes_load_and_round_trip(name: str) -> None:
    config = load_config(name)
    import yaml

    again = build_config(yaml.safe_load(dump_config(config)))
    assert again == config and again.sha256() == config.sha256()


def test_overrides_reach_the_key_and_change_the_hash() -> None:
    config = load_config("default", ["train.learning_rate=1e-4", "adapter.target_modules=[q_proj,v_proj]"])
    assert config.train.learning_rate == 1e-4
    assert config.adapter.target_modules == ("q_proj", "v_proj")
    assert config.sha256() != load_config("default").sha256()


def test_merging_keeps_what_is_not_overridden() -> None:
    merged = merge_trees({"train": {"a": 1, "b": 2}, "label": "x"}, {"train": {"b": 3}})
    assert merged == {"train": {"a": 1, "b": 3}, "label": "x"}
    assert overridden_tree({"train": {"b": 2}}, ["train.b=5", "train.c.d=x"]) == {"train": {"b": 5, "c": {"d": "x"}}}


def test_the_keys_that_are_promised_exist() -> None:
    promised = """model.path data.path data.template adapter.rank adapter.alpha adapter.target_modules adapter.method
    adapter.rate train.max_steps train.global_batch train.micro_batch train.learning_rate train.seed train.draws
    ensemble.size""".split()
    assert set(promised) <= set(config_keys())


def test_one_rate_sets_both_sides_and_each_can_be_set_alone() -> None:
    method = load_config(None, ["adapter.rate=0.3"]).adapter.resolved_method()
    assert (method.rate_of("lora_A"), method.rate_of("lora_B")) == (0.3, 0.3)
    method = load_config(None, ["adapter.rate=0.3", "adapter.rates.lora_B=0.0"]).adapter.resolved_method()
    assert (method.rate_of("lora_A"), method.rate_of("lora_B")) == (0.3, 0.0)


def test_the_rate_of_one_site_of_a_sum() -> None:
    settings = ["adapter.method=lora_dropout+hiddenkey", "adapter.rates={lora_A: 0.2, ffn_hidden: 0.0}"]
    method = load_config(None, settings).adapter.resolved_method()
    assert {site.position: site.rate for site in method.sites} == {
        "lora_A": 0.2, "lora_B": 0.5, "attention_logits": 0.1, "ffn_hidden": 0.0,
    }
    with pytest.raises(ConfigError, match=r"adapter\.rates\.lora_A needs a method with a site at lora_A; .* has none"):
        load_config(None, ["adapter.method=none", "adapter.rates.lora_A=0.2"])
    with pytest.raises(ConfigError, match=r"adapter\.rates\.lora_C.*Did you mean adapter\.rates\.lora_"):
        load_config(None, ["adapter.rates.lora_C=0.2"])


def test_droplora_drops_per_token_and_rank_dropout_per_draw() -> None:
    sites = {name: load_config(None, [f"adapter.method={name}", "adapter.rate=0.3"]).adapter.resolved_method().sites
             for name in ("droplora", "rank_dropout")}  # fmt: skip
    assert sites["droplora"] == (Site(position="lora_rank", pattern="element", rate=0.3),)
    assert sites["rank_dropout"] == (Site(position="lora_rank", pattern="column", rate=0.3),)
    assert [sites[name][0].masks_weights for name in sites] == [False, True]
    listed = load_config(None, ["adapter.method=[{position: lora_rank, rate: 0.3}]"]).adapter.resolved_method()
    assert listed.sites == sites["rank_dropout"]  # the position's own default


SUMS = ("lora_dropout+hiddenkey", "dropkey+hiddencut")


@pytest.mark.parametrize("method", [*(p for p in PRESETS if p != "none"), *SUMS])
def test_rescale_is_followed_or_refused(method: str) -> None:
    """By the masks on the LoRA matrices; the other sites of a sum keep what their paper has."""
    default = load_config(None, [f"adapter.method={method}"]).adapter.resolved_method().sites
    if not any(site.position in ("lora_A", "lora_B", "lora_rank") for site in default):
        with pytest.raises(ConfigError, match=rf"adapter\.rescale = 'none'.*{re.escape(method)}.*\.rescale=inverse"):
            load_config(None, [f"adapter.method={method}", "adapter.rescale=none"])
        return
    sites = load_config(None, [f"adapter.method={method}", "adapter.rescale=none"]).adapter.resolved_method().sites
    for site, before in zip(sites, default, strict=True):
        follows = site.position in ("lora_A", "lora_B", "lora_rank")
        assert site == (before.model_copy(update={"compensation": "none"}) if follows else before)


def test_rescale_says_nothing_about_a_list_of_sites_and_nothing_where_nothing_is_dropped() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.rescale = 'none' goes with a preset; set the compensation"):
        load_config(None, ["adapter.method=[{position: lora_A, rate: 0.3}]", "adapter.rescale=none"])
    assert not load_config(None, ["adapter.method=none", "adapter.rescale=none"]).adapter.resolved_method().sites


def test_a_rate_for_a_method_with_several_rates_names_its_sites() -> None:
    with pytest.raises(ConfigError, match="attention_logits.*ffn_hidden"):
        load_config(None, ["adapter.method=hiddenkey", "adapter.rate=0.2"])


def test_every_preset_resolves_to_legal_sites_and_sums_add_up() -> None:
    for preset in PRESETS:
        load_config(None, [f"adapter.method={preset}"]).adapter.resolved_method()
    both = load_config(None, ["adapter.method=lora_dropout+hiddenkey"]).adapter.resolved_method()
    assert [site.position for site in both.sites] == ["lora_A", "lora_B", "attention_logits", "ffn_hidden"]
    assert both.consistency.kind == "kl"


@pytest.mark.parametrize("position", sorted(LEGAL))
def test_illegal_cells_of_the_grammar_are_refused(position: str) -> None:
    patterns, compensations = LEGAL[position]
    for pattern in {"element", "column", "span"} - set(patterns):
        with pytest.raises(ValueError, match=position):
            Site.model_validate({"position": position, "rate": 0.1, "pattern": pattern})
    for compensation in {"inverse", "none", "normalized"} - set(compensations):
        with pytest.raises(ValueError, match=position):
            Site.model_validate({"position": position, "rate": 0.1, "compensation": compensation})


def test_a_broken_file_is_a_user_error(tmp_path: Path) -> None:
    for text in ("a: [", "- 1\n- 2\n"):
        path = tmp_path / "x.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"x\.yaml"):
            load_config(path)
    with pytest.raises(ConfigError, match="default"):
        load_config("no-such-recipe")


def test_numbers_without_a_dot_are_numbers_and_what_is_quoted_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("train: {learning_rate: 5e-4}\n")
    config = load_config(path, ["train.weight_decay=1e-2", 'data.template={prompt: "{x}", choices: [" 0", "1e5"]}'])
    assert (config.train.learning_rate, config.train.weight_decay) == (5e-4, 1e-2)
    assert config.data.template is not None and config.data.template.choices == (" 0", "1e5")
    path.write_text(dump_config(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [("export.members=3", ["export.members = 3", "export.draws"]), ("export.forms=[members]", ["members", "draws"])],
)
def test_a_key_under_its_old_name_is_told_the_new_one(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert all(part in str(caught.value) for part in parts)


def test_only_averaged_probabilities_settle_a_row() -> None:
    assert build_config({"ensemble": {"adaptive": 0.05}}).ensemble.adaptive == 0.05
    with pytest.raises(ConfigError, match=r"ensemble\.adaptive = 0\.05: cannot be promised where .* is logit"):
        build_config({"ensemble": {"adaptive": 0.05, "average": "logit"}})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AdapterConfig(rank=0), "rank = 0: input should be greater than or equal to 1. Its meaning: R of"),
        (lambda: AdapterConfig(lora_r=8), "lora_r = 8: is not a known key. Here: adapter.rank."),
        (lambda: AdapterConfig(rnak=8), "Did you mean rank?"),
        (lambda: AdapterConfig(method="hidenkey"), "unknown method 'hidenkey'"),
        (lambda: AdapterConfig(method=({"position": "lora_A", "rate": 0.5},) * 2), "has two sites on the same layers"),
        (lambda: RunConfig(adapter={"rank": 0}), "adapter.rank = 0: input should be"),
        (lambda: TrainConfig(max_steps=0, epochs=0), "max_steps = 0: .*\nepochs = 0: "),
    ],
)
def test_sections_made_in_python_are_refused_in_our_words(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError if "epochs" not in said else ErrorList, match=said):
        make()
