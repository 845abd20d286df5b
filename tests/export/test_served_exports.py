"""An adapter of a tiny model for llama.cpp, vLLM and SGLang: what loads it computes what we do."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.adapters.peft_format import StoredAdapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.data.splits import load_splits
from pipeline.export.engines import served
from pipeline.export.engines.vllm import PYTHON
from pipeline.export.gguf import target as gguf_target
from pipeline.export.gguf.target import TOOL
from pipeline.export.order import Exported, Loaded, Order, ParityError
from pipeline.export.targets import TARGETS, verified
from pipeline.files import read_json
from pipeline.stages.export import load
from pipeline.support.tiny import tiny_decoder, tiny_tokenizer, write_tiny_data

pytestmark = pytest.mark.slow
RUN = [
    "data.train_rows=32", "data.validation_rows=16", "data.calibration_rows=20", "data.test_rows=20",
    "data.max_tokens=64", "model.compute_dtype=float32", "export.draws=1", "export.forms=[draws, gguf, vllm, sglang]",
]


def _adapter() -> StoredAdapter:
    """Every linear of the tiny llama, as a run with LoRA Dropout, rsLoRA and an alpha pattern leaves it."""
    sites = load_config(None, ["data.path=x.jsonl"]).adapter.resolved_method().sites
    shapes = {
        "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
        "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
    }
    torch.manual_seed(0)
    matrices = {
        f"model.layers.{layer}.{name}": (0.2 * torch.randn(3, inputs), 0.2 * torch.randn(outputs, 3))
        for layer in range(2) for name, (outputs, inputs) in shapes.items()
    }
    spec = AdapterSpec(3, 8.0, True, sites, alpha_pattern={"v_proj": 5.0}, layers=frozenset(matrices))
    return StoredAdapter(spec, matrices, "sha256", None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder, the order with its model, and the manifest's entries by form."""
    folder = tmp_path_factory.mktemp("served")
    model, rows = folder / "model", write_tiny_data(folder / "rows.jsonl", 150)
    tiny_decoder("llama", num_attention_heads=2, num_key_value_heads=1).save_pretrained(model)  # vLLM: 32 per head
    tiny_tokenizer().save_pretrained(model)
    config = load_config(None, [f"model.path={model}", f"data.path={rows}", *RUN])
    stored = _adapter()
    loaded = load(Order(config, load_splits(config.data), stored, stored, {}, "causal", False))
    planned = {name: TARGETS[name].plan(loaded) for name in ("gguf", "vllm", "sglang")}
    for name, ones in planned.items():
        TARGETS[name].write(loaded, folder, ones)
    entries = {one["folder"]: one for one in verified(loaded, folder, planned)}
    return SimpleNamespace(folder=folder, loaded=loaded, planned=planned, entries=entries)


def test_llama_cpp_says_what_we_do(exported: Any) -> None:
    if importlib.util.find_spec(TOOL) is None:
        pytest.skip(f"llama.cpp is not installed ({TOOL})")
    said = exported.entries["gguf"]
    assert said["verified"] and said["tool"].startswith(TOOL)
    assert said["max_effect"] > 1 and said["ratio"] < 1e-3 and said["base_noise"] < 1e-4


def test_llama_cpp_shows_an_adapter_that_does_nothing(exported: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec(TOOL) is None:
        pytest.skip(f"llama.cpp is not installed ({TOOL})")
    loaded: Loaded = exported.loaded
    zero = {name: (A, torch.zeros_like(B)) for name, (A, B) in loaded.plain.matrices.items()}
    empty = StoredAdapter(loaded.plain.spec, zero, "sha256", None)
    gguf_target.write_gguf(Loaded(**{**vars(loaded), "plain": empty}), tmp_path, exported.planned["gguf"])
    with pytest.raises(ParityError, match="adapter.gguf: llama.cpp says what the base model says"):
        gguf_target.verify_gguf(loaded, tmp_path, exported.planned["gguf"])


def test_without_llama_cpp_the_file_is_written_and_called_unverified(
    exported: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gguf_target, "TOOL", "a_package_that_nobody_has")
    (entry,) = gguf_target.verify_gguf(exported.loaded, exported.folder, exported.planned["gguf"])
    assert not entry["verified"] and "pip install" in entry["verify"] and "loradrop export" in entry["verify"]
    assert "not verified" in "".join(capsys.readouterr())
    assert {one.name for one in (exported.folder / "gguf").iterdir()} == {"adapter.gguf", "serve.txt"}


def test_engines_get_one_rank_and_one_scaling(exported: Any) -> None:
    for name in ("vllm", "sglang"):
        for member in ("adapter", "draw_000"):
            said = exported.entries[f"{name}/{member}"]
            assert said["max_effect"] > 1 and said["ratio"] < 1e-3  # by stock PEFT
            assert said["verified"] or ("rules of" in said["checked"] and "not run" in said["checked"])
            config = read_json(exported.folder / name / member / "adapter_config.json")
            assert config["r"] == 8 and not config["use_rslora"] and not config["alpha_pattern"]
        command = (exported.folder / name / "serve.txt").read_text(encoding="utf-8")
        assert "--max-lora-rank 8" in command and "draw_000=draw_000" in command and "nf4" in command
        assert str(exported.folder) not in command and "any folder whose weights have the hashes" in command


def test_vllm_itself_says_what_we_do(exported: Any) -> None:
    if not os.environ.get(PYTHON):
        pytest.skip(f"vLLM is not installed (${PYTHON} names no Python)")
    for member in ("adapter", "draw_000"):
        measured = exported.entries[f"vllm/{member}"]["engine"]
        assert measured["tool"].startswith("vllm ") and measured["max_effect"] > 1 and measured["ratio"] < 1e-2


def test_a_folder_that_an_engine_would_not_load_is_no_export(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "uniform", _as_it_is)
    ones: list[Exported] = exported.planned["vllm"]
    served.write(exported.loaded, tmp_path, ones)
    with pytest.raises(ParityError, match="vLLM .* would not serve it: use_rslora is set.*rank 3 is none of"):
        served.verify(exported.loaded, tmp_path, ones)


def _as_it_is(stored: StoredAdapter, ranks: Sequence[int]) -> StoredAdapter:
    return stored
