"""The memory plan against figures worked out by hand, and its trace against tensors that are really held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipeline.plan.memory
import pipeline.plan.memory_table
from pipeline.adapters.attach import attach
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.model.load import load_base
from pipeline.plan.memory import (
    HOLES,
    PAGES,
    MemoryPlan,
    NoPlan,
    States,
    plan_memory,
    quantized_bytes,
    states_of,
    weigh,
)
from pipeline.plan.memory_table import expected_batch, memory_table, mib
from pipeline.plan.memory_trace import LONG, MAPPED, SHORT, Batch, Live, Peaks, shortened, trace_pass
from pipeline.support.tiny import tiny_llama

LINEAR_SHAPES = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
"""(I, O) of the seven linears of a layer of the tiny model."""


def tiny_config(tiny_settings: list[str], *extra: str) -> Any:
    return load_config(None, [*tiny_settings, "launch.processes=1", *extra])


def said(config: Any) -> str:
    """The plan that a dry run prints, which is no wider than a terminal, on one line."""
    text = memory_table(config, 1)
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_weights_are_those_of_the_shapes(tiny_settings: list[str], tiny_folder: Path) -> None:
    config = tiny_config(tiny_settings, "adapter.rank=4")
    adapters = attach(tiny_llama(), [AdapterSpec.from_config(config.adapter, config.train.max_steps)], "all-linear", 0)
    weights = weigh(adapters, config.model, torch.float32, tiny_folder / "model")
    numbers = 2 * sum(i * o for i, o in LINEAR_SHAPES)  # two layers
    assert weights.quantized == numbers // 2
    blocks = numbers // 64  # one 8-bit scale each; layers have at most 128 of them: one fp32 scale of scales per layer
    assert weights.scales == blocks + 14 * (4 + 64 + 1024)
    assert weights.others == 4 * (64 * 64 + 5 * 64)  # the tied embedding, once; five norms
    assert weights.trained == 2 * 4 * sum(i + o for i, o in LINEAR_SHAPES) == 8192
    assert weights.largest == 64 * 128 * 4
    assert weights.stored == (tiny_folder / "model" / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_weights_are_those_of_a_loaded_base(tiny_settings: list[str]) -> None:
    config = tiny_config(tiny_settings, "model.hold=quantized")
    base = load_base(config.model, torch.device("cpu"))
    held = [p.quant_state for p in base.model.parameters() if hasattr(p, "quant_state")]
    scales = sum(
        s.absmax.nbytes + s.code.nbytes + s.state2.absmax.nbytes + s.state2.code.nbytes for s in held
    )
    adapters = attach(tiny_llama(), [AdapterSpec.from_config(config.adapter, config.train.max_steps)], "all-linear", 0)
    weights = weigh(adapters, config.model, torch.float32, None)
    assert weights.quantized == sum(p.nbytes for p in base.model.parameters() if hasattr(p, "quant_state"))
    assert weights.scales == scales
    assert weights.others == sum(p.nbytes for p in base.model.parameters() if not hasattr(p, "quant_state"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], (500_000, 15_625 + 4 * 62 + 64 + 1024)),  # 10^6 / 64 scales; one more for 256 of them
        (["model.double_quantization=false"], (500_000, 4 * 15_625 + 64)),
        (["model.quantization=int8"], (1_000_000, 4 * 1000)),
    ],
)
def test_scales(settings: list[str], expected: tuple[int, int]) -> None:
    assert quantized_bytes(1_000_000, 1000, load_config(None, settings).model) == expected


def test_optimizer_states_are_shared_out() -> None:
    config = load_config(None, ["train.deepspeed=zero2"])
    assert states_of(config.train, 1000, 2, "cpu") == States(4000, 2000, 0, 4000, 3 * 2000, 3 * 2000)
    accumulating = States(4000, 4000, 4000, 4000, 3 * 4000, 3 * 4000)
    assert states_of(config.train, 1000, 1, "cpu") == accumulating
    assert states_of(config.train, 1000, 2, "cuda").bucket == 4 * 50_000_000  # of zero2.json, allocated whole
    whole = load_config(None, ["train.deepspeed=zero0", "train.micro_batch=16"])
    assert states_of(whole.train, 1000, 2, "cpu") == States(4000, 4000, 0, 0, 8000, 3 * 4000)
    one = load_config(None, ["train.deepspeed=zero1", "train.micro_batch=4"])
    assert states_of(one.train, 1000, 2, "cpu") == States(4000, 2000, 4000, 4000, 6000, 6000)


def test_live_counts_what_is_held() -> None:
    given = torch.zeros(100)
    with Live([given]) as live:
        a = given + 1  # 400 bytes
        b = a.view(10, 10)
        c = torch.cat([b, b])  # 800
        del a
        assert live.peaks().backward == 1200
        del b, c
        live.start_backward()
        d = given * 2
    assert live.peaks() == Peaks(1200.0, 400.0, 1200.0) and d.numel() == 100


def test_blocks_with_pages_of_their_own_are_no_part_of_the_heap() -> None:
    with Live([]) as live:
        a = torch.zeros(MAPPED // 4)
        b = torch.zeros(MAPPED // 4 - 1)
        del b
        c = torch.zeros(100)
    assert live.peaks() == Peaks(0.0, 2.0 * MAPPED - 4, MAPPED - 4.0) and a.numel() > c.numel()


def test_holes_are_planned_where_the_heap_is_not_bounded(
    tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, passes = tiny_config(tiny_settings), Peaks(6e9, 7e9, 2e9)
    monkeypatch.setattr(pipeline.plan.memory, "trace_pass", lambda *arguments: passes)

    def plan(value: str) -> MemoryPlan:
        monkeypatch.setenv(PAGES, value)
        return plan_memory(config.model, config.adapter, config.train, 1, Batch(16, 2))

    found, bounded = plan(""), plan("1048576")
    assert found.holes == int(HOLES * 2e9) and bounded.holes == 0
    assert plan("4194304").holes == plan("much").holes == found.holes
    for moment, holes in (("loading", 0), ("optimizer step", 0), ("forward pass", 3e9), ("backward pass", 3e9)):
        assert found.moments[moment] - bounded.moments[moment] == holes
    monkeypatch.setenv(PAGES, "65536")
    text = said(config)
    assert "in the C library's heap" not in text and f"peak {mib(bounded.peak)} of " in text
    monkeypatch.delenv(PAGES)
    text = said(config)
    assert "in the C library's heap" in text
    assert f"peak {mib(found.peak)}, {mib(bounded.peak)} without the holes, of " in text
    needed = bounded.peak
    monkeypatch.setattr(pipeline.plan.memory, "machine_memory", lambda: needed)
    assert "or, slower, with MALLOC_MMAP_THRESHOLD_=1048576 in the environment" in said(config)
    monkeypatch.setenv(PAGES, "1048576")
    assert ": fits" in said(config)
    monkeypatch.setattr(pipeline.plan.memory, "machine_memory", lambda: needed - 1)
    text = said(config)
    assert "DOES NOT FIT" in text and "or, slower" not in text


def test_the_trace_is_what_a_chain_of_layers_keeps() -> None:
    layers = [nn.Linear(32, 32) for _ in range(5)]
    for layer in layers:
        layer.requires_grad_(False)
    x = torch.zeros(4, 32, requires_grad=True)
    with Live([x, *(p for layer in layers for p in layer.parameters())]) as live:
        y = x
        for layer in layers:
            y = torch.tanh(layer(y))  # tanh keeps its result; the frozen layer keeps nothing
        del layer
        assert live.peaks().backward == (5 + 1) * 4 * 32 * 4  # the last layer's output lives while tanh runs


def test_peaks_follow_the_line_through_both_traces() -> None:
    short, long = Peaks(10.0, 30.0, 8.0), Peaks(14.0, 50.0, 9.0)
    assert short.towards(long, SHORT) == short and short.towards(long, LONG) == long
    assert short.towards(long, 10) == Peaks(26.0, 110.0, 12.0)


@pytest.mark.slow
def test_the_pass_of_a_deeper_model_is_on_the_line(tiny_settings: list[str]) -> None:
    config = tiny_config(tiny_settings)
    description = tiny_llama().config
    direct = shortened(description, 4)
    eight = shortened(description, 4)
    eight.num_hidden_layers = 8
    assert len(getattr(direct, "layer_types", None) or [0] * 4) == 4
    adapter, train, batch = config.adapter, config.train, Batch(16, 2)
    four, more = (trace_pass(adapter, train, "sdpa", d, torch.float32, batch) for d in (direct, eight))
    two = trace_pass(adapter, train, "sdpa", shortened(description, 2), torch.float32, batch)
    assert more.forward - four.forward == pytest.approx(2 * (four.forward - two.forward))


@pytest.mark.slow
def test_what_changes_the_pass_changes_its_trace(tiny_settings: list[str]) -> None:
    description, batch = tiny_llama().config, Batch(16, 2)

    def forward(*extra: str, wide: Batch = batch) -> float:
        own = tiny_config(tiny_settings, *extra)
        traced = trace_pass(own.adapter, own.train, own.model.attention, description, torch.float32, wide)
        return traced.forward

    plain = forward()
    assert forward("train.activation_checkpointing=true") < 0.6 * plain
    assert forward("train.draw_layout=replicate") > 3 * plain
    assert forward(wide=Batch(32, 2)) > 1.8 * plain
    description.vocab_size = 8192  # logits and their logarithms of 10 more tokens in 4 rows
    assert forward(wide=Batch(16, 12)) - forward() > 2 * 4 * 10 * 8192 * 4


@pytest.mark.slow
def test_the_table_says_what_fits(
    tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tiny_settings)
    batch, source = expected_batch(config.data, config.model, config.train.packing)
    assert "longest of 64 training rows" in source and 5 < batch.tokens < 64 and batch.supervised == 1
    text = said(config)
    assert "adapter, 8,192 parameters" in text and ": fits" in text and "disk:" in text
    peak = plan_memory(config.model, config.adapter, config.train, 1, batch).peak
    monkeypatch.setattr(pipeline.plan.memory, "machine_memory", lambda: peak - 1)
    assert "DOES NOT FIT; it fits with train.activation_checkpointing=true" in said(config)


def test_what_cannot_be_planned_says_why(tiny_settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(NoPlan, match="ZeRO-3"):
        sharded = tiny_config(tiny_settings, "train.deepspeed=zero3")
        plan_memory(sharded.model, sharded.adapter, sharded.train, 1, Batch(8, 1))
    assert memory_table(tiny_config(tiny_settings, f"model.path={tmp_path}"), 1).startswith("memory: no plan (")


def test_adalora_is_planned_with_the_rank_of_its_start(tiny_settings: list[str]) -> None:
    """Its schedule depends on the length of the run, which the plan has to be told."""
    adalora = tiny_config(tiny_settings, "adapter.kind=adalora")
    plain = tiny_config(tiny_settings, "adapter.rank=6")  # 1.5 × 4
    found, wanted = (plan_memory(c.model, c.adapter, c.train, 1, Batch(16, 2)) for c in (adalora, plain))
    layers = 2 * 7
    assert found.weights.trained == wanted.weights.trained + 6 * layers  # Λ beside P and Q
    assert "memory of one process" in said(adalora)
