"""The loss scale of float16: powers of two, undone before anything sees a gradient, against float32."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.families import CPU, examples, trained_start
from helpers.runs import first_moments, gradient_norms
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import plain_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError
from pipeline.loss.objective import SupervisedLM
from pipeline.loss.terms import GlobalMean
from pipeline.model.load import load_base
from pipeline.support.tiny import write_tiny_model
from pipeline.training import loss_scale
from pipeline.training.batch import lay_out
from pipeline.training.guards import NotFinite
from pipeline.training.loss_scale import PER_PLACE, LossScale

MILLIONS = 2_000_000


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapters, Adapters]:
    """(float16, float32) bases of the same numbers, with the same adapter."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    half = load_base(ModelConfig(path=str(folder), quantization="none", compute_dtype="float16"), CPU).model
    bases = (half, copy.deepcopy(half).float())
    found = [trained_start(attach(base, [AdapterSpec(rank=4)], "all-linear", seed=0)) for base in bases]
    return found[0], found[1]


def trained(adapters: Adapters) -> list[torch.nn.Parameter]:
    return [parameter for parameter in adapters.model.parameters() if parameter.requires_grad]


def gradient(adapters: Adapters, supervised: float, factor: float = 1.0) -> Tensor:
    """Of `factor` × the mean over `supervised` places, of which this is one pass; times `supervised`, float64."""
    rows = lay_out(adapters, examples([40] * 6, supervised=30), plain_layout(6), 2, MaskKey(0, 0))
    with adapters.axis.active(rows.plan):
        total = SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights)
        (GlobalMean(supervised).for_engine(total) * factor).backward()
    found = torch.cat([p.grad.double().flatten() for p in trained(adapters)])  # type: ignore[union-attr]
    adapters.model.zero_grad()
    return found * supervised


def test_two_million_places_per_step_lose_nothing(pair: tuple[Adapters, Adapters]) -> None:
    """As close to float32 as float16 is where nothing underflows; without the scale most of it is lost."""
    half, whole = pair
    exact = gradient(whole, 1.0)

    def error(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    own = error(gradient(half, 32.0))
    assert own < 0.02 and error(gradient(half, MILLIONS)) > 0.5
    scale = LossScale(trained(half), torch.float16)
    for processes in (1, 8):
        scale.choose(MILLIONS, processes)
        assert scale.factor > 1000 and error(gradient(half, MILLIONS, scale.factor)) < 1.1 * own


def test_the_factor_is_a_power_of_two_that_every_gradient_is_divided_by(pair: tuple[Adapters, Adapters]) -> None:
    """Bit for bit in float32; parameters that an earlier scale did not touch are those of before."""
    adapters = copy.deepcopy(pair[1])
    before = gradient(adapters, 64.0)
    scale = LossScale(trained(adapters), torch.float16)
    for supervised, processes in ((1.0, 1), (100.0, 1), (MILLIONS, 1), (MILLIONS, 7)):
        scale.choose(supervised, processes)
        weight = scale.factor * processes / supervised
        assert math.log2(scale.factor).is_integer()
        assert scale.factor == 1.0 if supervised <= 32 else PER_PLACE / 2 < weight <= PER_PLACE
        assert torch.equal(gradient(adapters, 64.0, scale.factor), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_have_none(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    scale = LossScale([parameter], dtype)
    scale.choose(MILLIONS, 1)
    parameter.sum().backward()
    assert scale.factor == 1.0 and scale.describe() == "" and not parameter._backward_hooks
    assert torch.equal(parameter.grad, torch.ones(2))  # type: ignore[arg-type]


# --- whole trainings -------------------------------------------------------------------------------------------------

HALF = ["model.compute_dtype=float16", "model.quantization=none", "train.max_gradient_norm=0.05",
        "train.learning_rate=1e-4"]  # fmt: skip
"""Steps so small that both runs stay where they are: their gradients can be compared to the end."""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["train.deepspeed=zero0"], ["train.deepspeed=zero2"], ["adapter.kind=adalora"]])
def test_a_run_is_that_of_float32(
    extra: list[str], tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms before clipping, AdaLoRA's choices and Adam's moments, under accumulation; clipping is at work."""
    from pipeline.files import read_json_lines
    from pipeline.run_folder.paths import RunPaths
    from pipeline.stages.train import train_run

    seen: list[float] = []
    choose = LossScale.choose

    def watch(scale: LossScale, supervised: float, processes: int) -> None:
        choose(scale, supervised, processes)
        seen.append(scale.factor)

    monkeypatch.setattr(LossScale, "choose", watch)
    monkeypatch.setattr(loss_scale, "PER_PLACE", 2.0**6)  # a step of this size would need no scale
    settings = [*tiny_settings, *HALF, *extra]
    train_run(load_config(None, settings), tmp_path / "half")
    assert min(seen) >= 256
    monkeypatch.undo()
    train_run(load_config(None, [*settings, "model.compute_dtype=float32"]), tmp_path / "whole")
    norms = gradient_norms(tmp_path / "whole")
    assert min(norms) > 0.05 and gradient_norms(tmp_path / "half") == pytest.approx(norms, rel=0.02)
    ours, wanted = first_moments(tmp_path / "half"), first_moments(tmp_path / "whole")
    assert float((ours - wanted).norm() / wanted.norm()) < 0.05
    kept = [[row.get("triplets") for row in read_json_lines(RunPaths(tmp_path / name).metrics)] for name in
            ("half", "whole")]  # fmt: skip
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_an_overflow_is_said_with_the_scale(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.train import train_run

    monkeypatch.setattr(loss_scale, "PER_PLACE", 2.0**30)
    with pytest.raises(NotFinite, match=r"a gradient is not \(under a loss scale of [\d.e+]+, for float16\).*not appl"):
        train_run(load_config(None, [*tiny_settings, *HALF]), tmp_path / "run")


@pytest.mark.slow
def test_zero3_refuses_float16_also_where_the_device_chose_it(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.train import train_run

    monkeypatch.setattr("pipeline.model.load.compute_dtype", lambda config, device: torch.float16)
    settings = [*tiny_settings, "model.quantization=none", "train.deepspeed=zero3"]
    with pytest.raises(ConfigError, match=r"model\.compute_dtype = 'float16'.*undone in float32"):
        train_run(load_config(None, settings), tmp_path / "run")
