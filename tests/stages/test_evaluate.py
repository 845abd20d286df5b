"""The evaluation stage on a tiny run: mask draws that stop, and predictions that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.adapters.members import Member
from pipeline.config import RunConfig, load_config
from pipeline.config.load import with_values
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, sha256_file
from pipeline.prediction import rounds
from pipeline.run_folder.chain import Origin, predictions_from
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, Predictions, write_predictions
from pipeline.run_folder.verify import verify_folder
from pipeline.stages import evaluate, export
from pipeline.stages.processes import begin_training
from pipeline.stages.report import write_report
from pipeline.stages.train import train_run


def predictions(run: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(mask draws that members.json names, log-probabilities of each split)."""
    members = json.loads((run / "predictions" / "members.json").read_text())
    tables = {}
    for split in ("validation", "calibration", "test"):
        with np.load(run / "predictions" / f"{split}.npz") as arrays:
            tables[split] = arrays["log_probs"]
        assert len(tables[split]) == len(members)
    return sum(member["group"] == "mask_draw" for member in members), tables


def evaluated(run: Path, **ensemble: object) -> tuple[int, dict[str, np.ndarray]]:
    """The same, after an evaluation under these settings."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"].update(ensemble)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    evaluate.evaluate_run(run)
    return predictions(run)


@pytest.mark.slow
def test_draws_stop_when_validation_is_flat(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "leave_world", lambda: None)  # the process group serves the next test
    for module in (evaluate, rounds):
        monkeypatch.setattr(module, "draws_stop", lambda lineups, made, *rest: made in (2, len(lineups)))
    run = tmp_path / "tiny"
    train_run(load_config(None, tiny_settings), run)
    capsys.readouterr()
    drawn, stopped = evaluated(run, size=12, stop_when_flat=True)
    assert drawn == 8 and "8 of 12 mask draws" in capsys.readouterr().err
    assert evaluated(run)[0] == 8 and "predictions are complete" in capsys.readouterr().err
    (run / "predictions" / "test.npz").unlink()
    kept = (run / "predictions" / "validation.npz").stat().st_mtime_ns
    assert evaluated(run)[0] == 8 and (run / "predictions" / "validation.npz").stat().st_mtime_ns == kept
    write_report(run)
    assert "No more than 8 masks were drawn" in (run / "report.html").read_text()

    assert evaluated(run, size=8, stop_when_flat=False)[0] == 8  # the same eight
    assert "predictions are complete" in capsys.readouterr().err
    drawn, every = evaluated(run, size=12)
    assert drawn == 12
    for split, table in stopped.items():
        np.testing.assert_allclose(every[split][: len(table)], table, rtol=0, atol=1e-5)


class Killed(BaseException):
    """What no code of ours expects."""


@pytest.mark.slow
def test_a_trained_run_is_evaluated_again_under_another_ensemble_size(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (evaluate, export):
        monkeypatch.setattr(module, "leave_world", lambda: None)  # the process group serves the next test
    run, settings = tmp_path / "tiny", [word for word in tiny_settings if not word.startswith("ensemble.size")]
    paths, config = RunPaths(run), load_config(None, [*settings, "ensemble.size=2"])
    assert begin_training(config, run)
    train_run(config, run)
    evaluate.evaluate_run(run)
    write_report(run)
    adapter, before = sha256_file(run / "adapter" / ADAPTER_WEIGHTS), predictions(run)[1]
    assert {found.state for found in verify_folder(run)} == {"whole"}

    more = with_values(config, {"ensemble.size": 4})
    assert not begin_training(more, run), "it is trained"
    with pytest.raises(RunFolderError, match=r"was made with 2 mask draws, and ensemble\.size is 4"):
        write_report(run)
    with pytest.raises(RunFolderError, match=r"result\.json: was made under other settings"):
        export.export_run(run)
    assert {found.name for found in verify_folder(run) if found.state == "foreign"} == {
        "predictions/members.json", "result.json"}

    def killed(folder: Path, split: str, found: Predictions) -> None:
        if split == "calibration":
            raise Killed
        write_predictions(folder, split, found)

    with monkeypatch.context() as broken:
        broken.setattr(evaluate, "write_predictions", killed)
        with pytest.raises(Killed):
            evaluate.evaluate_run(run)
    written = (run / "predictions" / "validation.npz").stat().st_mtime_ns
    with pytest.raises(RunFolderError, match=r"calibration\.npz: does not exist"):
        write_report(run)
    assert not begin_training(more, run)  # the same command again
    evaluate.evaluate_run(run)
    assert (run / "predictions" / "validation.npz").stat().st_mtime_ns == written
    drawn, after = predictions(run)
    assert drawn == 4 and sha256_file(run / "adapter" / ADAPTER_WEIGHTS) == adapter
    for split, table in before.items():
        np.testing.assert_allclose(after[split][: len(table)], table, rtol=0, atol=1e-5)
    write_report(run)
    assert {found.state for found in verify_folder(run)} == {"whole"}
    assert json.loads(paths.result.read_text())["made_from"]["settings_sha256"] == more.reading_sha256()

    with monkeypatch.context() as idle:
        idle.setattr(evaluate, "open_task", None)  # no model is loaded for fewer members of those that have predicted
        drawn, fewer = evaluated(run, size=3)
    assert drawn == 3
    for split, table in fewer.items():
        assert np.array_equal(table, after[split][: len(table)])
    write_report(run)
    assert {found.state for found in verify_folder(run)} == {"whole"}
    assert evaluated(run, size=4)[0] == 4

    evaluate_other_rows(run, more, tmp_path / "other.jsonl", capsys)


def test_of_more_members_those_that_are_asked_for_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin, rows = Origin("config", "rows"), [Row(str(n), "text", ("a", "b"), n % 2) for n in range(4)]
    splits, config = dict.fromkeys(("validation", "calibration", "test"), rows), RunConfig()
    described = [
        PredictedMember("base", "base"), PredictedMember("mean-field", "mean_field", "adapter", "f00d"),
        *(PredictedMember(f"draw {d}", "mask_draw", "adapter", "f00d", d, {"seed": 0}) for d in range(8)),
        PredictedMember("plain LoRA", "plain", "plain/adapter", "beef"),
    ]

    def lineup(draws: int) -> rounds.Lineup:
        chosen = [one for one in described if one.draw is None or one.draw < draws]
        return rounds.Lineup([Member(None)] * len(chosen), chosen, predictions_from(origin, chosen))

    paths, every = RunPaths(tmp_path), lineup(8)
    logits = np.random.default_rng(0).normal(size=(len(described), 4, 2)).astype(np.float32)
    made = ChoicePredictions(
        tuple(row.id for row in rows), logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), seconds=11.0,
        made_from=every.made_from,
    )

    def kept(*lineups: rounds.Lineup) -> dict[str, Predictions]:
        return evaluate._kept(paths, list(lineups), splits, config, origin, {})[1]

    write_members(paths.predictions, every.described)
    write_predictions(paths.predictions, "validation", made)
    write_predictions(paths.predictions, "test", made)
    fewer = kept(lineup(4))
    assert set(fewer) == {"validation", "test"}, "calibration rows have not been predicted"
    for found in fewer.values():
        assert np.array_equal(found.outputs, made.outputs[[*range(6), 10]]), "plain LoRA stands behind the draws"
        assert found.made_from == lineup(4).made_from and found.seconds == 7.0
    assert set(kept(every)) == {"validation", "test"}
    other = PredictedMember("draw 0", "mask_draw", "adapter", "f00d", 0, {"seed": 1})
    assert not kept(rounds.Lineup([], [*described[:2], other], {})), "masks of another seed"

    monkeypatch.setattr(evaluate, "draws_stop", lambda lineups, made, *rest: made == 2)  # draws that stop are found
    found, there = evaluate._kept(paths, [lineup(2), lineup(4), every], splits, config, origin, {})
    assert [len(one.draws) for one in found] == [4] and there["test"].members == 7
    write_members(paths.predictions, described[:-1])
    assert not kept(lineup(4)), "members.json is not of these predictions"


def evaluate_other_rows(run: Path, config: RunConfig, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Validation, calibration and test from another source: predicted again, unless one of them was trained on."""
    rows = [json.loads(line) for line in Path(config.data.path).read_text().splitlines()]
    prompts = {row.prompt for row in load_splits(config.data).train}
    shown = [row for row in rows if row["prompt"] in prompts]
    (source.parent / "seen").mkdir()
    (source.parent / "new").mkdir()
    for split in ("validation", "calibration", "test"):
        new = [{**row, "prompt": f"{split}, again: {row['prompt']}"} for row in rows[:60]]
        for folder, kept in (("new", new), ("seen", shown if split == "test" else new)):
            text = "".join(f"{json.dumps(row)}\n" for row in kept)
            (source.parent / folder / f"{split}.jsonl").write_text(text)
            (source.parent / folder / "train.jsonl").write_text(text)
    splits = {split: split for split in ("validation", "calibration", "test")}
    own = RunPaths(run)
    for folder, said in (("new", None), ("seen", r"was trained on \d+ of the rows that data\.evaluation gives")):
        elsewhere = {"path": str(source.parent / folder), "splits": splits}
        assert not begin_training(with_values(config, {"data.evaluation": elsewhere}), run)
        if said is None:
            with pytest.raises(RunFolderError, match="was made from other data"):
                write_report(run)
            capsys.readouterr()
            evaluate.evaluate_run(run)
            assert "not those of the training" in capsys.readouterr().err
            write_report(run)
            assert {found.state for found in verify_folder(run)} == {"whole"}
        else:
            with pytest.raises(RunFolderError, match=said):
                evaluate.evaluate_run(run)
    assert own.result.exists()
