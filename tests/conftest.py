"""Shared fixtures. One thread: the machines of CI have two cores and spinning threads cost more than they give."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipeline.config import RunConfig, dump_config, load_config
from pipeline.files import write_text
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths
from pipeline.support.tiny import write_tiny_data, write_tiny_model

settings.register_profile("shared-machine", deadline=None, max_examples=50)
settings.load_profile("shared-machine")
torch.set_num_threads(1)


LONGEST = (
    "interface/test_notebook", "stages/test_line", "tune/test_listeners", "training/test_faults", "tune/test_search",
    "training/test_training", "stages/test_encoder_line", "benchmarks/test_cases", "adapters/sites/test_site_models",
)
"""Modules that take minutes begin first: at the end of a run nobody waits for one of them alone."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Read by tests/gpu; `bash launch.sh test --gpu` gives both."""
    group = parser.getgroup("loradrop")
    group.addoption("--device", default="cpu", help="of tests marked gpu: cpu, which is a small form, or cuda")
    group.addoption("--results", type=Path, metavar="FILE", help="keep what passes of tests/gpu, and leave it out")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, in this order; all others stay as they are."""
    here = Path(__file__).parent
    place = {str(here / f"{name}.py"): number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processor is timed for `model.compute_dtype: auto`, and no test depends on which: float32."""
    monkeypatch.setattr("pipeline.plan.compute_dtype.measured_seconds", lambda shapes, threads: None)


@pytest.fixture(autouse=True)
def answering_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the hub, or depends on whether it answers: it does, but where `endpoint` closes it."""
    if "endpoint" not in request.fixturenames:
        monkeypatch.setattr("pipeline.hub.unreachable", str)
        monkeypatch.setattr("pipeline.data.sources.unreachable", str)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model/` and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder / "model")
    write_tiny_data(folder / "rows.jsonl", 300)
    return folder


@pytest.fixture
def stock_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is short: attention has the bits of the stock model."""
    monkeypatch.setattr("pipeline.adapters.sites.short_attention.LONGEST", {})


@pytest.fixture
def tiny_settings(tiny_folder: Path) -> list[str]:
    """Overrides for a run of seconds on the tiny model."""
    return [
        f"model.path={tiny_folder / 'model'}", f"data.path={tiny_folder / 'rows.jsonl'}", "data.train_rows=64",
        "data.validation_rows=40", "data.calibration_rows=40", "data.test_rows=60", "data.max_tokens=64",
        "train.max_steps=6", "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.01",
        "train.validate_every_steps=3", "train.checkpoint_every_steps=2", "ensemble.size=4", "adapter.rank=4",
        "search.trials=2", "search.max_steps=4", "search.adapters=2", "evaluate.bootstrap_samples=200",
    ]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunPaths, RunConfig]:
    """A tiny run that was trained, evaluated, reported and exported; leave it as it is."""
    from pipeline.stages import evaluate, export, report, train

    folder = tmp_path_factory.mktemp("finished")
    model, rows = write_tiny_model(folder / "model"), write_tiny_data(folder / "rows.jsonl", 300)
    config = load_config(None, [
        f"model.path={model}", f"data.path={rows}", "data.train_rows=64", "data.validation_rows=40",
        "data.calibration_rows=80", "data.test_rows=60", "data.max_tokens=64", "train.max_steps=6",
        "train.global_batch=8", "train.micro_batch=4", "train.learning_rate=0.01", "train.validate_every_steps=3",
        "ensemble.size=4", "adapter.rank=4", "evaluate.bootstrap_samples=200", "model.compute_dtype=float32",
    ])
    paths = RunPaths(folder / "run")
    claim(paths.root, "run")
    write_text(paths.config, dump_config(config))
    with pytest.MonkeyPatch.context() as patch:
        for stage in (evaluate, export):  # the process group serves the next test
            patch.setattr(stage, "leave_world", lambda: None)
        train.train_run(config, paths.root)
        evaluate.evaluate_run(paths.root)
        report.write_report(paths.root)
        export.export_run(paths.root)
    return paths, config


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between them; skipped where the machine does not allow them."""
    names = (f"ld{os.getpid() % 100000}a", f"ld{os.getpid() % 100000}b")
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = ("add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable0", "netns", names[1])
        _run("ip", "link", *ends)
        for number, name in enumerate(names, start=1):
            _run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable0")
            _run("ip", "-n", name, "link", "set", "cable0", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not allow network namespaces: {error.stderr.decode().strip()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
