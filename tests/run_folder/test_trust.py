"""Code that comes with a model runs where the command line, or the user's own file, says so; no run folder can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tune_stub import write_data

from pipeline.cli import main
from pipeline.config import RunConfig, dump_config, load_config
from pipeline.distributed import launcher
from pipeline.errors import ConfigError, RunFolderError
from pipeline.files import read_json, write_json, write_text
from pipeline.model.kind import model_kind
from pipeline.model.load import load_base
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_new, resolve_saved
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import Folders, RunPaths, load_saved, read_saved, without_trust
from pipeline.stages import processes, run, search
from pipeline.stages.__main__ import main as stage_process
from pipeline.stages.table import STAGES, TRUST
from pipeline.support.tiny import tiny_decoder, tiny_tokenizer
from tune.__main__ import main as tune_main
from tune.cluster import Capacity
from tune.ledger import Ledger
from tune.search import describe, identity
from tune.search import search as search_in
from tune.space import load_arms
from tune.study import Study

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({proof!r}).write_text("it ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
WORD = "model.trust_remote_code=true"


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the model's code writes; `tmp_path/model` is the model, `tmp_path/run` a run folder of it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    proof, model = tmp_path / "proof", tmp_path / "model"
    tiny_decoder().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_json(model / "config.json", {**read_json(model / "config.json"), "model_type": "own", "auto_map": auto_map})
    (model / "own.py").write_text(CODE.format(proof=str(proof)))
    write_data(tmp_path / "rows.jsonl")
    claim(tmp_path / "run", "run")
    saved = [f"model.path={model}", f"data.path={tmp_path / 'rows.jsonl'}", "model.quantization=none", WORD]
    write_text(tmp_path / "run" / "config.yaml", dump_config(load_config(None, saved)))
    return proof


def saved_config(proof: Path) -> RunConfig:
    return load_saved(proof.with_name("run") / "config.yaml")


def test_a_run_folder_does_not_say_whose_code_runs(proof: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A whole process of a stage, once without and once with the word of the command that starts it."""
    command = ["method_check", "--run-dir", str(proof.with_name("run"))]
    assert stage_process(command) == 2
    said = capfd.readouterr().err
    assert "model.trust_remote_code = False" in said and "never taken from a run folder" in said
    assert not proof.exists()
    assert stage_process([*command, TRUST]) == 0
    assert proof.exists()


def test_nor_does_the_file_that_a_search_reads(proof: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The driver of a search, in this process up to where it would start Ray."""
    seen: list[RunConfig] = []

    def note(config: RunConfig, *_: Any) -> Any:
        seen.append(config)
        raise ConfigError("test", None, "seen enough")

    words = ["--config", str(proof.with_name("run") / "config.yaml"), "--folder", str(proof.with_name("s"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.search.search", note)
        assert [tune_main(words), tune_main([*words, TRUST])] == [2, 2]
    assert [config.model.trust_remote_code for config in seen] == [False, True]


@pytest.mark.parametrize("stage", ["evaluate", "report", "export", "data"])
def test_the_command_line_says_it_to_every_later_stage(proof: Path, stage: str) -> None:
    folder = str(proof.with_name("run"))
    assert not resolve_saved(Request(run_dir=folder), stage).model.trust_remote_code
    assert resolve_saved(Request(run_dir=folder, overrides=(WORD,)), stage).model.trust_remote_code
    with pytest.raises(ConfigError, match=r"model\.path"):
        resolve_saved(Request(run_dir=folder, overrides=("model.path=x",)), stage)


def test_a_file_of_the_users_own_says_it_and_one_of_a_run_folder_does_not(proof: Path) -> None:
    own = proof.with_name("mine.yaml")
    own.write_text(proof.with_name("run").joinpath("config.yaml").read_text())
    assert resolve_new(Request(source=str(own)), "train").model.trust_remote_code
    foreign = Request(source=str(proof.with_name("run") / "config.yaml"))
    assert not resolve_new(foreign, "train").model.trust_remote_code


def test_hosts_are_not_taken_from_a_run_folder_either(proof: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A host's name is a word of an ssh command line: `-oProxyCommand=…` would run here."""
    saved, hosts = proof.with_name("run") / "config.yaml", str(proof.with_name("rows.jsonl"))
    write_text(saved, yaml.safe_dump({**read_saved(saved), "launch": {"hostfile": hosts, "processes": 2}}))
    launch = resolve_saved(Request(run_dir=str(saved.parent)), "evaluate").launch
    assert (launch.hostfile, launch.processes) == (None, 2)
    assert "launch.hostfile" in capsys.readouterr().err
    given = Request(run_dir=str(saved.parent), overrides=(f"launch.hostfile={hosts}",))
    assert resolve_saved(given, "evaluate").launch.hostfile == hosts


@pytest.mark.parametrize("tree", [{}, {"model": None}, {"model": [1]}, {"model": {"path": "x"}, "launch": "y"}])
def test_what_has_no_such_words_stays_as_it_is(tree: dict[str, Any]) -> None:
    assert without_trust(tree) == tree


def test_the_word_is_passed_on_to_every_process_that_loads_the_model(
    proof: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: dict[str, list[str]] = {}

    def note(stage: str, program: list[str], *_: Any) -> int:
        commands[stage] = program
        return 0

    monkeypatch.setattr(processes, "run_world_stage", note)
    monkeypatch.setattr(processes, "check_adapter", lambda *_: None)  # there is none
    one: Callable[..., int] = lambda command, log, folder, stage: note(stage, command)  # noqa: E731
    monkeypatch.setattr(processes, "run_stage", one)
    monkeypatch.setattr(search, "run_stage", one)
    folders = Folders(proof.with_name("run"))
    for trusted in (False, True):
        config = saved_config(proof).trusting(trusted)
        for stage in ("train", "pack", "evaluate", "report", "export", "method_check", "predict_rows"):
            processes.start(stage, config, folders)
        search.run_search(config, folders)
        loading = {"train", "pack", "evaluate", "export", "method_check", "predict_rows", "search"}
        told = {stage for stage, command in commands.items() if TRUST in command}
        assert told == (loading if trusted else set())
    command = launcher.launcher_command(commands["train"], folders.run, config.launch)
    assert command[command.index("--module") :][1:4] == ["pipeline.stages", "train", TRUST]
    assert {name for name, stage in STAGES.items() if stage.loads_model} | {"search"} == told


def test_values_that_a_search_folder_holds_do_not_say_it(proof: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """search.json and the ledger come with the folder, too."""
    config = saved_config(proof)
    foreign = {"model.trust_remote_code": True, "adapter.rank": 4}
    folders, trained = Folders(proof.with_name("new")), []

    def start(stage: str, chosen: RunConfig, _: Folders) -> int:
        trained.append(chosen)
        return 75

    monkeypatch.setattr(run, "run_search", lambda *_: 0)
    monkeypatch.setattr(run, "start", start)
    for key, value in (("model.trust_remote_code", True), ("launch.hostfile", "hosts"), ("train.deepspeed", "ds.json")):
        write_json(folders.search / "search.json", {"best_config": {"adapter.rank": 4, key: value}})
        with pytest.raises(RunFolderError, match=rf"chooses {key}, which no search varies"):
            run.run_line(config, folders)
        chosen = {"best_config": {}, "plain": {"best_config": {key: value}}}
        write_json(folders.search / "search.json", chosen)
        with pytest.raises(RunFolderError, match=rf"chooses {key}, which no search varies"):
            run.run_line(config, folders)
    write_json(folders.search / "search.json", {"best_config": {"adapter.rank": 4}})
    assert run.run_line(config, folders) == 75
    assert (trained[0].adapter.rank, trained[0].model.trust_remote_code) == (4, False)

    ledger = Ledger(folders.search / "ledger.jsonl")
    arms = load_arms(config)
    ledger.open_search(identity(config, arms), describe(arms))
    ledger.append("start", trial="trial_000", index=0, values=foreign, config_sha256="x")
    capacity = Capacity(concurrent=1, workers=1, gpus=0)
    for trusted in (False, True):
        study = Study(config.trusting(trusted), load_arms(config), ledger, folders.search, capacity)
        assignment = study.next_assignment()
        assert assignment is not None
        assert yaml.safe_load(assignment.config)["model"]["trust_remote_code"] is trusted
    with pytest.raises(RunFolderError, match=r"gives trial_000 a value of model\.trust_remote_code"):
        search_in(config, folders.search)


def test_a_model_with_code_of_its_own_names_the_key(proof: Path) -> None:
    config = saved_config(proof).model
    assert model_kind(config) == "causal" and not proof.exists()
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code.*comes with code of its own.*command line"):
        load_base(config, torch.device("cpu"))
    assert not proof.exists()
    trusted = config.model_copy(update={"trust_remote_code": True})
    assert type(load_base(trusted, torch.device("cpu")).model).__name__ == "OwnModel" and proof.exists()


def test_whose_code_runs_is_no_part_of_what_is_trained(proof: Path) -> None:
    config = saved_config(proof)
    assert config.result_sha256() == config.trusting(True).result_sha256()
    assert config.sha256() != config.trusting(True).sha256()


@pytest.mark.slow
def test_a_whole_command_with_the_word_runs_the_code(proof: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Training of a model with code of its own, then its evaluation from the folder, which holds the word."""
    new = proof.with_name("new")
    settings = [f"model.path={proof.with_name('model')}", f"data.path={proof.with_name('rows.jsonl')}",
                "model.quantization=none", "data.train_rows=16", "data.validation_rows=8", "data.calibration_rows=8",
                "data.test_rows=8", "data.max_tokens=64", "train.max_steps=1", "train.global_batch=4",
                "train.micro_batch=4", "ensemble.size=2", "adapter.rank=2", "launch.processes=1"]
    assert main(["train", "--run-dir", str(new), *settings]) == 2
    assert "comes with code of its own" in capfd.readouterr().err and not proof.exists()
    assert main(["train", "--run-dir", str(new), *settings, WORD]) == 0
    assert proof.exists() and json.loads((new / "status.json").read_text())["train"]["state"] == "done"
    proof.unlink()
    assert yaml.safe_load(RunPaths(new).config.read_text())["model"]["trust_remote_code"] is True
    assert main(["evaluate", "--run-dir", str(new)]) == 2 and not proof.exists()
    assert "never taken from a run folder" in capfd.readouterr().err
    assert main(["evaluate", "--run-dir", str(new), WORD]) == 0 and proof.exists()
    assert main(["report", "--run-dir", str(new), WORD]) == 0
    assert main(["export", "--run-dir", str(new), WORD]) == 0
