"""Every architecture × LoRA-matrix site × precision trains: the loss falls, every gradient is finite and not zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import LORA_DROPOUT, PRECISIONS, SITES, examples, load_tiny

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import plain_layout, split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.loss.objective import SupervisedLM
from pipeline.prediction.passes import PassSettings, predict_completions
from pipeline.training.batch import MemberBatch, lay_out

ROWS = examples([8, 6, 9, 7, 8, 5, 9, 6])
TOGETHER = tuple(Site(position=position, rate=0.1) for position in SITES)
ALL_SITES = {**SITES, "lora_dropout": LORA_DROPOUT, "all": TOGETHER}


def train(adapters: Adapters, steps: int = 20, checkpointing: bool = False) -> None:
    """AdamW on one batch under `split`, gradients looked at in every step."""
    trained = {name: p for name, p in adapters.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02, weight_decay=0.0)
    adapters.model.train()
    if checkpointing:
        adapters.model.activation_checkpointing_enable({"use_reentrant": False})
    for step in range(steps):
        rows = lay_out(adapters, ROWS, split_layout(range(len(ROWS)), 4), 2, MaskKey(0, step))
        loss = run(adapters, rows)
        assert torch.isfinite(loss)
        for name, parameter in trained.items():
            assert parameter.dtype == torch.float32 and parameter.grad is not None and parameter.grad.isfinite().all()
            if name.endswith("lora_B") or step > 0:  # B starts at zero, so A's first gradient is zero
                assert parameter.grad.any(), f"{name} has a zero gradient at step {step}"
        optimizer.step()
        optimizer.zero_grad()


def run(adapters: Adapters, rows: MemberBatch) -> torch.Tensor:
    with adapters.axis.active(rows.plan):
        loss = SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights)
        loss.backward()
    return loss.detach()


def mask_free_loss(adapters: Adapters) -> float:
    rows = lay_out(adapters, ROWS, plain_layout(len(ROWS)), 2, MaskKey(0, "test"))
    with torch.no_grad(), adapters.axis.active(rows.plan):
        return float(SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights))


def check_cell(family: str, site: str, precision: str, folder: Path) -> None:
    model = load_tiny(folder, family, precision)
    adapters = attach(model, [AdapterSpec(rank=8, alpha=16.0, sites=ALL_SITES[site])], "all-linear", seed=0)
    assert len(adapters.layers) == 14
    before = mask_free_loss(adapters)
    train(adapters)
    after = mask_free_loss(adapters)
    assert after < 0.5 * before
    members = [Member(None), Member(0), Member(0, 0), Member(0, 1)]
    flat, _ = predict_completions(adapters, ROWS, members, PassSettings(2, 200, MaskKey(0, "test")))
    base, mean_field, first, second = -flat.sum(1)
    tolerance = 0.05 if precision == "bf16" else 1e-3
    assert base == pytest.approx(before, rel=tolerance)
    assert mean_field == pytest.approx(after, rel=tolerance, abs=tolerance)
    assert max(first, second) < 0.8 * before and first != second  # its draws have learned, and differ


def test_one_cell(tmp_path: Path) -> None:
    check_cell("llama", "lora_dropout", "nf4", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*PRECISIONS, "int8"])
@pytest.mark.parametrize("site", ALL_SITES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_cell_trains(family: str, site: str, precision: str, tmp_path: Path) -> None:
    check_cell(family, site, precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [*PRECISIONS, "int8"])
@pytest.mark.parametrize("site", ALL_SITES)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_activation_checkpointing_changes_no_bit_of_a_training(
    family: str, site: str, precision: str, tmp_path: Path
) -> None:
    """Four steps with and without recomputation end at the same bits."""
    ends = []
    for checkpointing in (False, True):
        model = load_tiny(tmp_path, family, precision)
        adapters = attach(model, [AdapterSpec(rank=4, sites=ALL_SITES[site])], "all-linear", seed=0)
        train(adapters, 4, checkpointing)
        ends.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
