"""The order of a comparison without its processes: what is started, what a refusal or a failure leads to."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from pipeline.config import RunConfig, load_config
from pipeline.data.rows import Row
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, ConfigError, StageFailed
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, publish_folder, read_json, write_json, write_text
from pipeline.plan.methods import refused_methods
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.comparison import REFUSALS, Training, choose, outcome, read_comparison, with_loss
from pipeline.run_folder.paths import Folders, RunPaths, update_status
from pipeline.run_folder.predictions import ChoicePredictions, write_predictions
from pipeline.stages import compare
from pipeline.stages.processes import begin_training
from pipeline.support.tiny import ENCODERS

METHODS = ("none", "dropkey", "hiddencut")


class Processes:
    """Stands in for what `compare` starts: a training leaves the run folder that a real one leaves."""

    def __init__(self, codes: dict[str, int], refused: dict[str, str]) -> None:
        self.codes, self.refused, self.started = codes, refused, list[str]()

    def start(self, stage: str, config: RunConfig, folders: Folders) -> int:
        if stage == "train":
            return self.train(config, folders.run)
        self.started.append(stage)
        if stage == compare.PACK:
            return self.pack(folders.run)
        if stage == compare.CHECK:
            write_json(folders.run / REFUSALS, self.refused)
        return EXIT_OK

    def pack(self, folder: Path) -> int:
        """As the stage does: a failure disturbs nobody, a stop and a crash (code 9) end it where they happen."""
        for name in read_json(folder / "pack.json")["runs"]:
            paths = RunPaths(folder / name)
            code = 9 if self.codes.get("pack") == paths.root.name else self.train(load_config(paths.config), paths.root)
            if code in (9, EXIT_STOPPED):
                return EXIT_FAILED if code == 9 else code
        return EXIT_OK

    def train(self, config: RunConfig, run: Path) -> int:
        paths, code = RunPaths(run), self.codes.get(run.name, EXIT_OK)
        self.started.append(run.name)
        begin_training(config, run)
        if code == EXIT_OK:
            nll = config.train.learning_rate
            lines = [{"kind": "train", "step": 1, "seconds": 2.0}, {"kind": "validation", "step": 1, "nll": nll}]
            write_text(paths.metrics, "".join(json.dumps(line) + "\n" for line in lines))
            origin = Origin(config.training_sha256(), "rows")

            def fill(folder: Path) -> None:
                write_text(folder / ADAPTER_WEIGHTS, run.name)
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[str, Any], refused: dict[str, str] | None = None,
    packed: bool = False, methods: str = ",".join(METHODS),
) -> tuple[int, list[str], dict[str, str]]:
    """(exit code, what was started, training -> state)."""
    monkeypatch.setattr(compare, "accelerator_memory", list)
    processes = Processes(codes, refused or {})
    monkeypatch.setattr(compare, "start", processes.start)
    monkeypatch.setattr(compare, "print_comparison", lambda *arguments: None)
    rows = [Row(name, name, ("x", "y"), 0) for name in ("a", "b")]
    monkeypatch.setattr(compare, "load_splits", lambda data: SimpleNamespace(validation=rows))
    settings = [f"compare.methods=[{methods}]", "compare.learning_rates=[0.1, 0.2]"]
    config = load_config(None, [*settings, *([] if packed else ["launch.processes=1"])])
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


def test_trainings_that_can_share_a_base_are_one_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "{name: ada, adapter: {method: none, kind: adalora, adalora: {warmup: 0, final: 1}}}"
    code, started, states = run(tmp_path, monkeypatch, {}, packed=True, methods=f"none, {other}, dropkey")
    pack = ["pack", *names("none", "dropkey"), *names("ada")]
    assert (code, started) == (EXIT_OK, ["method_check", *pack, "evaluate", "report"])
    assert set(states.values()) == {"done"}
    packed = [one.name for one in read_comparison(RunPaths(tmp_path / "x-compare")) or [] if one.packed]
    assert packed == names("none", "dropkey")
    code, started, _ = run(tmp_path, monkeypatch, {}, packed=True, methods=f"none, {other}, dropkey, hiddencut")
    assert started[:4] == ["method_check", "pack", *names("hiddencut")], "what was done before is trained again"
    packed = [one.name for one in read_comparison(RunPaths(tmp_path / "x-compare")) or [] if one.packed]
    assert packed == names("none", "dropkey", "hiddencut")


def test_a_failure_in_a_pack_is_that_training_s_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, started, states = run(tmp_path, monkeypatch, {"none-lr0.2": EXIT_FAILED}, packed=True)
    assert (code, started[1:8]) == (EXIT_FAILED, ["pack", *names(*METHODS)])
    assert [name for name, state in states.items() if state == "failed"] == ["none-lr0.2"]
    assert "the loss is nan" in {one.error for one in read_comparison(RunPaths(tmp_path / "x-compare")) or []}


def test_what_a_pack_that_died_did_not_get_to_is_trained_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, started, states = run(tmp_path, monkeypatch, {"pack": "dropkey-lr0.1"}, packed=True)
    assert (code, started[1:]) == (
        EXIT_OK, ["pack", *names("none"), *names("dropkey", "hiddencut"), "evaluate", "report"]
    )
    assert set(states.values()) == {"done"}


def test_a_stop_ends_a_pack_and_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, started, states = run(tmp_path, monkeypatch, {"dropkey-lr0.1": EXIT_STOPPED}, packed=True)
    assert (code, started[1:]) == (EXIT_STOPPED, ["pack", *names("none"), "dropkey-lr0.1"])
    assert list(states.values()) == ["done", "done", *["waiting"] * 4]
    code, started, states = run(tmp_path, monkeypatch, {}, packed=True)
    assert (code, started[1:6]) == (EXIT_OK, ["pack", *names("dropkey", "hiddencut")])
    assert set(states.values()) == {"done"}


def test_what_a_pack_has_finished_is_in_compare_json_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = Processes.train

    def train(self: Processes, config: RunConfig, run: Path) -> int:
        if self.started[-1] == "none-lr0.1":  # the first has ended
            patience = time.monotonic() + 30
            while not seen and time.monotonic() < patience:
                time.sleep(0.01)
                found = read_comparison(RunPaths(tmp_path / "x-compare")) or []
                seen.extend(one.name for one in found if one.state == "done")
        return original(self, config, run)

    monkeypatch.setattr(compare, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(Processes, "train", train)
    code, _, _ = run(tmp_path, monkeypatch, {}, packed=True)
    assert (code, seen) == (EXIT_OK, ["none-lr0.1"])


@pytest.mark.parametrize("settings", [
    ["launch.processes=2"], ["launch.hostfile=hosts"], ["launch.nodes=2", "launch.processes=1", "launch.master_addr=a",
                                                       "launch.master_port=1"],
])
def test_processes_that_were_asked_for_train_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    config = load_config(None, settings)
    waiting = [Training("a", "none", {}, 0, "x"), Training("b", "none", {}, 0, "x")]
    monkeypatch.setattr(compare, "accelerator_memory", list)
    own = [config, config]
    assert compare._Trainings(waiting, own, tmp_path, config).packable() == []
    one_process = RunConfig()
    assert compare._Trainings(waiting, own, tmp_path, one_process).packable() == [0, 1]
    monkeypatch.setattr(compare, "accelerator_memory", lambda: [("gpu", 1), ("gpu", 1)])
    assert compare._Trainings(waiting, own, tmp_path, one_process).packable() == []


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
