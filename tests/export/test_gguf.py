"""llama.cpp's files against independent references: its rotation of neighbouring rows, and what is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.adapters.heads import HeadState
from pipeline.adapters.peft_format import StoredAdapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.errors import ConfigError
from pipeline.export.gguf.adapter import check_adapter, write_adapter_gguf
from pipeline.export.gguf.model import base_weights, merged, write_model_gguf
from pipeline.export.gguf.names import ARCHITECTURES, Shape, paired_rows
from pipeline.support.tiny import tiny_decoder

PROJECTIONS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""transformers' names -> llama.cpp's, written out."""


def test_rotating_neighbours_gives_the_scores_of_rotating_halves() -> None:
    torch.manual_seed(0)
    heads, width, inputs = 3, 8, 5
    q, k = torch.randn(heads * width, inputs).double(), torch.randn(heads * width, inputs).double()
    x, y = torch.randn(inputs).double(), torch.randn(inputs).double()

    def scores(rotate: Any, q: Tensor, k: Tensor) -> Tensor:
        return (rotate((q @ x).view(heads, width), 7) * rotate((k @ y).view(heads, width), 3)).sum(-1)

    ours = scores(_halves, q, k)
    theirs = scores(_neighbours, paired_rows(q, heads), paired_rows(k, heads))
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert not torch.allclose(ours, scores(_neighbours, q, k), atol=1e-3)  # the order of rows matters


def _angles(width: int, position: int) -> Tensor:
    return position * 10000.0 ** (-torch.arange(0, width, 2).double() / width)


def _halves(v: Tensor, position: int) -> Tensor:
    """transformers: (i, i + D/2)."""
    a, b = v.chunk(2, -1)
    turn = torch.polar(torch.ones(a.shape[-1]).double(), _angles(v.shape[-1], position))
    turned = torch.complex(a, b) * turn
    return torch.cat([turned.real, turned.imag], -1)


def _neighbours(v: Tensor, position: int) -> Tensor:
    """llama.cpp's LLAMA_ROPE_TYPE_NORM: (2i, 2i + 1)."""
    turn = torch.polar(torch.ones(v.shape[-1] // 2).double(), _angles(v.shape[-1], position))
    turned = torch.complex(v[..., ::2], v[..., 1::2]) * turn
    return torch.stack([turned.real, turned.imag], -1).flatten(-2)


def _adapter(model: Any, rank: int = 3, **changes: Any) -> StoredAdapter:
    torch.manual_seed(1)
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in PROJECTIONS]
    matrices = {}
    for name in names:
        outputs, inputs = model.get_submodule(name).weight.shape
        matrices[name] = (torch.randn(rank, inputs), torch.randn(outputs, rank))
    return StoredAdapter(AdapterSpec(rank, 8.0, layers=frozenset(names), **changes), matrices, "sha256", None)


def _read(path: Path) -> tuple[dict[str, np.ndarray], gguf.GGUFReader]:
    reader = gguf.GGUFReader(path)
    return {tensor.name: np.array(tensor.data) for tensor in reader.tensors}, reader


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    return reader.get_field(key).contents()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_base_and_adapter_are_read_back_as_the_merged_model(tmp_path: Path, family: str) -> None:
    model = tiny_decoder(family, **({"sliding_window": None} if family == "mistral" else {}))
    changes = {"rslora": True, "alpha_pattern": {"v_proj": 5.0}, "rank_pattern": {}}
    stored, shape = _adapter(model, **changes), Shape.of(model.config)
    write_model_gguf(tmp_path / "base.gguf", base_weights(model), model.config, torch.float32, "tiny")
    write_model_gguf(tmp_path / "merged.gguf", merged(base_weights(model), stored), model.config, torch.float32, "tiny")
    write_adapter_gguf(tmp_path / "adapter.gguf", stored, shape, "tiny")
    base, of_base = _read(tmp_path / "base.gguf")
    whole, _ = _read(tmp_path / "merged.gguf")
    adapter, of_adapter = _read(tmp_path / "adapter.gguf")
    assert _value(of_adapter, "general.type") == "adapter" and _value(of_adapter, "adapter.type") == "lora"
    assert _value(of_base, "general.architecture") == _value(of_adapter, "general.architecture")
    expected = {f"blk.{layer}.{name}.weight" for layer in range(2) for name in PROJECTIONS.values()}
    assert set(adapter) == {f"{name}.lora_{part}" for name in expected for part in "ab"}
    alpha = _value(of_adapter, "adapter.lora.alpha")
    for name in expected:  # what llama.cpp computes: W x + alpha / R · B (A x)
        A, B = adapter[f"{name}.lora_a"].astype(np.float64), adapter[f"{name}.lora_b"].astype(np.float64)
        update = alpha / len(A) * B @ A
        assert np.abs(base[name] + update - whole[name]).max() < 1e-4 and np.abs(update).max() > 1
    rest = set(base) - expected
    assert {"token_embd.weight", "output_norm.weight"} < rest and set(whole) == set(base)
    assert all(np.array_equal(base[name], whole[name]) for name in rest)
    assert ("output.weight" in base) != model.config.tie_word_embeddings


def test_rows_of_queries_and_keys_alone_change_places_and_only_where_neighbours_are_rotated() -> None:
    llama, qwen = tiny_decoder("llama"), tiny_decoder("qwen2")
    weight = llama.model.layers[0].self_attn.k_proj.weight.detach()  # (32, 64): 2 heads of 16
    for model, name, moves in (
        (llama, "self_attn.k_proj", True), (llama, "self_attn.v_proj", False), (qwen, "self_attn.k_proj", False),
    ):
        rows = Shape.of(model.config).stored_rows(f"model.layers.0.{name}.weight", weight)
        assert torch.equal(rows, weight) != moves
    moved = Shape.of(llama.config).stored_rows("model.layers.0.self_attn.k_proj", weight)
    assert torch.equal(moved[16 + 2 * 3], weight[16 + 3]) and torch.equal(moved[16 + 2 * 3 + 1], weight[16 + 3 + 8])


def test_what_llama_cpp_would_drop_or_read_as_something_else_is_refused() -> None:
    model = tiny_decoder("llama")
    stored = _adapter(model)
    head = {"lm_head": next(iter(stored.matrices.values()))}
    with_head = StoredAdapter(stored.spec, {**stored.matrices, **head}, "", None)
    check_adapter(with_head, tied=False)
    with pytest.raises(ConfigError, match="lm_head is adapted"):
        check_adapter(with_head, tied=True)
    whole = StoredAdapter(stored.spec, stored.matrices, "", None, HeadState(("classifier",), {}))
    with pytest.raises(ConfigError, match="trains classifier whole"):
        check_adapter(whole, tied=False)
    for config, fault in (
        (tiny_decoder("gpt2").config, "the model is a gpt2"),
        (tiny_decoder("mistral").config, "reaches 4 tokens back"),
        (_scaled(model.config), "positions are scaled"),
    ):
        with pytest.raises(ConfigError, match=fault):
            Shape.of(config)
    with pytest.raises(ConfigError, match="no place for model.layers.0.mlp.shrink_proj.weight"):
        Shape.of(model.config).stored_name("model.layers.0.mlp.shrink_proj.weight")


def _scaled(config: Any) -> Any:
    other = type(config)(**config.to_dict())
    other.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4}
    return other
