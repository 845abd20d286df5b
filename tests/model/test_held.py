"""4-bit weights dequantized once: the same bits as dequantizing them in every product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.families import CPU, LORA_DROPOUT, examples, gradients, trained_start
from torch import Tensor

from pipeline.adapters.attach import attach
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import ModelConfig, load_config
from pipeline.errors import ConfigError
from pipeline.loss.objective import SupervisedLM
from pipeline.model import held
from pipeline.model.held import HeldLinear, available_memory, is_held_dequantized
from pipeline.model.load import BaseModel, load_base
from pipeline.plan.memory import plan_memory
from pipeline.plan.memory_trace import Batch, Peaks
from pipeline.support.tiny import write_tiny_model
from pipeline.training.batch import lay_out


def load(folder: Path, hold: str, sharded: bool = False, **settings: object) -> BaseModel:
    return load_base(ModelConfig(path=str(folder), hold=hold, **settings), CPU, sharded=sharded)  # type: ignore[arg-type]


def kinds(base: BaseModel) -> set[str]:
    return {type(module).__name__ for module in base.model.modules()} & {"Linear4bit", "HeldLinear"}


def a_pass(base: BaseModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a training pass with adapters, and with one layer left bare."""
    adapters = trained_start(attach(base.model, [AdapterSpec(rank=4, sites=LORA_DROPOUT)], "all-linear", seed=0))
    rows = lay_out(adapters, examples([7, 5, 9, 6]), split_layout(range(4), 2), 2, MaskKey(1, 0))
    with adapters.axis.active(rows.plan):
        loss = SupervisedLM(base.model)(**rows.tensors, row_weights=rows.weights)
    loss.backward()
    return loss.detach(), gradients(adapters)


@pytest.mark.parametrize(("family", "dtype", "double"), [
    ("llama", "float32", True), ("llama", "bfloat16", False), ("gpt2", "bfloat16", True), ("qwen2", "float32", True),
])  # fmt: skip
def test_held_weights_change_no_bit(family: str, dtype: str, double: bool, tmp_path: Path) -> None:
    """gpt2 has transposed layers, it and qwen2 have biases."""
    write_tiny_model(tmp_path, family)
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for hold, kind in (("quantized", "Linear4bit"), ("dequantized", "HeldLinear")):
        base = load(tmp_path, hold, compute_dtype=dtype, double_quantization=double)
        assert kinds(base) == {kind}
        with torch.no_grad():
            logits = base.model(ids).logits
        results.append((logits, *a_pass(base), base.identity))
    (logits, loss, found, identity), (logits2, loss2, found2, identity2) = results
    assert torch.equal(logits, logits2) and torch.equal(loss, loss2) and identity == identity2
    assert found.keys() == found2.keys() and all(torch.equal(found[name], found2[name]) for name in found)
    assert any(gradient.any() for gradient in found.values())


def test_held_weights_are_in_the_compute_dtype_frozen_and_no_parameters(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    base = load(tmp_path, "dequantized", compute_dtype="bfloat16")
    layers = [module for module in base.model.modules() if isinstance(module, HeldLinear)]
    assert len(layers) == base.identity.quantized_modules == 14
    assert all(layer.weight.dtype == torch.bfloat16 and not layer.weight.requires_grad for layer in layers)
    parameters = {name for name, _ in base.model.named_parameters()}
    assert parameters and not any("proj" in name for name in parameters)


def test_sharded_weights_stay_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "available_memory", lambda: 2**40)
    write_tiny_model(tmp_path)
    assert kinds(load(tmp_path, "auto")) == {"HeldLinear"}
    assert kinds(load(tmp_path, "auto", sharded=True)) == {"Linear4bit"}


def test_auto_asks_for_four_times_the_memory_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "available_memory", lambda: 8000)
    auto = ModelConfig()
    assert is_held_dequantized(auto, "cpu", 1000, 2) and not is_held_dequantized(auto, "cpu", 1001, 2)
    assert not is_held_dequantized(auto, "cuda", 1, 1)
    assert is_held_dequantized(ModelConfig(hold="dequantized"), "cuda", 10**9, 2)
    assert not is_held_dequantized(ModelConfig(hold="quantized"), "cpu", 1, 1)
    assert not is_held_dequantized(ModelConfig(quantization="int8"), "cpu", 1, 1)


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_only_4_bit_weights_can_be_dequantized(quantization: str) -> None:
    with pytest.raises(ConfigError, match=f"model.hold.*4-bit weights.*{quantization}"):
        load_config(None, ["model.hold=dequantized", f"model.quantization={quantization}"])


def test_available_memory_is_that_of_the_group_where_it_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limit").write_text("10000\n")
    (tmp_path / "used").write_text("7000\n")
    (tmp_path / "stat").write_text("file 900\ninactive_file 500\n")
    group = (*(str(tmp_path / name) for name in ("limit", "used", "stat")), "inactive_file")
    monkeypatch.setattr(held, "_GROUPS", ())
    whole = available_memory()
    assert whole > 10**6
    monkeypatch.setattr(held, "_GROUPS", (group,))
    assert available_memory() == 3500
    (tmp_path / "limit").write_text("max\n")
    assert available_memory() > 10**6
    (tmp_path / "limit").write_text("1\n")
    assert available_memory() == 0


def test_the_memory_plan_counts_held_weights(tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.plan.memory.trace_pass", lambda *_: Peaks(0.0, 0.0))  # which weights do not change

    def weights(hold: str) -> tuple[int, int, int]:
        config = load_config(None, [*tiny_settings, f"model.hold={hold}", "model.compute_dtype=bfloat16"])
        plan = plan_memory(config.model, config.adapter, config.train, 1, Batch(8, 2))
        assert plan.weights.dequantized == (hold == "dequantized")
        return plan.weights.quantized, plan.weights.scales, plan.moments["forward pass"] - plan.resident - plan.kept

    quantized, scales, one_layer = weights("quantized")
    assert scales > 0 and one_layer == 2 * 64 * 128
    assert weights("dequantized") == (4 * quantized, 0, 0)  # 16 bits for 4
