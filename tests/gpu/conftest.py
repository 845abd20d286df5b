"""The pieces of `bash launch.sh test --gpu`: each is a test with the marker `gpu` that takes its device as a parameter.

On the CPU the same code runs in a small form. Correctness is asserted; what is measured is reported (`figures`).
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.acceptance import Acceptance, Figures

from benchmarks.checkout import Checkout, commit_of
from benchmarks.memory_plan import EIGHT_BILLION, write_random_model
from benchmarks.setting import SCALES, Setting
from pipeline.distributed.world import lone_world

LARGE_BYTES = 16 * 2**30


def pytest_configure(config: pytest.Config) -> None:
    if (results := config.getoption("--results")) is not None:
        here = Checkout(ROOT, commit_of(ROOT))
        setting = Setting(SCALES["small"], Path(), here, device=config.getoption("--device"))
        config.pluginmanager.register(Acceptance(results, setting, not hasattr(config, "workerinput")))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """That of `--device`, set up as a stage of the product does."""
    wanted, found = request.config.getoption("--device"), lone_world().device
    if torch.device(wanted).type != found.type:
        pytest.fail(f"--device {wanted}, but stages would take {found}: CUDA_VISIBLE_DEVICES= hides devices")
    return found


@pytest.fixture
def small(device: torch.device) -> bool:
    """Whether sizes are those for a CPU."""
    return device.type == "cpu"


@pytest.fixture
def figures(request: pytest.FixtureRequest, small: bool) -> Figures:
    """What this piece reports."""
    return Figures(request.node, small)


@pytest.fixture(autouse=True)
def own_memory(device: torch.device) -> Iterator[None]:
    """No piece sees what another one has held."""
    yield
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.fixture
def run_settings(tiny_settings: list[str]) -> list[str]:
    """A run of seconds in one process, in the dtype that a GPU takes by itself."""
    return [
        *tiny_settings, "launch.processes=1", "model.compute_dtype=bfloat16", "train.draws=2", "train.max_steps=4",
        "train.validate_every_steps=2",
    ]


@pytest.fixture(scope="session")
def large_model(device: torch.device, tiny_folder: Path) -> Iterator[Path]:
    """A model folder with random weights: 8B-shaped on a GPU, which makes them, else the tiny one.

    In memory where there is room: 16 GB are written once and read by every process of a piece.
    """
    if device.type == "cpu":
        yield tiny_folder / "model"
        return
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 2 * LARGE_BYTES
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as folder:
        model = write_random_model(Path(folder) / "8b", EIGHT_BILLION, device)
        torch.cuda.empty_cache()
        yield model
