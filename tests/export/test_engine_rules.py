"""What vLLM and SGLang would not load, or would serve as something else, is refused by name before it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.adapters.heads import HeadState
from pipeline.adapters.peft_format import StoredAdapter, read_adapter, write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.errors import ConfigError
from pipeline.export.engines import sglang, vllm
from pipeline.export.engines.rules import faults, refuse
from pipeline.export.engines.served import uniform
from pipeline.export.peft import mean_field
from pipeline.files import read_json, write_json

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CAUSAL: Any = SimpleNamespace(model_kind="causal")


def _stored(leaves: tuple[str, ...] = ALL, rank: int = 3, **changes: Any) -> StoredAdapter:
    torch.manual_seed(0)
    names = [f"model.layers.{layer}.block.{leaf}" for layer in range(2) for leaf in leaves]
    spec = AdapterSpec(rank, 8.0, layers=frozenset(names), **changes)
    matrices = {
        name: (torch.randn(spec.rank_of(name), 6), torch.randn(5, spec.rank_of(name))) for name in names
    }  # fmt: skip
    return StoredAdapter(spec, matrices, "", None)


def _written(folder: Path, stored: StoredAdapter) -> Path:
    folder.mkdir()
    write_adapter(folder, stored.matrices, stored.spec, 2, "base", {}, stored.head)
    return folder


def test_an_adapter_that_was_trained_without_rescaling_is_served_with_its_mean_field_scaling() -> None:
    """Engines and llama.cpp know no masks: alpha / R alone scales, so the share that masks keep belongs into it."""
    sites = tuple(Site(position=side, rate=0.5, compensation="none") for side in ("lora_A", "lora_B"))
    stored = replace(_stored(), spec=replace(_stored().spec, sites=sites))
    loaded: Any = SimpleNamespace(plain=stored, adapters=SimpleNamespace(layer_count=2))
    served = uniform(mean_field(loaded), vllm.RANKS)
    for name, (A, B) in stored.matrices.items():
        a, b = served.matrices[name]
        after = served.spec.alpha / served.spec.rank * b.double() @ a.double()
        assert torch.allclose(0.25 * 8.0 / 3.0 * B.double() @ A.double(), after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [
    {}, {"rslora": True}, {"rank_pattern": {"q_proj": 12}}, {"alpha_pattern": {"up_proj": 3.0}},
    {"rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"k_proj": 2.5}},
])  # fmt: skip
def test_one_rank_and_one_scaling_are_the_same_update(changes: dict[str, Any]) -> None:
    stored = _stored(**changes)
    served = uniform(stored, vllm.RANKS)
    assert served.spec.rank == (16 if "q_proj" in changes.get("rank_pattern", {}) else 8)
    for name, (A, B) in stored.matrices.items():
        a, b = served.matrices[name]
        assert a.shape == (served.spec.rank, 6) and b.shape == (5, served.spec.rank)
        before = stored.spec.scaling_of(name) * B.double() @ A.double()
        after = served.spec.alpha / served.spec.rank * b.double() @ a.double()  # all that SGLang knows of scalings
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-6)
        if not changes:
            assert torch.equal(b[:, :3], B)


def test_what_is_written_breaks_no_rule_and_what_is_changed_does(tmp_path: Path) -> None:
    for engine in (vllm.ENGINE, sglang.ENGINE):
        folder = _written(tmp_path / engine.name, uniform(_stored(rslora=True), engine.ranks))
        assert faults(engine, folder) == []
        assert read_adapter(folder).spec.rank == 8
        plain = _written(tmp_path / f"{engine.name}-plain", _stored(rslora=True, alpha_pattern={"q_proj": 1.0}))
        assert {"use_rslora is set", "alpha_pattern is set"} < set(faults(engine, plain))
        assert any(fault.startswith("rank 3 is none of 8, 16") for fault in faults(engine, plain))
        config = read_json(folder / "adapter_config.json")
        for key, value, fault in (
            ("use_dora", True, "use_dora is set"), ("modules_to_save", ["lm_head"], "modules_to_save is set"),
            ("bias", "all", "without biases"), ("target_modules", "all-linear", "target_modules is no list"),
            ("peft_type", "ADALORA", "is no LoRA"),
        ):
            write_json(folder / "adapter_config.json", {**config, key: value})
            assert any(fault in found for found in faults(engine, folder)), key
        write_json(folder / "adapter_config.json", config)
        tensors = load_file(folder / "adapter_model.safetensors")
        key = "base_model.model.model.layers.0.block.q_proj.lora_A.weight"
        head = {"base_model.model.lm_head.lora_A.weight": tensors[key].clone()}
        for changed, fault in (
            ({**tensors, **head}, "lm_head.lora_A.weight is no matrix"),
            ({**tensors, key: tensors[key][:4].clone()}, "has shape (4, 6) at rank 8"),
            ({name: one for name, one in tensors.items() if name != key}, "q_proj lacks a matrix"),
            ({key.replace("base_model.model.", ""): tensors[key]}, "it adapts nothing"),
        ):
            save_file(changed, folder / "adapter_model.safetensors")
            assert any(fault in found for found in faults(engine, folder)), fault
        (folder / "adapter_model.safetensors").write_bytes(b"torn")
        assert faults(engine, folder)


def test_what_an_engine_cannot_serve_is_refused_with_the_way_out() -> None:
    good = _stored()
    for engine in (vllm.ENGINE, sglang.ENGINE):
        refuse(engine, CAUSAL, "llama", good)
        refuse(engine, CAUSAL, "qwen2", _stored(("q_proj", "v_proj")))
        head = StoredAdapter(good.spec, good.matrices, "", None, HeadState(("score",), {}))
        for order, family, stored, fault in (
            (SimpleNamespace(model_kind="classifier"), "bert", good, "modules_to_save"),
            (CAUSAL, "llama", head, "modules_to_save"),
            (CAUSAL, "gpt2", good, "layers of a gpt2"),
            (CAUSAL, "llama", replace(good, matrices={"lm_head": good.matrices[next(iter(good.matrices))]}), "lm_head"),
            (CAUSAL, "llama", _stored(rank=1024), "has rank 1024"),
        ):
            with pytest.raises(ConfigError, match=fault) as refused:
                refuse(engine, order, family, stored)  # type: ignore[arg-type]
            assert f"Leave {engine.name} out" in str(refused.value)
    refuse(vllm.ENGINE, CAUSAL, "llama", _stored(("v_proj",)))
    for leaves, fault in ((("v_proj", "o_proj"), "q_proj and v_proj"), (("up_proj",), "gate_proj and up_proj")):
        with pytest.raises(ConfigError, match=f"SGLang stacks {fault}"):
            refuse(sglang.ENGINE, CAUSAL, "llama", _stored(leaves))
