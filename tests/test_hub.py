"""The hub out of reach: found out once, in one request, and said in one sentence; the cache keeps working."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT
from huggingface_hub import constants
from huggingface_hub.utils import _http

from pipeline import hub
from pipeline.cli import main
from pipeline.config.model import ModelConfig
from pipeline.errors import EXIT_USER, SetupError
from pipeline.model.kind import model_kind

CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A hub that refuses connections, an empty cache, and a client that may not try again."""

    def waits(_: float) -> None:
        raise AssertionError("the client tries again")

    for name in ("HF_HUB_OFFLINE", "LORADROP_HUB_UNREACHABLE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_http.time, "sleep", waits)
    for found in (hub.unreachable, hub.tell_of_cache):
        found.cache_clear()
    yield monkeypatch
    for found in (hub.unreachable, hub.tell_of_cache):
        found.cache_clear()


def cached_model(cache: Path, name: str) -> Path:
    """The folder of a snapshot in a hub cache."""
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (snapshot := entry / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return snapshot


def test_a_closed_hub_is_one_sentence_before_anything_starts(
    endpoint: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    endpoint.chdir(tmp_path)
    assert main(["train", "model.path=owner/name", "--run-dir", "run"]) == EXIT_USER
    (said,) = capfd.readouterr().err.splitlines()
    assert "model.path = 'owner/name'" in said and CLOSED in said and "HF_ENDPOINT" in said
    assert not Path("run").exists()


def test_a_hub_that_never_answers_is_left_after_one_wait(endpoint: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.listen(8)
        endpoint.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        endpoint.setattr(hub, "ANSWER_SECONDS", 0.2)
        assert hub.unreachable()
        assert hub.unreachable() is hub.unreachable() and os.environ["HF_HUB_OFFLINE"] == "1"
        silent.settimeout(1.0)
        silent.accept()[0].close()
        silent.settimeout(0.05)
        with pytest.raises(TimeoutError):  # it was asked once
            silent.accept()


def test_a_name_that_nobody_can_look_up_in_time_counts_as_no_answer(endpoint: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    class Stuck:
        def head(self, *_: object, **__: object) -> None:
            release.wait()

    endpoint.setattr("huggingface_hub.utils.get_session", Stuck)
    endpoint.setattr(hub, "ANSWER_SECONDS", -0.9)
    assert "does not answer" in hub.ask(CLOSED)
    release.set()


def test_a_hub_that_answers_is_used(endpoint: pytest.MonkeyPatch) -> None:
    endpoint.setattr(hub, "ask", lambda _: "")
    assert hub.unreachable() == "" and not constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == ""
    hub.check_model_at_hand("owner/name", None)


def test_a_filled_cache_needs_no_hub(
    endpoint: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (cached_model(tmp_path / "cache", "owner/name") / "config.json").write_text('{"model_type": "bert"}')
    for _ in range(2):
        hub.check_model_at_hand("owner/name", None)
    assert capfd.readouterr().err.count("come from its cache") == 1
    with pytest.raises(SetupError, match="another/name.*out of reach"):
        hub.check_model_at_hand("another/name", None)
    for local in ("embedded:smollm2-135m-instruct", str(tmp_path), "./none", "~/none"):
        hub.check_model_at_hand(local, None)


def test_the_users_own_wish_to_stay_offline_asks_nobody(endpoint: pytest.MonkeyPatch) -> None:
    endpoint.setattr(constants, "HF_HUB_OFFLINE", True)
    endpoint.setattr(hub, "ask", lambda _: pytest.fail("asked"))
    assert hub.unreachable() == "HF_HUB_OFFLINE is set"
    with pytest.raises(SetupError, match="HF_HUB_OFFLINE is set"):
        model_kind(ModelConfig(path="owner/name"))


@pytest.mark.slow
def test_models_load_from_the_cache_and_data_sets_are_refused_at_once(tmp_path: Path, tiny_folder: Path) -> None:
    snapshot = cached_model(tmp_path / "hub", "owner/name")
    for file in (tiny_folder / "model").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    code = """
import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: exit("the client tries again")
import torch
from pipeline.config import DataConfig
from pipeline.config.model import ModelConfig
from pipeline.data.splits import load_splits
from pipeline.errors import UserError
from pipeline.model.load import load_base
print(load_base(ModelConfig(path="owner/name", quantization="none"), torch.device("cpu")).identity.resolved)
for load in (lambda: load_base(ModelConfig(path="owner/none"), torch.device("cpu")),
             lambda: load_splits(DataConfig(path="owner/rows"))):
    try:
        load()
    except UserError as error:
        print(error)
"""
    environment = {**os.environ, "HF_ENDPOINT": CLOSED, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": ""}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, model, data = done.stdout.splitlines()
    assert loaded == "owner/name"
    assert "'owner/none'" in model and "out of reach" in model and "HF_ENDPOINT" in model
    assert "'owner/rows'" in data and "out of reach" in data and "HF_ENDPOINT" in data
    assert done.stderr.count("come from its cache") == 1
