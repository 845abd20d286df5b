"""The stages as functions: the command's checks and files, exceptions in place of exit codes, callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loradrop
import pytest
from loradrop import commands

from pipeline.config import load_config
from pipeline.plan.request import Request
from pipeline.run_folder.listeners import Told
from pipeline.run_folder.metrics import Metrics
from pipeline.run_folder.paths import RunPaths, read_status, update_status


def test_a_configuration_reaches_the_command_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, ["adapter.rank=3", "train.max_steps=7", "model.trust_remote_code=true"])
    asked: list[Any] = []
    more: list[Any] = []

    def execute(stage: Any, request: Request) -> int:
        asked.append((stage.name, stage.processes, load_config(request.source), request.overrides, request.run))
        more.append(request.unlabelled)
        return 0

    monkeypatch.setattr(commands, "execute", execute)
    assert loradrop.train(config, tmp_path / "run", ["label=mine"]) == tmp_path / "run" / "adapter"
    loradrop.train(config, tmp_path / "run", callbacks=[loradrop.Callback()])
    loradrop.evaluate(tmp_path / "run")
    assert asked[0] == ("train", "all", config, ("label=mine",), tmp_path / "run")
    assert asked[1][:4] == ("train", "none", config, ("launch.processes=1",))
    assert asked[2][:2] == ("evaluate", "all") and more == [None] * 3
    distilled = loradrop.distill(tmp_path / "run", tmp_path / "more.jsonl", ["train.max_steps=9"])
    assert distilled == tmp_path / "run-distilled" and more[3] == str(tmp_path / "more.jsonl")
    assert asked[3][0] == "distill" and asked[3][3:] == (("train.max_steps=9",), tmp_path / "run")


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [(75, "Stopped", "the same call continues"), (2, "UserError", "train: the"), (1, "StageFailed", "the reason")],
)
def test_exit_codes_become_exceptions(
    code: int, kind: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_status(RunPaths(tmp_path), "train", "failed", "the reason")
    monkeypatch.setattr(commands, "execute", lambda stage, request: code)
    with pytest.raises(getattr(loradrop, kind), match=says) as found:
        loradrop.train(None, tmp_path)
    assert isinstance(found.value, loradrop.LoradropError)


def test_what_is_wrong_is_raised_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(loradrop.ConfigError, match="adapter.rank"):
        loradrop.train(None, tmp_path / "run", ["adapter.rank=0"])
    with pytest.raises(loradrop.RunFolderError, match="holds no run"):
        loradrop.evaluate(tmp_path / "run")
    with pytest.raises(loradrop.RunFolderError, match="holds no run"):
        loradrop.Ensemble.load(tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Heard(loradrop.Callback):
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def on_step(self, step: int, values: Any) -> None:
        self.said.append(("step", step, values["loss"]))

    def on_validation(self, step: int, values: Any) -> None:
        self.said.append(("validation", step, values["nll"]))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.said.append(("checkpoint", step, folder.name, folder.is_dir()))


def test_callbacks_hear_what_metrics_get(tmp_path: Path) -> None:
    heard, metrics = Heard(), Metrics(tmp_path / "metrics.jsonl", enabled=True)
    metrics.send_to([Told([heard, loradrop.Callback()])])
    metrics.write("train", step=1, loss=0.5)
    metrics.write("spike", step=1, loss=0.5)
    metrics.write("validation", step=1, nll=0.25)
    metrics.close()
    assert heard.said == [("step", 1, 0.5), ("validation", 1, 0.25)]


@pytest.mark.slow
def test_a_training_tells_and_fails_with_its_callback(tmp_path: Path, tiny_settings: list[str]) -> None:
    heard, run = Heard(), tmp_path / "run"
    config = load_config(None, [*tiny_settings, "train.max_steps=3", "train.draws=2"])
    adapter = loradrop.train(config, run, callbacks=[heard])
    assert (adapter / "adapter_config.json").is_file()
    assert [one[:2] for one in heard.said if one[0] == "step"] == [("step", n) for n in (1, 2, 3)]
    assert [one[:2] for one in heard.said if one[0] == "validation"] == [("validation", 3)]
    saved = [one[1:] for one in heard.said if one[0] == "checkpoint"]
    assert (2, "step_000002", True) in saved and (3, "step_000003", True) in saved
    before = list(heard.said)
    assert loradrop.train(config, run, callbacks=[heard]) == adapter and heard.said == before  # it is trained

    class Broken(loradrop.Callback):
        def on_step(self, step: int, values: Any) -> None:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        loradrop.train(config, tmp_path / "other", callbacks=[Broken()])
    assert read_status(RunPaths(tmp_path / "other"))["train"]["state"] == "failed"
