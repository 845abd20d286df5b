"""The order of a comparison without its processes: what is started, what a refusal or a failure leads to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoConfig

from pipeline.config import RunConfig, load_config
from pipeline.data.rows import Row
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, ConfigError, StageFailed
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, publish_folder, write_json, write_text
from pipeline.plan.methods import refused_methods
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.comparison import REFUSALS, choose, outcome, read_comparison, with_loss
from pipeline.run_folder.paths import Folders, RunPaths, update_status
from pipeline.run_folder.predictions import ChoicePredictions, write_predictions
from pipeline.stages import compare
from pipeline.support.tiny import ENCODERS

METHODS = ("none", "dropkey", "hiddencut")


class Processes:
    """Stands in for what `compare` starts: a training leaves the run folder that a real one leaves."""

    def __init__(self, codes: dict[str, int], refused: dict[str, str]) -> None:
        self.codes, self.refused, self.started = codes, refused, list[str]()

    def start(self, stage: str, config: RunConfig, folders: Folders) -> int:
        if stage == "train":
            return self.train(config, folders)
        self.started.append(stage)
        if stage == compare.CHECK:
            write_json(folders.run / REFUSALS, self.refused)
        return EXIT_OK

    def train(self, config: RunConfig, folders: Folders) -> int:
        paths, code = RunPaths(folders.run), self.codes.get(folders.run.name, EXIT_OK)
        self.started.append(folders.run.name)
        if code == EXIT_OK:
            nll = config.train.learning_rate
            lines = [{"kind": "train", "step": 1, "seconds": 2.0}, {"kind": "validation", "step": 1, "nll": nll}]
            write_text(paths.metrics, "".join(json.dumps(line) + "\n" for line in lines))
            origin = Origin(config.training_sha256(), "rows")

            def fill(folder: Path) -> None:
                write_text(folder / ADAPTER_WEIGHTS, folders.run.name)
                write_json(folder / MANIFEST, {"step": 1, "validation_nll": nll, "origin": origin.as_dict()})

            publish_folder(paths.adapter, fill)
            write_predictions(paths.predictions, "validation", ChoicePredictions(("a", "b"), said(nll)))
            update_status(paths, "train", "done", config_sha256=origin.config_sha256)
        elif code == EXIT_FAILED:
            update_status(paths, "train", "failed", "the loss is nan")
        return code


def said(nll: float) -> np.ndarray:
    """One member that gives the first of two choices exp(-nll) in both rows."""
    logs = np.array([-nll, np.log(-np.expm1(-nll))])
    return np.tile(logs, (1, 2, 1))


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, int], refused: dict[str, str] | None = None
) -> tuple[int, list[str], dict[str, str]]:
    """(exit code, what was started, training -> state)."""
    processes = Processes(codes, refused or {})
    monkeypatch.setattr(compare, "start", processes.start)
    monkeypatch.setattr(compare, "print_comparison", lambda *arguments: None)
    rows = [Row(name, name, ("x", "y"), 0) for name in ("a", "b")]
    monkeypatch.setattr(compare, "load_splits", lambda data: SimpleNamespace(validation=rows))
    config = load_config(None, [f"compare.methods=[{','.join(METHODS)}]", "compare.learning_rates=[0.1, 0.2]"])
    code = compare.run_comparison(config, Folders(tmp_path / "x"))
    found = read_comparison(RunPaths(tmp_path / "x-compare")) or []
    return code, processes.started, {one.name: one.state for one in found}


def names(*methods: str) -> list[str]:
    return [f"{method}-lr{rate}" for method in methods for rate in ("0.1", "0.2")]


def test_a_comparison_trains_everything_then_evaluates_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, started, states = run(tmp_path, monkeypatch, {})
    assert (code, started) == (EXIT_OK, ["method_check", *names(*METHODS), "evaluate", "report"])
    assert set(states.values()) == {"done"}
    chosen = [one.name for one in read_comparison(RunPaths(tmp_path / "x-compare")) or [] if one.chosen]
    assert chosen == [f"{method}-lr0.1" for method in METHODS]


def test_a_refused_method_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, started, states = run(tmp_path, monkeypatch, {}, {"dropkey": "no attention interface"})
    assert (code, started[1:5]) == (EXIT_USER, names("none", "hiddencut"))
    assert [states[name] for name in names("dropkey")] == ["refused", "refused"]
    assert "left out: dropkey: no attention interface" in capsys.readouterr().err


def test_a_failed_training_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, started, states = run(tmp_path, monkeypatch, {"none-lr0.2": EXIT_FAILED, "dropkey-lr0.1": EXIT_USER})
    assert (code, started[1:7]) == (EXIT_FAILED, names(*METHODS))
    assert [name for name, state in states.items() if state == "failed"] == ["none-lr0.2", "dropkey-lr0.1"]
    errors = {one.name: one.error for one in read_comparison(RunPaths(tmp_path / "x-compare")) or []}
    assert errors["none-lr0.2"] == "the loss is nan" and "ended with exit code 2" in errors["dropkey-lr0.1"]


def test_a_stop_ends_the_comparison_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, started, states = run(tmp_path, monkeypatch, {"dropkey-lr0.1": EXIT_STOPPED})
    assert (code, started[1:]) == (EXIT_STOPPED, [*names("none"), "dropkey-lr0.1"])
    assert list(states.values()) == ["done", "done", *["waiting"] * 4]


def test_without_any_training_there_is_nothing_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageFailed, match=r"the first, none-lr0\.1, said: the loss is nan"):
        run(tmp_path, monkeypatch, dict.fromkeys(names(*METHODS), EXIT_FAILED))


def test_the_time_left_is_that_of_the_trainings_so_far() -> None:
    clock = compare.Clock()
    assert clock.left(3) == ""
    clock.add(60.0, 10)
    clock.add(180.0, 30)  # three times as long, and as many steps
    assert clock.left(60) == " (about 6 min of training left)" and clock.left(0) == ""


@pytest.mark.parametrize(("family", "refused"), [("deberta-v2", {"dropkey", "hiddenkey"}), ("bert", set())])
def test_what_a_model_cannot_honour_is_found_without_its_weights(
    tmp_path: Path, family: str, refused: set[str]
) -> None:
    AutoConfig.for_model(**ENCODERS[family]).save_pretrained(tmp_path)  # no weights, no tokenizer
    config = load_config(None, [
        f"model.path={tmp_path}", f"model.attention={'eager' if refused else 'sdpa'}",
        "compare.methods=[none, dropkey, hiddenkey, lora_dropout, {name: x, adapter: {target_modules: [nothing]}}, "
        "{name: y, adapter: {target_modules: [nothing]}, train: {draws: 2}}]",
    ])
    found = refused_methods(config)
    assert set(found) == refused | {"x", "y"} and "matches no linear layer" in found["x"] == found["y"]
    assert all(family in found[method] for method in refused)
    if refused:
        with pytest.raises(ConfigError, match=r"model\.attention"):  # no method is to blame for this
            refused_methods(load_config(None, [f"model.path={tmp_path}"]))


def test_the_outcome_survives_a_second_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again starts the check no more and finds the same figures."""
    run(tmp_path, monkeypatch, {})
    before = read_comparison(RunPaths(tmp_path / "x-compare")) or []
    code, started, _ = run(tmp_path, monkeypatch, {})
    assert code == EXIT_OK and "method_check" not in started
    after = read_comparison(RunPaths(tmp_path / "x-compare")) or []
    fresh = [outcome(replace(one, validation_loss=None), tmp_path / "x-compare") for one in before]
    rows = [Row(name, name, ("x", "y"), 0) for name in ("a", "b")]
    assert after == before == choose([with_loss(one, tmp_path / "x-compare", rows, "nll_scaled") for one in fresh])
