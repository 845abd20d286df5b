"""Messages about commands, machines and what runs on them that no other test reaches (tests/messages.py)."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import build_config, load_config
from pipeline.distributed import devices, launcher, world
from pipeline.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_USER, LoradropError, StageFailed, Stopped, UserError
from pipeline.interface.loradrop.commands import _failure
from pipeline.plan.preflight import check_inputs, check_model_path
from pipeline.plan.request import Request
from pipeline.plan.resolve import resolve_new, resolve_saved
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.setup.install import installation_lock
from pipeline.setup.venv import Environment
from pipeline.stages import distill
from tune import cluster, search
from tune.dimensions import Space
from tune.ledger import Ledger
from tune.space import Arm


def test_what_is_looked_at_before_a_start(tmp_path: Path) -> None:
    for overrides, said in (
        ([f"adapter.init_from={tmp_path}"], "holds no adapter_config.json. Give the folder of a PEFT adapter."),
        (["launch.hostfile=nowhere"], "launch.hostfile = 'nowhere': does not exist. Give a DeepSpeed hostfile."),
        (["adapter.kind=adalora", "train.deepspeed=zero3"],
         "adapter.kind = 'adalora': cannot be trained under zero3, which is ZeRO-3: importance and orthogonality need"),
    ):
        with pytest.raises(UserError) as found:
            check_inputs(load_config(None, overrides))
        assert said in str(found.value)
    with pytest.raises(UserError, match="model.path = .*: holds no config.json. Give the folder of a transformers"):
        check_model_path(str(tmp_path))


def test_settings_that_a_stage_does_not_read(tmp_path: Path) -> None:
    unread = {"adapter.method=": "Name them in compare.methods."}
    with pytest.raises(UserError, match="adapter.method=none: is not read by compare: each method has its own. Name"):
        resolve_new(Request(overrides=("adapter.method=none",)), "compare", unread=unread)
    with pytest.raises(UserError, match="config.yaml: does not exist. Train first, or give the folder of a run"):
        resolve_saved(Request(run_dir=str(tmp_path / "run")), "report")
    with pytest.raises(UserError, match="--unlabelled = 'nowhere.jsonl': is no file. Give rows as the run has them"):
        distill._unlabelled("nowhere.jsonl")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "accelerator_memory", lambda: [("GPU", 1), ("GPU", 1)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-7a")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES = '0,GPU-7a': must be numbers.*Give the indices of"):
        devices.check_processes(1)


class Taken:
    """A socket on a machine without a free port."""

    def __enter__(self) -> Taken:
        return self

    def __exit__(self, *_: object) -> None: ...

    def bind(self, address: object) -> None:
        raise OSError(98, "Address already in use")


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Taken)
    with pytest.raises(UserError, match="launch.master_port = 0: found no free port. Set one that is free"):
        launcher.free_port()


def test_a_folder_that_a_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "gather_objects", lambda own: [own, own if isinstance(own, str) else ("node2", False)])
    monkeypatch.setattr(world, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(UserError, match=r"--run-dir = .*: is not the same folder on node2. Give a folder on a file"):
        world.require_shared_folder(tmp_path)
    assert not any(tmp_path.iterdir())


def test_an_installation_that_is_not_ones_own(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="pyproject.toml: cannot be written .*Clone the repository to a folder of your"),
        installation_lock(Environment(tmp_path)),
    ):
        pass


def test_what_a_stage_from_python_ends_with(tmp_path: Path) -> None:
    update_status(RunPaths(tmp_path), "train", "failed", "data.path = 'x': does not exist.")
    for code, kind, said in (
        (EXIT_USER, UserError, "train: data.path = 'x': does not exist."),
        (EXIT_FAILED, StageFailed, "train failed: data.path = 'x': does not exist."),
        (EXIT_STOPPED, Stopped, "train was stopped; the same call continues"),
    ):
        found = _failure("train", code, tmp_path)
        assert type(found) is kind and isinstance(found, LoradropError) and str(found) == said


def test_a_cluster_that_wants_another_token(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(address: str) -> None:
        raise ray.exceptions.AuthenticationError("no")

    monkeypatch.setattr(cluster, "_knock", refuse)
    with pytest.raises(UserError, match="RAY_ADDRESS = 'head:6379': is a cluster that asks for its token"):
        cluster._attach("head:6379")


def test_trials_that_a_search_does_not_know(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    start = {"index": 0, "values": {"launch.hostfile": "x"}, "config_sha256": "ab"}
    ledger.append("start", trial="plain_000", arm="plain", **start)
    arm = Arm("method", build_config({}), Space("space.yaml", {}), 1)
    with pytest.raises(UserError, match="holds plain_000 of something that this search does not tune. Search in"):
        search._refuse_strange(ledger, [arm])
    plain = Arm("plain", build_config({}), Space("space.yaml", {}), 1)
    with pytest.raises(UserError, match="gives plain_000 a value of launch.hostfile, which this search does not vary"):
        search._refuse_strange(ledger, [arm, plain])


class Manager:
    """lm-eval's TaskManager with one task of each kind, which are made from their own names."""

    all_tasks = ("other", "sampled", "broken")

    def __init__(self, include_path: str | None) -> None: ...

    def load(self, names: list[str]) -> Any:
        if names == ["broken"]:
            raise ConnectionError("no\nnetwork")
        kind = "generate_until" if names == ["sampled"] else "multiple_choice_with_marks"
        settings = {"generation_kwargs": {"do_sample": True}, "num_fewshot": 0}
        return {"tasks": {names[0]: SimpleNamespace(
            OUTPUT_TYPE=kind, get_config=settings.get, set_fewshot_seed=lambda seed: None,
        )}}


@pytest.mark.parametrize(
    ("name", "include", "said"),
    [
        ("other", "nowhere", "--include-path = 'nowhere': is no folder. Give a folder with task files (.yaml)."),
        ("other", None, "--tasks = 'other': asks for multiple_choice_with_marks, and members answer multiple_choice, "),
        ("sampled", None, "samples its texts, or searches with beams, and members write greedily. Set do_sample to"),
        ("unknown", None, "--tasks = 'unknown': is no task of lm-eval, and no task file. See `lm-eval ls tasks`"),
        ("broken", None, "--tasks = 'broken': cannot be loaded (ConnectionError: no network). Check the network, or"),
    ],
)
def test_tasks_of_the_harness(name: str, include: str | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval, whose import takes seconds: its two names that the module takes are stand-ins."""
    for module, names in (
        ("lm_eval", {}), ("lm_eval.evaluator", {"evaluate": None}), ("lm_eval.tasks", {"TaskManager": Manager}),
        ("pipeline.harness.model", {"MembersLM": None}),
    ):
        stand_in = ModuleType(module)
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = find_spec("pipeline.harness.tasks")
    assert spec is not None and spec.loader is not None
    tasks = module_from_spec(spec)  # which is put nowhere: others find the real one
    spec.loader.exec_module(tasks)
    with pytest.raises(UserError) as found:
        tasks.Tasks([name], include, None)
    assert said in str(found.value)
