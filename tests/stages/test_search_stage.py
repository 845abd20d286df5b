"""The search stage, as far as it goes without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import build_config, load_config
from pipeline.config.load import with_values
from pipeline.errors import RunFolderError, UserError
from pipeline.files import write_json, write_text
from pipeline.run_folder.paths import Folders
from pipeline.stages import search
from pipeline.stages.run import chosen_configs


def test_a_search_goes_on_with_more_trials_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run_stage", lambda *_: 0)
    folders, config = Folders(tmp_path / "run"), build_config({"search": {"trials": 2}})
    assert search.run_search(config, folders) == 0
    more = with_values(config, {"search.trials": 5, "search.concurrent": 1, "search.pack": "off"})
    assert search.run_search(more, folders) == 0
    assert load_config(folders.search / "config.yaml").search.trials == 5
    readout = with_values(more, {"ensemble.size": 3, "search.adapters": 1})
    assert search.run_search(readout, folders) == 0
    write_text(folders.search / "ledger.jsonl", "{}")
    other = with_values(more, {"adapter.rank": 2})
    assert search.run_search(other, folders) == 0, "no trial has taken a step"
    assert not (folders.search / "ledger.jsonl").exists() and search.run_search(more, folders) == 0
    write_text(folders.search / "trials" / "trial_000" / "metrics.jsonl", "")
    for key, value in (("search.max_steps", 7), ("search.seed", 7), ("adapter.rank", 2), ("search.space", "rates")):
        with pytest.raises(RunFolderError, match="belongs to another configuration"):
            search.run_search(with_values(more, {key: value}), folders)


def test_plain_lora_is_trained_with_its_own_best_settings(tmp_path: Path) -> None:
    config = build_config({"adapter": {"method": "hiddenkey", "rank": 4, "consistency": {"weight": 0.3}}})
    own = {"best_config": {"train.learning_rate": 1e-3, "adapter.rank": 16, "adapter.rates.ffn_hidden": 0.2}}
    write_json(tmp_path / "search.json", {**own, "plain": {"best_config": {"train.learning_rate": 5e-3}}})
    chosen, plain = chosen_configs(config, tmp_path)
    assert (chosen.train.learning_rate, chosen.adapter.rank, chosen.adapter.rates.ffn_hidden) == (1e-3, 16, 0.2)
    assert (plain.train.learning_rate, plain.adapter.rank, plain.adapter.method) == (5e-3, 4, "none")
    write_json(tmp_path / "search.json", {**own, "plain": None})
    _, plain = chosen_configs(config, tmp_path)
    assert (plain.train.learning_rate, plain.adapter.rank) == (1e-3, 16)
    write_json(tmp_path / "search.json", {**own, "plain": {"best_config": {"adapter.rates.ffn_hidden": 0.2}}})
    with pytest.raises(RunFolderError, match=r"chooses adapter\.rates\.ffn_hidden, which no search varies"):
        chosen_configs(config, tmp_path)


def test_a_pack_can_be_switched_off_as_yaml_says_it() -> None:
    """`off` is a boolean in YAML 1.1."""
    for given, expected in (("off", "off"), ("auto", "auto"), ("3", 3)):
        assert load_config(None, [f"search.pack={given}"]).search.pack == expected
    with pytest.raises(UserError, match=r"search\.pack"):
        load_config(None, ["search.pack=on"])
    with pytest.raises(UserError, match=r"search\.pack"):
        load_config(None, ["search.pack=0"])
