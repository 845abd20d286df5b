"""ZeRO-3: what it asks of the model, what is refused, and training under it on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from pipeline.config import load_config
from pipeline.config.deepspeed import combination_fault, fill_ds_config, find_ds_config
from pipeline.config.model import ModelConfig
from pipeline.distributed.devices import check_processes
from pipeline.distributed.zero import leave_head_outside, require_one_dtype
from pipeline.errors import ConfigError, LoradropError
from pipeline.files import read_json, read_json_lines, write_json
from pipeline.model.head import head_of, hidden_states
from pipeline.model.released import release_weights
from pipeline.plan.preflight import check_inputs
from pipeline.prediction.passes import lockstep
from pipeline.support.deepspeed import Cell, Outcome, format_table, run_matrix
from pipeline.support.tiny import tiny_llama

STAGE_3 = {
    "bf16": {"enabled": "auto"}, "data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 3},
}


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_stays_outside_and_is_called_as_before(tied: bool) -> None:
    model = tiny_llama()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    ids = torch.tensor([[3, 4, 5]])
    ones, positions = torch.ones_like(ids), torch.arange(3).unsqueeze(0)

    def logits() -> torch.Tensor:
        return head_of(model)(hidden_states(model, ids, ones, positions))

    before, names = logits(), {name for name, _ in model.named_modules()}
    outside = leave_head_outside(model)
    assert set(outside) == ({"lm_head", "model.embed_tokens"} if tied else {"lm_head"})
    assert names - {name for name, _ in model.named_modules()} == set(outside)
    assert torch.equal(logits(), before)
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_packed_weights_of_another_precision_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    require_one_dtype(model, torch.bfloat16)  # the engine casts what is not packed
    model[1].weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LoradropError, match=r"1\.weight stored as torch\.bfloat16, not torch\.uint8"):
        require_one_dtype(model, torch.bfloat16)
    model[1].weight = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    model[1].weight.quant_state = object()  # type: ignore[attr-defined]
    with pytest.raises(LoradropError, match=r"not torch\.float32"):
        require_one_dtype(model, torch.bfloat16)


def test_a_process_with_fewer_chunks_keeps_the_others_company(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, model = [[0], [1, 2]], torch.nn.Linear(1, 1)
    assert list(lockstep(chunks, model)) == [([0], True), ([1, 2], True)]
    model.weight.ds_id = 0  # type: ignore[attr-defined]
    monkeypatch.setattr("pipeline.prediction.passes.largest", lambda count: 4)
    assert list(lockstep(chunks, model))[2:] == [([1, 2], False)] * 2


def test_the_number_of_passes_is_agreed_on_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that asks after its own passes would meet the others in the middle of theirs."""
    asked: list[int] = []
    monkeypatch.setattr("pipeline.distributed.zero.is_sharded", lambda model: True)
    monkeypatch.setattr("pipeline.prediction.passes.largest", lambda value: asked.append(value) or 3)
    passes = lockstep([[0], [1]], torch.nn.Linear(2, 2))
    assert next(passes) == ([0], True) and asked == [2]
    assert list(passes) == [([1], True), ([1], False)] and asked == [2]


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_a_4_bit_linear_can_do_without_its_weight_until_the_backward_pass(storage: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 128, bias=bias, quant_type="nf4", quant_storage=storage).to("cpu").train()
    layer.requires_grad_(False)
    x = torch.randn(3, 5, 64, requires_grad=True)
    expected = layer(x)
    expected.square().sum().backward()
    wanted, x.grad, expected = x.grad, None, expected.detach()
    assert release_weights(torch.nn.Sequential(layer)) == 1
    y = layer(x)
    assert torch.equal(y, expected)
    packed = layer.weight.data
    held = StorageWeakRef(packed.untyped_storage())
    layer.weight.data = torch.empty(0, dtype=storage)
    copy = packed.clone()
    del packed
    assert held.expired(), "the graph holds on to the weight"
    layer.weight.data = copy  # gathered again
    y.square().sum().backward()
    assert wanted is not None and torch.allclose(x.grad, wanted, rtol=1e-6, atol=1e-5)
    W_OI = bnb.functional.dequantize_4bit(copy, layer.weight.quant_state).double()
    assert torch.allclose(x.grad.double(), (2 * y.double()) @ W_OI, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"bf16": {}}, r"bf16\.enabled: is missing"),
        ({"data_types": {}}, r"data_types\.grad_accum_dtype: is missing"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "must be fp32"),
        ({"fp16": {"enabled": True}}, "loss scaling"),
        ({"bf16": {"enabled": False}}, "contradicts the run, which has True"),
    ],
)
def test_a_file_that_would_lose_precision_under_zero_3_is_refused(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        fill_ds_config({**STAGE_3, **change}, {"bf16.enabled": True}, "x.json")


def test_what_is_decided_later_passes_preflight_and_is_filled_then() -> None:
    assert fill_ds_config(STAGE_3, {"bf16.enabled": None}, "x.json")["bf16"] == {"enabled": "auto"}
    assert fill_ds_config(STAGE_3, {"bf16.enabled": False}, "x.json")["bf16"] == {"enabled": False}


def test_the_trainer_refuses_what_the_matrix_refuses(tiny_settings: list[str]) -> None:
    source = read_json(find_ds_config("zero3"))
    fault = combination_fault(source, ModelConfig(quantization="int8"))
    assert fault is not None and "shard nothing" in str(fault)
    assert combination_fault(source, ModelConfig()) is None
    assert combination_fault({"zero_optimization": {"stage": 2}}, ModelConfig(quantization="int8")) is None
    for wrong in ("model.quantization=int8", "model.compute_dtype=float16", "model.hold=dequantized"):
        config = load_config(None, [*tiny_settings, "train.deepspeed=zero3", wrong])
        with pytest.raises(ConfigError) as caught:
            check_inputs(config)
        assert str(caught.value) == str(combination_fault(source, config.model))


def test_the_table_names_what_is_refused_and_what_failed() -> None:
    cells = [Cell("zero3", "nf4", "float32", c, p) for p in (1, 2) for c in (False, True)]
    states = ["tested", "refused", "FAILED", "tested"]
    outcomes = [Outcome(cell, state, f"reason of {state}") for cell, state in zip(cells, states, strict=True)]
    lines = format_table(outcomes).splitlines()
    assert lines[1].split() == ["zero3", "nf4", "float32", *states]
    assert "2 tested, 1 refused, 1 FAILED" in lines[3]
    assert lines[-2:] == ["- refused: reason of refused", "- FAILED: reason of FAILED"]


def test_more_processes_than_gpus_are_refused_by_launcher_and_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.distributed.devices.accelerator_memory", lambda: [("some GPU", 80)] * 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_processes(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(ConfigError, match="1 visible GPU: processes cannot share one") as caught:
        check_processes(2)
    outcomes = run_matrix([Cell("zero3", "nf4", "float32", c, 2) for c in (False, True)], tmp_path)
    assert [(outcome.status, outcome.detail) for outcome in outcomes] == [("refused", str(caught.value))] * 2
    monkeypatch.setattr("pipeline.distributed.devices.accelerator_memory", list)
    check_processes(64)


@pytest.mark.slow
def test_zero_3_trains_a_4_bit_base_like_plain_training(tmp_path: Path) -> None:
    cells = [
        Cell("zero0", "nf4", "float32", False, 1, 8),
        Cell("zero3", "nf4", "float32", True, 1),
        Cell("zero3", "nf4", "float32", True, 2),
        Cell("zero3", "int8", "float32", False, 2),
        Cell("zero2", "none", "float32", False, 2),  # whose reference is missing
    ]
    outcomes = run_matrix(cells, tmp_path)
    assert [outcome.status for outcome in outcomes] == ["tested"] * 3 + ["refused", "FAILED"], outcomes
    assert "its reference" in outcomes[4].detail
    log = (tmp_path / "matrix-2.log").read_text()
    assert "MB in 2 shards; whole in every process: output head 0.0 MB" in log


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("zero3", "zero3"), ("zero3", "zero2"), ("zero0", "zero3")])
def test_a_checkpoint_resumes_under_another_stage(
    tmp_path: Path, tiny_settings: list[str], stages: tuple[str, str]
) -> None:
    from pipeline.run_folder.paths import RunPaths
    from pipeline.stages.train import train_run
    from pipeline.training.run import Stopped

    configs = [load_config(None, [*tiny_settings, f"train.deepspeed={stage}"]) for stage in stages]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = train_run(configs[0], whole)
    with pytest.raises(Stopped):
        train_run(configs[0], parted, lambda _: write_json(RunPaths(parted).stop_request, {"signal": "TEST"}))
    found = train_run(configs[1], parted)
    rows = [[r["loss"] for r in read_json_lines(f / "metrics.jsonl") if r["kind"] == "train"] for f in (whole, parted)]
    if stages[0] == stages[1]:
        assert found == expected and rows[0] == rows[1]  # bitwise: hash of the adapter, losses
    else:
        assert rows[1] == pytest.approx(rows[0], rel=1e-5)
        assert found["validation_nll"] == pytest.approx(expected["validation_nll"], rel=1e-5)
