"""A comparison as records and as a report: what is planned and chosen; its numbers against direct computation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.runs import write_predicted

from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig, build_config, dump_config, load_config
from pipeline.data.rows import Row
from pipeline.errors import RunFolderError, UserError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, write_json, write_text
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_new
from pipeline.report.compared import compared_systems
from pipeline.report.comparison import build_comparison, format_comparison
from pipeline.report.inputs import read_inputs
from pipeline.report.systems import base_system
from pipeline.run_folder.belongs import refuse_other
from pipeline.run_folder.comparison import (
    Training,
    choose,
    outcome,
    plan_trainings,
    read_comparison,
    shared_part,
    write_comparison,
)
from pipeline.run_folder.members import PredictedMember, read_members, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, read_predictions
from pipeline.stages.evaluate import listed_adapters, member_list
from pipeline.stages.report import write_report

VALUES = {"train.learning_rate": 0.001}
ROWS = {"validation": 40, "calibration": 60, "test": 80}


def training(method: str, rate: float, seed: int = 0, nll: float | None = 0.5, **changed: Any) -> Training:
    found = Training(f"{method}-lr{rate:g}-seed{seed}", method, {"train.learning_rate": rate}, seed, "ab", "done")
    found = replace(found, adapter_sha256=found.name, validation_nll=nll, validation_loss=nll)
    return replace(found, steps=4, seconds=8.0, step_seconds=2.0, **changed)


def test_every_method_is_planned_at_every_setting_with_its_own_rates() -> None:
    methods = "[none, lora_dropout+hiddenkey, {name: one side, adapter: {method: lora_dropout, rates: {lora_B: 0.0}}}]"
    config = load_config(None, [
        f"compare.methods={methods}", "compare.learning_rates=[1e-3, 2e-3]", "compare.vary={adapter.rank: [4, 16]}",
        "compare.seeds=[3, 5]", "adapter.rate=0.25", "label=small",
    ])
    planned = plan_trainings(config)
    assert len(planned) == len({one.name for one, _ in planned}) == 3 * 2 * 2 * 2
    one, own = planned[-1]
    assert one.name == "one_side-lr0.002-rank16-seed5" and one.config_sha256 == own.training_sha256()
    assert (own.train.learning_rate, own.adapter.rank, own.train.seed) == (0.002, 16, 5)
    assert own.label == "small: one side" and own.adapter.rate is None
    rates = {site.position: site.rate for site in own.adapter.resolved_method().sites}
    assert rates == {"lora_A": 0.5, "lora_B": 0.0}
    assert planned[8][1].adapter.resolved_method().consistency.kind == "kl"
    longer = load_config(None, ["compare.methods=[none]", "compare.learning_rates=[0.001]", "label=small",
                                "compare.vary={adapter.rank: [4]}", "compare.seeds=[3, 5]"])
    assert plan_trainings(longer)[0][1].train == planned[0][1].train  # a training knows nothing of the others


def test_a_method_may_be_longer_than_the_others_and_have_a_grid_of_its_own() -> None:
    config = load_config(None, [
        "compare.methods=[none, {name: longer, adapter: {method: none}, train: {max_steps: 24, warmup_fraction: 0.2}}, "
        "{name: hiddenkey, adapter: {method: hiddenkey}, vary: {adapter.consistency.weight: [0.1, 1.0, 10]}}]",
        "compare.learning_rates=[1e-3, 2e-3]", "train.max_steps=6",
    ])
    planned = plan_trainings(config)
    assert [one.name for one, _ in planned] == [
        "none-lr0.001", "none-lr0.002", "longer-lr0.001", "longer-lr0.002",
        *(f"hiddenkey-lr{rate}-lambda{weight}" for rate in (0.001, 0.002) for weight in (0.1, 1, 10)),
    ]
    lengths = [(own.train.max_steps, own.train.warmup_fraction) for _, own in planned]
    assert lengths == [(6, 0.1)] * 2 + [(24, 0.2)] * 2 + [(6, 0.1)] * 6
    weights = [own.adapter.resolved_method().consistency.weight for _, own in planned]
    assert weights[4:] == [0.1, 1.0, 10.0] * 2
    assert planned[-1][0].values == {"train.learning_rate": 0.002, "adapter.consistency.weight": 10}
    plain, longer = planned[0][1], planned[2][1]
    same = longer.train.model_copy(update={"max_steps": 6, "warmup_fraction": 0.1})
    assert longer.adapter == plain.adapter and same == plain.train
    by_epochs = load_config(None, [
        "compare.methods=[{name: x, adapter: {}, train: {max_steps: 9}}]", "train.epochs=2",
    ])
    lengths = [(own.train.epochs, own.train.max_steps) for _, own in plan_trainings(by_epochs)]
    assert lengths == [(None, 9)] * 2  # steps of its own instead of the shared epochs


def test_a_grid_of_its_own_goes_before_the_shared_one() -> None:
    config = load_config(None, [
        "compare.methods=[dropkey, {name: none, adapter: {method: none}, vary: {adapter.rank: [2], "
        "train.learning_rate: [3e-3, 4e-3]}}]", "compare.learning_rates=[1e-3]", "compare.vary={adapter.rank: [4, 16]}",
    ])
    planned = [(one.method, own.train.learning_rate, own.adapter.rank) for one, own in plan_trainings(config)]
    assert planned == [("dropkey", 1e-3, 4), ("dropkey", 1e-3, 16), ("none", 3e-3, 2), ("none", 4e-3, 2)]


def test_a_shared_rescale_is_that_of_the_methods_that_have_a_choice() -> None:
    config = load_config(None, [
        "compare.methods=[none, lora_dropout, droplora, hiddenkey]", "compare.learning_rates=[1e-3]",
        "adapter.rescale=none",
    ])  # fmt: skip
    rescale = [own.adapter.rescale for _, own in plan_trainings(config)]
    assert rescale == ["inverse", "none", "none", "inverse"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("compare.methods=[none, hiddenkye]", "unknown method 'hiddenkye'"),
        ("compare.methods=[none, none]", "'none': is listed twice"),
        ("compare.methods=[{name: x, adapter: {rat: 0.1}}]", "adapter.rat = 0.1: is not a known key"),
        ("compare.methods=[{name: x, adapter: {method: hiddenkey, rate: 0.1}}]", "set adapter.rates.POSITION"),
        ("compare.vary={adapter.rnk: [4]}", "Did you mean adapter.rank?"),
        ("compare.vary={data.seed: [4]}", "is not a key that can vary here"),
        ("compare.vary={train.learning_rate: [0.1]}", "is not a key that can vary here"),
        ("compare.vary={adapter.rank: [0]}", "greater than or equal to 1"),
        ("compare.vary={train.epochs: [1, 2]}", "train.epochs: cannot vary. Vary train.max_steps."),
        ("compare.learning_rates=[]", "compare.learning_rates"),
        ("compare.learning_rates=[0.0]", "compare.learning_rates"),
        ("compare.method=[none]", "Did you mean compare.methods?"),
        ("compare.methods=[{name: x, adapter: {}, train: {max_stepz: 3}}]", "max_stepz: is not a key that can"),
        ("compare.methods=[{name: x, adapter: {}, train: {seed: 3}}]", "train.seed: is not a key that can vary here"),
        ("compare.methods=[{name: x, adapter: {}, train: {max_steps: 0}}]", "train.max_steps"),
        ("compare.methods=[{name: x, adapter: {}, vary: {adapter.rnk: [4]}}]", "Did you mean adapter.rank?"),
        ("compare.methods=[{name: x, adapter: {}, vary: {adapter.rank: []}}]", "vary"),
        ("compare.methods=[{name: x, adapter: {rank: 4}, vary: {adapter.rank: [4]}}]", "is both given and varied"),
        ("compare.methods=[{name: x, adapter: {}, train: {draws: 2}, vary: {train.draws: [2]}}]", "given and varied"),
    ],
)
def test_faults_are_named_before_anything_starts(setting: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_trainings(load_config(None, [setting]))
    assert said in str(caught.value)


def test_validation_chooses_by_the_mean_over_seeds_among_complete_settings() -> None:
    found = choose([
        training("a", 1.0, 0, 0.2), training("a", 1.0, 1, 0.9),
        training("a", 2.0, 0, 0.5), training("a", 2.0, 1, 0.5),
        replace(training("a", 3.0, 0, None), state="failed"), training("a", 3.0, 1, 0.1),
        training("b", 1.0, 0, 0.7), replace(training("c", 1.0, 0, None), state="refused"),
    ])
    assert [(one.method, one.values["train.learning_rate"], one.seed) for one in found if one.chosen] == [
        ("a", 2.0, 0), ("a", 2.0, 1), ("b", 1.0, 0),
    ]


def test_the_outcome_is_that_of_the_adapter_that_was_published(tmp_path: Path) -> None:
    """Not the lowest of the run: AdaLoRA's validations before its ranks settle do not count."""
    paths = RunPaths(tmp_path / "trainings" / "a")
    write_text(paths.adapter / ADAPTER_WEIGHTS, "weights")
    write_json(paths.adapter / MANIFEST, {"step": 9, "validation_nll": 0.6})
    lines = [f'{{"kind": "train", "step": {s}, "seconds": {s}.0}}\n' for s in (1, 2, 9)]
    lines += [f'{{"kind": "validation", "step": {s}, "nll": {v}}}\n' for s, v in ((1, 0.5), (2, 0.4), (9, 0.6))]
    write_text(paths.metrics, "".join(lines))
    found = outcome(Training("a", "a", {}, 0, "ab", "failed", "once"), tmp_path)
    assert (found.state, found.error, found.validation_nll) == ("done", "", 0.6)
    assert (found.steps, found.seconds, found.step_seconds) == (3, 12.0, 2.0)
    write_text(paths.metrics, "")
    with pytest.raises(RunFolderError, match="has no training step"):
        outcome(Training("a", "a", {}, 0, "ab"), tmp_path)


def test_methods_and_readout_may_change_in_a_folder_but_not_what_is_trained_on(tmp_path: Path) -> None:
    config = load_config("compare")
    write_text(tmp_path / "config.yaml", dump_config(config))
    more = load_config("compare", ["compare.methods=[none, dropkey]", "ensemble.size=8"])
    refuse_other(tmp_path / "config.yaml", more, shared_part)
    for other in ("data.train_rows=32", "train.max_steps=5", "adapter.rank=4"):
        with pytest.raises(RunFolderError, match="another configuration"):
            refuse_other(tmp_path / "config.yaml", load_config("compare", [other]), shared_part)


def test_without_a_recipe_a_comparison_has_its_own() -> None:
    config = resolve_new(Request(), "compare", "compare")
    assert len(plan_trainings(config)) == 24 and "small budget" in config.label
    assert len(plan_trainings(resolve_new(Request(quick=True), "compare", "compare"))) == 6


def write_compared(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[PredictedMember], dict[str, np.ndarray], Any]:
    """A comparison's folder as training and evaluation leave it: two seeds, draws of what was chosen."""
    trainings = choose([
        *(training("none", rate, seed, 0.5 + rate) for rate in (0.1, 0.2) for seed in (0, 1)),
        *(training("dropkey", rate, seed, 0.5 - rate) for rate in (0.1, 0.2) for seed in (0, 1)),
        replace(training("hiddenkey", 0.1, 0, None), state="refused", error="no such thing"),
    ])
    trainings = [replace(one, step_seconds=3.0) if one.method == "dropkey" else one for one in trainings]
    paths, random = RunPaths(root), np.random.default_rng(0)
    config = build_config({"evaluate": {"bootstrap_samples": 120}, "ensemble": {"size": 2}})
    write_text(paths.config, dump_config(config))
    write_comparison(paths, config.label, trainings)
    members = [PredictedMember("base", "base", extra={"head": "untrained"})]
    for one in trainings:
        about = {"method": one.method, "values": one.values, "train_seed": one.seed}
        draws = [None, 0, 1] if one.chosen and one.method == "dropkey" else [None]
        if one.state == "done":
            members += [PredictedMember(one.name, "compared", "a", one.adapter_sha256, d, about) for d in draws]
    write_members(paths.predictions, members)
    splits, scores = {}, {}
    for split, rows in ROWS.items():
        labels = random.integers(0, 2, rows)
        logits = random.normal(size=(len(members), rows, 2)) + 2.0 * np.eye(2)[labels]
        scores[split] = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        ids = tuple(f"{split}-{i}" for i in range(rows))
        write_predicted(root, split, ChoicePredictions(ids, scores[split].astype(np.float32)))
        splits[split] = [Row(id=i, choices=("bad", "good"), label=int(y)) for i, y in zip(ids, labels, strict=True)]
    monkeypatch.setattr("pipeline.report.inputs.load_splits", lambda _: SimpleNamespace(**splits, fingerprint="rows"))
    return members, scores, np.array([row.label for row in splits["test"]])


def test_the_report_of_a_comparison_is_that_of_its_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, scores, labels = write_compared(tmp_path, monkeypatch)
    result = write_report(tmp_path)
    nll = -scores["test"][:, np.arange(len(labels)), labels].mean(axis=1)
    systems = {system["key"]: system for system in result["systems"]}
    assert list(systems) == ["base", "plain", "plain_ensemble", "variant_0_1", "method_1", "ensemble_1", "variant_1_1"]
    plain = [i for i, m in enumerate(members) if m.name.startswith("none-lr0.1-")]
    dropkey = [i for i, m in enumerate(members) if m.name.startswith("dropkey-lr0.2-") and m.draw is None]
    assert systems["plain"]["test"]["before"]["nll"]["value"] == pytest.approx(nll[plain].mean(), abs=1e-6)
    assert systems["method_1"]["test"]["before"]["nll"]["value"] == pytest.approx(nll[dropkey].mean(), abs=1e-6)
    right = (scores["test"][dropkey].argmax(-1) == labels).mean()
    assert systems["method_1"]["test"]["before"]["accuracy"]["value"] == pytest.approx(right)
    draws = np.exp([scores["test"][[i + 1, i + 2]] for i in dropkey]).mean(axis=1)  # (seeds, rows, choices)
    mixture = -np.log(draws[:, np.arange(len(labels)), labels]).mean()
    assert systems["ensemble_1"]["test"]["before"]["nll"]["value"] == pytest.approx(mixture, abs=1e-6)

    (paired,) = [c for c in result["comparisons"] if (c["system"], c["split"], c["score"], c["scaling"]) == (
        "method_1", "test", "nll", "before")]
    assert paired["versus"] == "plain" and paired["low"] < paired["difference"] < paired["high"]
    assert paired["difference"] == pytest.approx(nll[dropkey].mean() - nll[plain].mean(), abs=1e-6)
    assert systems["method_1"]["cost"] == 1.5 and systems["plain"]["cost"] == 1.0
    assert systems["method_1"]["train_seconds"] == 8.0 and systems["method_1"]["seeds"] == [0, 1]

    table = format_comparison(result)
    for part in ("Base model, untrained head", "Plain LoRA, lr 0.1 *", "Plain LoRA, lr 0.2  ", "DropKey, lr 0.2 *",
                 "DropKey, 2 masks", "hiddenkey-lr0.1-seed0 refused: no such thing", "Seed 0, 1."):
        assert part in table, table
    assert r"\n" not in table  # the lines of the footnote are lines
    assert "over rows and over the training seeds 0, 1" in result["reading"][-1]
    assert result["reading"][0] == "Validation chooses Plain LoRA: lr 0.1; DropKey: lr 0.2."
    assert any("2 seeds are too few for a claim" in line for line in result["remarks"])
    assert "2 seeds are too few for a claim" in table and not any(c["claims"] for c in result["comparisons"])
    edges = "Of two values every choice is at the edge (lr 0.1 and 0.2): the best may lie beyond them."
    assert result["remarks"].count(edges) == 1 and f"\n! {edges}\n" in table and "\\n" not in table
    spread = nll[dropkey].std(ddof=1)
    assert systems["method_1"]["test"]["before"]["nll"]["run_sd"] == pytest.approx(spread, abs=1e-6)
    difference_sd = (nll[dropkey] - nll[plain]).std(ddof=1)
    assert (paired["seeds"], paired["run_sd"]) == (2, pytest.approx(difference_sd, abs=1e-6))
    page = (tmp_path / "report.html").read_text()
    assert "(few seeds)" not in page and "<small>few seeds</small>" in page, "the table has to fit 1,200 px"
    assert "Comparison of 3 methods" in page and "HiddenKey, lr 0.1, seed 0" in page and "no such thing" in page


def test_the_deep_ensemble_is_the_plain_loras_of_all_seeds_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, scores, labels = write_compared(tmp_path, monkeypatch)
    result = write_report(tmp_path)
    systems = {system["key"]: system for system in result["systems"]}
    deep, plain = systems["plain_ensemble"], [i for i, m in enumerate(members) if m.name.startswith("none-lr0.1-")]
    mixture = np.exp(scores["test"][plain]).mean(axis=0)[np.arange(len(labels)), labels]
    assert deep["test"]["before"]["nll"]["value"] == pytest.approx(-np.log(mixture).mean(), abs=1e-6)
    assert deep["test"]["before"]["nll"]["low"] < deep["test"]["before"]["nll"]["value"]
    assert deep["temperature"]["mean"] != systems["plain"]["temperature"]["mean"]  # fitted to the average
    assert (deep["passes"], deep["train_steps"], deep["train_seconds"], deep["train_seeds"]) == (2, 8, 16.0, [])
    assert (systems["plain"]["passes"], systems["plain"]["train_steps"]) == (1, 4)
    (versus,) = [c for c in result["comparisons"] if (c["system"], c["split"], c["score"], c["scaling"]) == (
        "plain_ensemble", "test", "nll", "before")]
    own = systems["plain"]["test"]["before"]["nll"]["value"]
    assert versus["difference"] == pytest.approx(deep["test"]["before"]["nll"]["value"] - own)
    assert versus["low"] < versus["difference"] < versus["high"]
    table, page = format_comparison(result), (tmp_path / "report.html").read_text()
    assert "Deep ensemble of 2 plain  " in table and "\n  LoRAs\n" in table
    assert "its intervals are over rows alone" in table
    assert "Train steps" in page and "Deep ensemble of 2 plain LoRAs" in page
    assert any("deep ensemble of 2 plain LoRAs" in line for line in result["reading"])
    assert not any("Deep ensemble left out" in line for line in result["left_out"])


def test_settings_that_were_not_chosen_may_have_predicted_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is shown of the chosen ones is the same as where all settings predicted; the page has all trainings."""
    write_compared(tmp_path, monkeypatch)
    everything = write_report(tmp_path)
    members, trainings = read_members(RunPaths(tmp_path).predictions), read_comparison(RunPaths(tmp_path)) or []
    chosen = {one.name for one in trainings if one.chosen}
    kept = [i for i, member in enumerate(members) if member.group == "base" or member.name in chosen]
    predictions = {split: read_predictions(RunPaths(tmp_path).predictions, split).of_members(kept) for split in ROWS}
    write_members(RunPaths(tmp_path).predictions, [members[i] for i in kept])
    for split, found in predictions.items():
        write_predicted(tmp_path, split, found)
    result = write_report(tmp_path)
    keys = [system["key"] for system in result["systems"]]
    assert keys == ["base", "plain", "plain_ensemble", "method_1", "ensemble_1"]
    was = {system["key"]: system for system in everything["systems"]}
    for system in result["systems"]:
        assert system["test"]["before"]["nll"]["value"] == was[system["key"]]["test"]["before"]["nll"]["value"]
    said = "4 trainings of settings that validation did not choose: report.html has their validation"
    assert said in result["left_out"][-1] and said in format_comparison(result)
    page = (tmp_path / "report.html").read_text()
    assert "lr 0.2, seed 1" in page and said in page
    assert not any("settings that validation did not choose" in line for line in everything["left_out"])

    write_comparison(RunPaths(tmp_path), "", [replace(one, chosen=not one.chosen) for one in trainings])
    with pytest.raises(RunFolderError, match=r"none-lr0\.2-seed0.*Compare again"):
        write_report(tmp_path)


def test_one_seed_makes_no_deep_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_compared(tmp_path, monkeypatch)
    kept = [one for one in read_comparison(RunPaths(tmp_path)) or [] if one.seed == 0]
    result, _ = build_comparison(read_inputs(tmp_path), kept)
    assert not any(system["key"] == "plain_ensemble" for system in result["systems"])
    said = "Deep ensemble left out: it averages plain LoRAs of at least two seeds, and 1 is trained"
    assert result["left_out"][-1].startswith(said) and said in format_comparison(result)


def test_without_plain_lora_methods_are_compared_with_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_compared(tmp_path, monkeypatch)
    paths = RunPaths(tmp_path)
    kept = [one for one in read_comparison(paths) or [] if one.method != "none"]
    write_comparison(paths, "", kept)
    result, _ = build_comparison(read_inputs(tmp_path), kept)
    assert {c["versus"] for c in result["comparisons"]} == {"base"}
    assert {system.get("cost") for system in result["systems"]} == {None}
    assert "NLL − the base with an untrained head" in format_comparison(result)


def test_evaluation_takes_what_was_trained_and_draws_of_what_was_chosen(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"kind": "lora", "draws": 3, "searched": 0}
    trainings = [training("none", 0.1, chosen=True), training("none", 0.2),
                 replace(training("dropkey", 0.1), state="failed")]
    write_comparison(RunPaths(tmp_path), "", trainings)
    entries = listed_adapters(RunPaths(tmp_path), **asked, compared="all")
    assert [(entry.name, entry.draws) for entry in entries] == [("none-lr0.1-seed0", 3), ("none-lr0.2-seed0", 0)]
    assert entries[0].folder == tmp_path / "trainings" / "none-lr0.1-seed0" / "adapter"
    chosen = listed_adapters(RunPaths(tmp_path), **asked, compared="chosen")
    assert chosen == entries[:1]
    write_json(RunPaths(tmp_path).comparison, {"trainings": [{"nme": "x"}]})
    with pytest.raises(RunFolderError, match=r"compare\.json.*is damaged"):
        listed_adapters(RunPaths(tmp_path), **asked, compared="all")


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("input_dropout", "MC dropout (input dropout, 2 draws)"), ("rank_dropout", "Random rank masks (2 draws)"),
        ("droplora", "DropLoRA, 2 masks"), ("hiddencut", "HiddenCut, 2 masks"),
        ("none", None),
    ],
)
def test_every_kind_of_masks_is_drawn_at_test_and_has_its_name(tmp_path: Path, method: str, name: str | None) -> None:
    """Masks on activations as much as masks on weights; of what validation chose alone."""
    spec = AdapterSpec(8, 16.0, sites=AdapterConfig(method=method).resolved_method().sites)
    stored: Any = SimpleNamespace(spec=spec, sha256="ab", head=SimpleNamespace(modules={}))
    trainings = [training(method, 0.1, chosen=True), training(method, 0.2)]
    write_comparison(RunPaths(tmp_path), "", trainings)
    entries = listed_adapters(RunPaths(tmp_path), kind="lora", draws=2, searched=0, compared="all")
    members, described = member_list(entries, [stored, stored], seed=0)
    assert [member.draw for member in members] == [None, None, *([0, 1] if name else []), None]
    systems = {system.name: system for system, _ in compared_systems(described, trainings)}
    assert len(systems) == (3 if name else 2)
    if name:
        assert systems[name].candidates == ((2, 3),) and systems[name].passes == 2


def test_the_searched_adapters_are_those_that_the_search_would_take(tmp_path: Path) -> None:
    """Finished trials by what chose among them, then those that were stopped."""
    losses = {"a": (0.5, 0.2), "b": (0.4, 0.3), "c": (0.1, None), "d": (0.2, None)}
    trials = [{"name": name, "run": name, "validation_nll": nll, "validation_loss": loss,
               "adapter_sha256": name} for name, (nll, loss) in losses.items()]
    write_json(tmp_path / "search" / "search.json", {"trials": trials})
    paths = RunPaths(tmp_path / "run")
    paths.adapter.mkdir(parents=True)
    write_json(paths.related, {"search": {"folder": "../search"}})
    entries = listed_adapters(paths, kind="lora", draws=0, searched=3, compared="chosen")
    assert [entry.name for entry in entries] == ["mean-field", "a", "b", "c"]


@pytest.mark.parametrize(("extra", "name"), [({}, "Base model"), ({"head": "untrained"}, "Base model, untrained head")])
def test_a_base_with_an_untrained_head_is_called_so(extra: dict[str, Any], name: str) -> None:
    assert [system.name for system in base_system([PredictedMember("base", "base", extra=extra)])] == [name]


def test_what_is_compared_does_not_depend_on_the_order_of_the_methods(tmp_path: Path) -> None:
    config = build_config({"compare": {"methods": ["lora_dropout", "none"]}})
    planned = [one for one, _ in plan_trainings(config)]
    done = [replace(one, state="done", chosen=one.values == planned[0].values) for one in planned]
    about = [{"train_seed": one.seed, "values": one.values, "method": one.method} for one in done]
    members = [PredictedMember(one.name, "compared", extra=extra) for one, extra in zip(done, about, strict=True)]
    keys = [system.key for system, _ in compared_systems(members, done)]
    assert keys.index("plain") == 0 and "method_1" in keys
