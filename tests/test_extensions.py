"""What another installed package adds by entry points: a mask pattern and a task, through to an export."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import loradrop
import numpy as np
import pytest
import torch

from pipeline.adapters.masks import kept_entries
from pipeline.adapters.members import MaskKey, Member
from pipeline.config import AdapterConfig, RunConfig, dump_config, extensions, load_config
from pipeline.config.method import Site, patterns_at
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError, UserError
from pipeline.export.targets import target_of
from pipeline.model.kind import local_kind
from pipeline.prediction.task import open_task, training_examples
from pipeline.run_folder.paths import RunPaths
from pipeline.stages import evaluate, export, report, train
from pipeline.support.sites import legal_sites
from pipeline.support.tiny import tiny_llama

CODE = '''
import numpy as np
from dataclasses import replace
from pipeline.adapters.members import Member
from pipeline.export.order import Exported
from pipeline.export.targets import TARGETS
from pipeline.prediction.task import CausalLMTask

def pairs(uniforms, rate):
    """Neighbours are dropped together."""
    return np.repeat(uniforms[::2] >= rate, 2)[: len(uniforms)]

def counted(uniforms, rate):
    return (uniforms >= rate).astype(float)

LINKED = replace(TARGETS["adapter"], name="linked", plan=lambda order: [Exported("linked", Member(0))])

class Shouting(CausalLMTask):
    """Reads prompts in capitals."""
    def examples(self, rows):
        return super().examples([replace(row, prompt=row.prompt.upper()) for row in rows])
    def supervision(self, examples):
        return "shouted"
'''
POINTS = """[loradrop.mask_patterns]
pairs = added_by_a_test:pairs

[loradrop.export_targets]
linked = added_by_a_test:LINKED
wrong = added_by_a_test:pairs

[loradrop.tasks]
shouting = added_by_a_test:Shouting
"""
BROKEN = """[loradrop.mask_patterns]
counted = added_by_a_test:counted
absent = added_by_a_test:nothing_of_that_name
"""


def install(folder: Path, name: str, points: str) -> None:
    """What pip leaves of a distribution."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(points)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that adds them, on the path."""
    folder = tmp_path / "site-packages"
    install(folder, "their-masks", POINTS)
    (folder / "added_by_a_test.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(folder))
    extensions.load.cache_clear()
    yield
    extensions.load.cache_clear()
    sys.modules.pop("added_by_a_test", None)


def test_a_pattern_is_a_function_of_the_same_numbers(installed: None) -> None:
    site = Site(position="lora_A", pattern="pairs", rate=0.3)
    assert site.masks_weights and site.compensation == "inverse" and "pairs" in patterns_at("lora_B")
    keeps = kept_entries(site, np.random.default_rng(0).random(20_001))
    assert (keeps[:-1:2] == keeps[1::2]).all() and abs(1 - keeps.mean() - 0.3) < 0.02
    found = loradrop.attach(tiny_llama(), AdapterConfig(method=(site,), rank=4), seed=3)
    plan = found.adapters.plan([Member(0, 0), Member(0)], 1, MaskKey(3, 5))
    for masks in plan.masks.values():
        drawn, plain = masks["lora_A"]
        assert torch.equal(drawn[0::2], drawn[1::2])
        assert {round(one, 5) for one in drawn.tolist()} == {0.0, round(1 / 0.7, 5)}
        assert (plain == 1).all()
    assert {one.pattern for one in legal_sites() if one.position == "lora_rank"} >= {"column", "element", "pairs"}


def test_what_is_not_there_names_what_is(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "broken", "their-broken", BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    with pytest.raises(UserError, match=r"lora_A has the patterns column, not rows; installed packages add absent "
                                        r"\(their-broken\), counted \(their-broken\), pairs \(their-masks\); "):
        Site(position="lora_A", pattern="rows", rate=0.3)
    with pytest.raises(UserError, match="attention_logits has the patterns column, element, span, not pairs"):
        Site(position="attention_logits", pattern="pairs", rate=0.3)
    with pytest.raises(UserError, match=r"'absent': cannot be loaded from added_by_a_test:.*package their-broken"):
        Site(position="lora_A", pattern="absent", rate=0.3)
    with pytest.raises(ConfigError, match=r"must give a bool array \(8,\) for as many uniforms, not float64 \(8,\)"):
        kept_entries(Site(position="lora_A", pattern="counted", rate=0.3), np.zeros(8))
    for kind, said in (("causal:whispering", "there is no task 'whispering'; installed packages add shouting"),
                       ("shouting", "must be auto, causal, classifier, or causal:TASK")):
        with pytest.raises(ConfigError, match=rf"model\.kind = '{kind}': {said}"):
            load_config(None, [f"model.kind={kind}"])
    with pytest.raises(ConfigError, match="no form 'lniked'; the forms are adapter, draws, .*add linked .their-masks."):
        load_config(None, ["export.forms=[adapter, lniked]"])
    with pytest.raises(ConfigError, match="export.forms = 'wrong': must be a Target, not function"):
        target_of("wrong")
    install(tmp_path / "other", "their-masks-again", POINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="is offered by their-masks-again and their-masks. Install one"):
        extensions.load(extensions.TASKS, "shouting")


def test_without_packages_nothing_is_added() -> None:
    with pytest.raises(UserError, match=r"not pairs; installed packages add none; a package adds one by an entry point"
                                        r" of the group loradrop\.mask_patterns \(docs/python\.md\)"):
        Site(position="lora_A", pattern="pairs", rate=0.3)
    with pytest.raises(ConfigError, match=r"is not there: installed packages add none"):
        extensions.load(extensions.TASKS, "shouting")


def configured(tiny_settings: list[str]) -> RunConfig:
    return load_config(None, [
        *tiny_settings, "model.kind=causal:shouting",
        "adapter.method=[{position: lora_A, pattern: pairs, rate: 0.4}, {position: lora_B, pattern: pairs, rate: 0.3}]",
    ])


def test_a_task_takes_the_place_of_that_of_the_kind(installed: None, tiny_settings: list[str]) -> None:
    config = configured(tiny_settings)
    assert local_kind(config.model) == "causal" and load_config(None, []).model.kind == "auto"
    splits = load_splits(config.data)
    task = open_task(config, splits, torch.device("cpu"))
    assert type(task).__name__ == "Shouting" and task.supervision([]) == "shouted"
    plain = open_task(config.model_copy(update={"model": config.model.model_copy(update={"kind": "causal"})}), splits,
                      torch.device("cpu"))
    shouted = training_examples(task, splits.train[:1], config.data)
    assert shouted[0].input_ids != plain.examples(splits.train[:1])[0].input_ids


@pytest.mark.slow
def test_a_run_is_trained_evaluated_and_exported_with_both(
    installed: None, tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in (evaluate, export):  # the process group serves the next test
        monkeypatch.setattr(stage, "leave_world", lambda: None)
    settings = [*tiny_settings, "data.calibration_rows=80", "export.forms=[adapter, draws, linked]", "export.draws=1"]
    config, paths = configured(settings), RunPaths(tmp_path / "run")
    paths.root.mkdir()
    paths.config.write_text(dump_config(config))
    train.train_run(config, paths.root)
    evaluate.evaluate_run(paths.root)
    report.write_report(paths.root)
    export.export_run(paths.root)  # which proves that stock PEFT says what the run says, mask draws included
    manifest = json.loads((paths.export / "manifest.json").read_text())
    assert {entry["form"] for entry in manifest["exports"]} == {"adapter", "draws", "linked"}
    assert '"their-masks": "1.2"' in paths.environment.read_text()
