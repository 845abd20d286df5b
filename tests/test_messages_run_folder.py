"""Messages about run folders and exports that no other test reaches, with what provokes them (tests/messages.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.adapters.peft_format import write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import ModelConfig, RunConfig, build_config, dump_config
from pipeline.config.load import with_values
from pipeline.data.rows import Row
from pipeline.data.shapes.also import AlsoRows
from pipeline.data.splits import EVALUATED_SPLITS, Splits
from pipeline.ensemble.ensemble import Ensemble
from pipeline.ensemble.exported import BASE, open_export, reading_entry
from pipeline.ensemble.readout import EvaluatedRun, Readout
from pipeline.ensemble.rows import RowForm
from pipeline.errors import UserError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, publish_folder, sha256_file, write_json, write_text
from pipeline.harness.command import evaluate_tasks
from pipeline.plan.request import Request
from pipeline.report import inputs
from pipeline.report.also.rows import read_also
from pipeline.run_folder.chain import Origin, predictions_from, require_members
from pipeline.run_folder.comparison import Training, write_comparison
from pipeline.run_folder.generated import (
    GeneratedTexts,
    Text,
    read_joined,
    read_texts,
    texts_from,
    texts_path,
    write_texts,
)
from pipeline.run_folder.mark import claim, refuse_foreign
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, Predictions, RegressionPredictions, write_predictions
from pipeline.stages import evaluate, export, pack

CONFIG = build_config({"ensemble": {"size": 2, "seed": 7}})
ORIGIN = Origin(CONFIG.training_sha256(), "rows")
ROWS = {split: [Row(f"{split} {n}", f"{split} {n}", ("a", "b"), n % 2) for n in range(4)] for split in EVALUATED_SPLITS}
SPLITS = Splits([], ROWS["validation"], ROWS["calibration"], ROWS["test"], "rows")
NAMES = {split: tuple(row.id for row in rows) for split, rows in ROWS.items()}


def fill_adapter(folder: Path, value: float = 1.0) -> None:
    """A PEFT folder of plain LoRA on one layer."""
    folder.mkdir(parents=True, exist_ok=True)
    matrices = {"layers.0.q": (torch.full((2, 3), value), torch.full((5, 2), value))}
    write_adapter(folder, matrices, AdapterSpec(rank=2), 1, "tiny", {})


def members_of(paths: RunPaths) -> list[PredictedMember]:
    sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    own = PredictedMember("mean-field", "mean_field", "adapter", sha256)
    return [own, *(PredictedMember(f"draw {n}", "mask_draw", "adapter", sha256, n, {"seed": 7}) for n in range(2))]


def predict(
    paths: RunPaths, split: str, make: Callable[..., Predictions] = ChoicePredictions, members: int = 3
) -> None:
    """Predictions of the fixture's members, which know nothing."""
    shape = (members, 4) if make is RegressionPredictions else (members, 4, 2)
    said = np.full(shape, np.log(0.5), dtype=np.float32)
    made_from = predictions_from(ORIGIN, members_of(paths))
    write_predictions(paths.predictions, split, make(NAMES.get(split, NAMES["test"]), said, made_from=made_from))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run that was trained and evaluated, and not reported."""
    paths = RunPaths(tmp_path / "run")
    claim(paths.root, "run")
    write_text(paths.config, dump_config(CONFIG))

    def fill(folder: Path) -> None:
        fill_adapter(folder)
        write_json(folder / MANIFEST, {"step": 3, "validation_nll": 0.5, "origin": ORIGIN.as_dict()})

    publish_folder(paths.adapter, fill)
    write_members(paths.predictions, members_of(paths))
    for split in EVALUATED_SPLITS:
        predict(paths, split)
    return paths


def opened(paths: RunPaths, config: RunConfig = CONFIG) -> EvaluatedRun:
    """As if it had been reported."""
    return EvaluatedRun(paths, config, SPLITS, sha256_file(paths.adapter / ADAPTER_WEIGHTS), {})


def test_a_run_without_an_ensemble(paths: RunPaths) -> None:
    with pytest.raises(UserError, match=r"result.json: does not exist: no ensemble has been chosen. Run the stages"):
        EvaluatedRun.open(paths, CONFIG, SPLITS)
    write_comparison(paths, "", [])
    with pytest.raises(UserError, match="compares methods and has chosen no ensemble. Train the method that you want"):
        EvaluatedRun.open(paths, CONFIG, SPLITS)


def test_what_a_readout_cannot_promise(paths: RunPaths) -> None:
    run = opened(paths)
    readout = run.readout(2)
    assert readout.draws == (0, 1)
    for asked, risk, said in (
        (readout, 0.001, "--abstain = 0.001: cannot be promised by 4 independent calibration rows, of which 2 are"),
        (readout, 1.5, "--abstain = 1.5: must be between 0 and 1. 0.05: one answer in twenty may be wrong."),
        (replace(readout, kind="regression"), 0.1, "--abstain = 0.1: is for rows with choices: no number is right."),
    ):
        with pytest.raises(UserError) as found:
            run.threshold(asked, risk)
        assert said in str(found.value)
    with pytest.raises(UserError, match="does not hold mask draw 2: there are 2. Ask for fewer, or raise"):
        run.readout(3)
    nothing: Any = None
    exported = Ensemble(nothing, nothing, [], readout, nothing, nothing, "")
    with pytest.raises(UserError, match="folder: is an export, which has none of the calibration rows.*Load the run"):
        exported.predict([], abstain=0.1)
    predict(paths, "calibration", RegressionPredictions)
    run = opened(paths, with_values(CONFIG, {"ensemble.adaptive": 0.1}))
    run = replace(run, splits=replace(SPLITS, calibration=[Row(n, n, score=0.5) for n in NAMES["calibration"]]))
    with pytest.raises(UserError, match="ensemble.adaptive = 0.1: is for rows with choices: no number is settled."):
        run.readout(2)


FORM = RowForm("choice", None, ("a", "b"), False)
DRAWS = [{"draw": n, "folder": f"draws/draw_{n:03d}", "form": "draws"} for n in range(2)]
SCALED = {"average": "probability", "temperature": {"value": 1.0}}


def exported(folder: Path, value: float = 1.0, **changes: Any) -> Path:
    """An export of an adapter and two draws, for a base that lies in a folder beside it."""
    base = folder.parent / "base"
    base.mkdir(exist_ok=True)
    (base / "model.safetensors").write_text("weights")
    config = ModelConfig(path=str(base)).model_dump()
    entries: dict[str, Any] = {
        "base": {**{name: config[name] for name in BASE}, "files": {}}, "reading": reading_entry(CONFIG, FORM),
        "exports": [{"draw": None, "folder": "adapter", "form": "adapter"}, *DRAWS], "adapter": SCALED,
        "ensemble": {**SCALED, "members": [one["folder"] for one in DRAWS], "weights": [1.0, 1.0]},
    }
    entries["base"] |= changes.pop("base", {})

    def fill(aside: Path) -> None:
        for name in ("adapter", *(one["folder"] for one in DRAWS)):
            fill_adapter(aside / str(name), value)
        write_json(aside / MANIFEST, {**entries, **changes})

    publish_folder(folder, fill)
    return folder


@pytest.mark.parametrize(
    ("changes", "draws", "said"),
    [
        ({"exports": [{"draw": None, "folder": "merged", "form": "merged"}]}, None,
         "holds none of the forms adapter and draws. The use.py in each of its folders reads that one."),
        ({}, 3, "= 3: holds 2 mask draws. Export more (export.draws), or give the run folder."),
        ({"exports": DRAWS}, 0, "= 0: holds no adapter without masks. Export more"),
        ({}, 1, "= 1: has a temperature for its 2 members together alone. Ask for all of them, or give the run"),
        ({"adapter": {"average": "probability", "reason": "no rows"}}, 0, "has no temperature: no rows. Export again"),
        ({"reading": None}, None, "does not say its reading, without which its members cannot be read out. Export"),
        ({"value": 0.0}, 0, "adapter: has no effect: every update is zero. Export again, or give the run folder."),
        ({"base": {"files": {"model.safetensors": "another"}}}, 0,
         "is another base than the one that this export was made for (model.safetensors differs). Put that one in its"),
    ],
)
def test_exports(tmp_path: Path, changes: dict[str, Any], draws: int | None, said: str) -> None:
    with pytest.raises(UserError) as found:
        open_export(exported(tmp_path / "export", **changes), draws, False)
    assert said in str(found.value)


def test_an_export_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = exported(tmp_path / "export")
    assert open_export(folder, None, False).readout == Readout((0, 1), "probability", 1.0, "choice")
    (folder / "adapter" / ADAPTER_WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"export: is damaged \(.*\). Put the whole folder back"):
        open_export(folder, None, False)


def test_predictions_of_others(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    members = members_of(paths)
    with pytest.raises(UserError, match="was made with 2 mask draws, and ensemble.size is 8"):
        require_members(paths, members, with_values(CONFIG, {"ensemble.size": 8}).ensemble)
    said = "holds 2 members, members.json names 3"
    predict(paths, "test", members=2)
    with pytest.raises(UserError, match=f"test.npz: {said}. Evaluate again"):
        inputs._read_split(paths, "test", ORIGIN, members)
    predict(paths, "also_far", members=2)
    also = {"also_far": AlsoRows(ROWS["test"], "rows", True)}
    monkeypatch.setattr("pipeline.report.also.rows.load_also", lambda *_: also)
    with pytest.raises(UserError, match=f"also_far.npz: {said}. .*evaluate again"):
        read_also(paths, CONFIG, SPLITS, members)
    numbers = RegressionPredictions(NAMES["test"], np.zeros((1, 4)))
    choices = ChoicePredictions(NAMES["test"], np.log(np.full((1, 4, 2), 0.5)))
    with pytest.raises(UserError, match="predictions: mixes choice and regression data"):
        inputs._common_kind(paths, {"validation": choices, "test": numbers})
    done = Training("none-lr1", "none", {}, 1, "", "done", adapter_sha256="another")
    with pytest.raises(UserError, match="names another adapter of none-lr1 than the one that predicted. Compare again"):
        inputs._require_same_trainings(paths, [done], [PredictedMember("none-lr1", "compared", "x", "one")])


def test_texts(tmp_path: Path) -> None:
    config = build_config({"evaluate": {"generate": {"rows": 2}}})
    settings, members, made_from = config.evaluate.generate, [PredictedMember("mean-field", "mean_field")], {"a": "b"}
    assert settings is not None
    with pytest.raises(UserError, match=r"generated_test.jsonl: does not exist. Run the evaluate stage \(again\)"):
        read_texts(tmp_path, "test")
    write_text(texts_path(tmp_path, "test"), '{"made_from": {}}\n')
    with pytest.raises(UserError, match=r"generated_test.jsonl: is damaged \('writers'\). Run the evaluate stage"):
        read_texts(tmp_path, "test")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    silent = Row("r", messages=({"role": "user", "content": "do"}, call))
    wanted = texts_from(made_from, settings, config.ensemble.average)
    text = Text("r", "mean_field", "done", 1, -0.5, True)
    write_texts(tmp_path, "test", GeneratedTexts(wanted, {"mean_field": ["mean-field"]}, {"mean_field": 1.0}, [text]))
    with pytest.raises(UserError, match="wrote texts for rows none of which has a text as its answer. Set it to null"):
        read_joined(tmp_path, config, [silent], made_from, members)
    with pytest.raises(UserError, match="was made under other settings, by other members or for other rows"):
        read_joined(tmp_path, config, [silent], {"a": "c"}, members)


def test_places_that_can_be_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to \(Not a directory\). Give a folder that you may write"):
        claim(tmp_path / "file" / "run", "run")
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\). Give a new or an empty folder"):
        refuse_foreign(tmp_path / "file", "run")


def test_adapters_that_evaluate_looks_for(paths: RunPaths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter: does not exist. Run the train stage first"):
        evaluate.listed_adapters(RunPaths(tmp_path), kind="lora", draws=1, searched=1, compared="all")
    plain = evaluate.Entry("plain", "plain LoRA", paths.adapter, "another")
    with pytest.raises(UserError, match="is another adapter than the one that this run refers to as plain LoRA. Put"):
        evaluate.read_entry(plain)


def test_nothing_to_export_and_no_list_of_runs(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "load_splits", lambda data: SPLITS)
    write_text(paths.config, dump_config(with_values(CONFIG, {"export.forms": ["draws"]})))
    with pytest.raises(UserError, match=r"export.forms = \['draws'\]: leaves nothing to export. Add adapter"):
        export.export_run(paths.root)
    write_json(paths.root / pack.PLAN, [])
    with pytest.raises(UserError, match="pack.json: is no list of runs. Start the comparison again"):
        pack.pack_stage(paths.root)


def test_what_eval_asks_for(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**asked: Any) -> str:
        with pytest.raises(UserError) as found:
            evaluate_tasks(Request(run_dir=str(paths.root), **asked))
        return str(found.value)

    assert "--tasks = ' ,': names no task. Give names or files: --tasks arc_easy,my.yaml." in said(tasks=" ,")
    assert "--limit = 0: is too small. Give a whole number of rows, or leave it out." in said(tasks="x", limit=0)
    monkeypatch.setattr("pipeline.harness.command.find_spec", lambda name: None)
    assert 'is not installed. Install it: pip install "loradrop[eval]".' in said(tasks="x")
    monkeypatch.setattr("pipeline.model.kind.model_kind", lambda model: "classifier")
    assert "model.kind = 'classifier': has no likelihood of a text. Give a run of a causal model." in said(tasks="x")


