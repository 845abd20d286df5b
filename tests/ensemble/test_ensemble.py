"""An ensemble that predicts is the one that was evaluated; from an export, the one that was exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import RunConfig, dump_config, load_config
from pipeline.config.load import with_values
from pipeline.data.formats.json_text import read_jsonl
from pipeline.data.sources import parse
from pipeline.data.splits import load_splits
from pipeline.distributed.world import lone_world
from pipeline.ensemble.ensemble import Answer, Ensemble
from pipeline.ensemble.readout import EvaluatedRun
from pipeline.errors import ConfigError, RunFolderError
from pipeline.files import read_json, write_json, write_text
from pipeline.run_folder.paths import RunPaths
from pipeline.scores.adaptive import adaptive_average, settled
from pipeline.scores.ensemble import average
from pipeline.scores.temperature import apply_temperature
from pipeline.stages import export
from pipeline.stages.report import write_report


def records(config: RunConfig, ids: list[str]) -> list[dict[str, Any]]:
    """Rows as they stand in the data, without their labels."""
    rows, _ = parse(read_jsonl(Path(config.data.path)), None, "rows")
    by_id = {row.id: row for row in rows}
    return [{"id": name, "prompt": by_id[name].prompt, "choices": list(by_id[name].choices)} for name in ids]


@pytest.mark.slow
@pytest.mark.parametrize("draws", [None, 0, 4])
def test_predict_equals_evaluate_on_the_same_rows(finished_run: tuple[RunPaths, RunConfig], draws: int | None) -> None:
    paths, config = finished_run
    with np.load(paths.predictions / "test.npz") as arrays:
        ids, logs = arrays["row_ids"].tolist(), arrays["log_probs"].astype(np.float64)
    members = read_json(paths.predictions / "members.json")
    ensemble = Ensemble.load(paths.root, draws=draws)
    entry = read_json(paths.result)["ensemble"]
    chosen, weights = list(range(draws or 0)) or [None], None
    if draws is None:
        chosen, weights = entry["members"], entry["weights"]
    places = {member["draw"]: n for n, member in enumerate(members) if member["group"] in ("mean_field", "mask_draw")}
    own = [places[draw] for draw in chosen]
    assert len(ensemble.members) == len(own)
    if draws == 0:
        entry = next(one for one in read_json(paths.result)["systems"] if one["key"] == "mean_field")
        assert abs(entry["temperature"]["mean"] - ensemble.readout.temperature) < 1e-9

    mixture = np.average(np.exp(logs[own]), axis=0, weights=weights)
    scaled = np.log(mixture) / ensemble.readout.temperature
    expected = np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)
    answers = ensemble.predict(records(config, ids))
    found = np.array([answer.probabilities for answer in answers if isinstance(answer, Answer)])
    assert [answer.id for answer in answers] == ids
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)

    by_hand = -(expected * np.log(expected)).sum(axis=-1)
    np.testing.assert_allclose([answer.entropy for answer in answers], by_hand, atol=1e-5)
    apart = np.array([answer.mutual_information for answer in answers])
    assert (apart > 0).any() if len(own) > 1 else (apart == 0).all()
    between = np.sqrt(np.average((np.exp(logs[own]) - mixture) ** 2, axis=0, weights=weights))
    np.testing.assert_allclose([a.spread for a in answers], between, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_an_export_answers_as_its_run_and_says_what_it_lacks(finished_run: tuple[RunPaths, RunConfig]) -> None:
    paths, config = finished_run
    rows = records(config, [row.id for row in load_splits(config.data).test[:12]])
    run, exported = Ensemble.load(paths.root), Ensemble.load(paths.export)
    assert exported.readout.draws == run.readout.draws
    for one, other in zip(exported.predict(rows), run.predict(rows), strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=0, atol=1e-5)
    with pytest.raises(RunFolderError, match="none of the calibration rows"):
        exported.predict(rows, abstain=0.1)
    manifest = read_json(paths.export / "manifest.json")
    write_json(paths.export / "manifest.json", {name: v for name, v in manifest.items() if name != "reading"})
    with pytest.raises(RunFolderError, match="does not say its reading.*Export again"):
        Ensemble.load(paths.export)
    write_json(paths.export / "manifest.json", manifest)


@pytest.mark.slow
def test_abstention_is_promised_where_it_can_be(finished_run: tuple[RunPaths, RunConfig]) -> None:
    paths, config = finished_run
    splits = load_splits(config.data)
    run = EvaluatedRun.open(paths, config, splits)
    readout = run.readout()
    with pytest.raises(ConfigError, match=r"--abstain = 0.001: cannot be promised by 80 .* promise"):
        run.threshold(readout, 0.001)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        run.threshold(readout, 1.5)
    threshold = run.threshold(readout, 0.9)
    ensemble = Ensemble.load(paths.root, world=lone_world())
    answers = ensemble.predict(records(config, [row.id for row in splits.test[:8]]), abstain=0.9)
    assert threshold.confidence == 0.0 and [answer.answered for answer in answers] == [True] * 8


@pytest.mark.slow
def test_what_was_not_reported_has_no_ensemble(finished_run: tuple[RunPaths, RunConfig]) -> None:
    paths, config = finished_run
    result = paths.result.read_text()
    paths.result.unlink()
    with pytest.raises(RunFolderError, match="no ensemble has been chosen. Run the stages evaluate and report"):
        Ensemble.load(paths.root)
    paths.result.write_text(json.dumps({**json.loads(result), "made_from": {}}))
    with pytest.raises(RunFolderError, match="does not say what it was made from"):
        Ensemble.load(paths.root)
    paths.result.write_text(result)
    with pytest.raises(RunFolderError, match="does not hold mask draw 4: there are 4"):
        Ensemble.load(paths.root, draws=5)


@pytest.fixture
def rereported(finished_run: tuple[RunPaths, RunConfig], tmp_path: Path) -> RunPaths:
    """A copy of the run that was reported under ensemble.adaptive."""
    paths = RunPaths(tmp_path / "run")
    shutil.copytree(finished_run[0].root, paths.root)
    config = with_values(finished_run[1], {"ensemble.adaptive": 0.3})
    write_text(paths.config, dump_config(config))
    with pytest.raises(RunFolderError, match="was made under other settings"):
        Ensemble.load(paths.root)
    write_report(paths.root)
    return paths


@pytest.mark.slow
def test_settled_rows_and_weighted_members_are_answered_as_evaluated(rereported: RunPaths) -> None:
    """From the cached predictions, to 1e-6: as many draws as each row needs; then members that do not count alike."""
    paths, config = rereported, load_config(rereported.config)
    with np.load(paths.predictions / "test.npz") as arrays:
        ids, logs = arrays["row_ids"].tolist(), arrays["log_probs"].astype(np.float64)
    groups = [member["group"] for member in read_json(paths.predictions / "members.json")]
    draws = [n for n, group in enumerate(groups) if group == "mask_draw"]
    ensemble = Ensemble.load(paths.root, draws=4)
    margin = ensemble.readout.margin
    passes = np.where(settled(logs[draws[:2]], 2, margin), 2, 4)
    expected = np.exp(apply_temperature(adaptive_average(logs[draws], passes), ensemble.readout.temperature))
    answers = ensemble.predict(records(config, ids))
    assert 2 in passes and [answer.passes for answer in answers] == passes.tolist()
    np.testing.assert_allclose([answer.probabilities for answer in answers], expected, rtol=0, atol=1e-6)
    plain = replace(ensemble.readout, margin=None)
    assert ensemble.identity not in (ensemble.run.identity(plain), Ensemble.load(paths.root, draws=2).identity)

    result = read_json(paths.result)
    result["ensemble"] |= {"chosen": "greedy", "members": [None, 2], "weights": [0.25, 0.75], "chosen_size": 1}
    write_json(paths.result, result)
    write_text(paths.config, dump_config(with_values(config, {"ensemble.adaptive": 0.0})))
    with pytest.raises(RunFolderError, match="was made under other settings"):
        Ensemble.load(paths.root)
    write_text(paths.config, dump_config(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "leave_world", lambda: None)
        export.export_run(paths.root)
    weighted = average(logs[[groups.index("mean_field"), draws[2]]], weights=[0.25, 0.75])
    for folder in (paths.root, paths.export):
        ensemble = Ensemble.load(folder)
        assert ensemble.readout.draws == (None, 2) and ensemble.readout.weights == (0.25, 0.75)
        expected = np.exp(apply_temperature(weighted, ensemble.readout.temperature))
        found = [answer.probabilities for answer in ensemble.predict(records(config, ids))]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 if folder == paths.root else 1e-5)
    with pytest.raises(RunFolderError, match="holds 1 mask draws"):
        Ensemble.load(paths.export, draws=1)
