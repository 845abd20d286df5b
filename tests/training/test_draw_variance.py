"""Variance of `split` against `replicate`: the estimators against numpy, the layouts against the theory of both."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama, examples
from torch import Tensor

from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.method import Site
from pipeline.data.encode import Encoded
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedLM
from pipeline.training.draw_variance import LAYOUTS, DrawVariance, GradientOf, Moments, measure, step_gradient
from pipeline.training.loader import open_loader

DRAWS = 4


def test_moments_are_those_of_numpy() -> None:
    vectors = np.random.default_rng(0).normal(size=(7, 5)) + 0.3
    moments = Moments()
    for vector in vectors:
        moments.add(torch.tensor(vector))
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = [a @ b for a, b in itertools.permutations(units, 2)]
    assert moments.variance == pytest.approx(np.cov(vectors.T).trace())
    assert moments.norm == pytest.approx(np.sqrt((vectors**2).sum(1).mean()))
    assert moments.cosine == pytest.approx(np.mean(cosines))
    np.testing.assert_allclose(moments.mean, vectors.mean(0))


def test_variances_by_masks_and_by_rows_are_told_apart() -> None:
    """Gradients in 400 numbers: rows N(0, 2²), masks N(0, 1) under replicate and N(0, 3²) under split."""
    random, size = torch.Generator().manual_seed(0), 400
    rows = torch.randn(12, size, generator=random) * 2 + 1

    def gradient_of(layout: str, step: int, repeat: int) -> Tensor:
        return rows[step] + torch.randn(size, generator=random) * (3 if layout == "split" else 1)

    found = measure(gradient_of, 12, 6)
    assert found.ratio == pytest.approx(9, rel=0.1)
    assert found.rows == pytest.approx(4 * size, rel=0.1) and found.step_ratio == pytest.approx(13 / 5, rel=0.1)
    for noise, masks in ((found.split, 9), (found.replicate, 1)):
        assert noise.variance == pytest.approx(masks * size, rel=0.1)
        assert noise.norm == pytest.approx(((1 + 4 + masks) * size) ** 0.5, rel=0.1)
        assert noise.cosine == pytest.approx(5 / (5 + masks), rel=0.1)


def tiny_gradients(sites: tuple[Site, ...], rows: list[Encoded]) -> GradientOf:
    """Global batches of 8 rows on a tiny Llama, in passes of 4."""
    adapters = adapted_llama(AdapterSpec(rank=2, alpha=4.0, sites=sites), targets=["q_proj", "down_proj"])
    objective = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)
    train = load_config(None, ["train.global_batch=8", "train.micro_batch=4", f"train.draws={DRAWS}"]).train
    loaders = {
        layout: open_loader(train.model_copy(update={"draw_layout": layout}), 64, rows, adapters.specs[0])
        for layout in LAYOUTS
    }

    def gradient_of(layout: str, step: int, repeat: int) -> Tensor:
        key = MaskKey(3, f"{layout} {step} {repeat}")
        return step_gradient(adapters, objective, loaders[layout].of_step(step), 2, key)

    return gradient_of


def test_the_gradient_is_that_of_the_layout_and_leaves_none_behind() -> None:
    """Equal rows under weight masks: each draw has as much of them under split as under replicate: both are equal."""
    row = examples([6])[0]
    same = [replace(row, example=f"row-{i}") for i in range(8)]
    adapters = adapted_llama(AdapterSpec(rank=2, sites=LORA_DROPOUT))
    objective = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)
    train = load_config(None, ["train.global_batch=8", "train.micro_batch=4", f"train.draws={DRAWS}"]).train
    found = []
    for layout in LAYOUTS:
        loader = open_loader(train.model_copy(update={"draw_layout": layout}), 64, same, adapters.specs[0])
        found.append(step_gradient(adapters, objective, loader.of_step(0), 2, MaskKey(3, 1)))
        assert all(parameter.grad is None for parameter in adapters.model.parameters())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    assert float(found[0].norm()) > 0.01


def alike() -> list[Encoded]:
    """Rows that differ in one token and have the same answer."""
    row, ids = examples([8])[0], examples([8])[0].input_ids
    return [replace(row, example=f"row-{i}", input_ids=(*ids[:3], 5 + i, *ids[4:])) for i in range(8)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sites", "rows", "low", "high"),
    [
        ((Site(position="lora_input", rate=0.5),), alike(), 0.8 * DRAWS, 1.2 * DRAWS),  # a mask for every example
        (LORA_DROPOUT, alike(), 1.0, 0.5 * DRAWS),  # one for all, and they agree
        (LORA_DROPOUT, examples([7, 5, 9, 6, 8, 5, 7, 6]), 0.8 * DRAWS, 1.2 * DRAWS),  # random rows do not
    ],
    ids=["input", "rows alike", "rows at random"],
)
def test_split_has_the_expected_gradient_of_replicate_and_the_variance_of_theory(
    sites: tuple[Site, ...], rows: list[Encoded], low: float, high: float
) -> None:
    repeats = 100
    gradient_of = tiny_gradients(sites, rows)
    means: dict[str, Moments] = {layout: Moments() for layout in LAYOUTS}
    for layout, repeat in itertools.product(LAYOUTS, range(repeats)):
        means[layout].add(gradient_of(layout, 0, repeat))
    split, replicated = (means[layout] for layout in LAYOUTS)
    apart = float((split.mean - replicated.mean).square().sum())
    expected = (split.variance + replicated.variance) / repeats
    assert apart < 2.5 * expected  # its own standard deviation is 0.3 of it at 20 independent directions
    assert float(split.mean.square().sum()) > 20 * expected  # there is a gradient to agree on
    assert low < split.variance / replicated.variance < high
    assert split.cosine < replicated.cosine < 1.0


@pytest.mark.slow
def test_the_benchmark_prints_a_table(
    tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers import ROOT

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import draw_variance

    monkeypatch.setattr("sys.argv", ["draw_variance.py", "--steps", "2", "--repeats", "2", *tiny_settings])
    assert draw_variance.main() == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].split()[:3] == ["split", "1", "×"] and shown[2].split()[:3] == ["replicate", "4", "×"]
    assert "× the variance of replicate" in shown[4] and "at 1/4 of the work" in shown[4]
    monkeypatch.setattr("sys.argv", ["draw_variance.py", *tiny_settings, "adapter.method=none"])
    assert draw_variance.main() == 2 and "masks nothing" in capsys.readouterr().err


def test_the_ratio_of_a_step_counts_the_rows() -> None:
    from pipeline.training.draw_variance import LayoutNoise

    found = DrawVariance(LayoutNoise(1.0, 0.5, 3.0), LayoutNoise(1.0, 0.5, 1.0), rows=1.0)
    assert (found.ratio, found.step_ratio) == (3.0, 2.0)
