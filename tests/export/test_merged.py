"""Merging against dense float64 sums, and what is not merged."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.heads import HeadState
from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig, load_config
from pipeline.config.evaluate import ExportConfig
from pipeline.data.splits import Splits
from pipeline.errors import ConfigError
from pipeline.export.alone.folder import Form
from pipeline.export.alone.script import use_script
from pipeline.export.merged import merge, plan_dequantized, plan_merged, write_merged
from pipeline.export.order import Exported, Order, ParityError
from pipeline.export.targets import TARGETS
from pipeline.support.tiny import tiny_gpt2, tiny_llama, write_tiny_model

LAYERS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_fc"),
}


def stored(shapes: dict[str, tuple[int, int]], scale: float = 0.05, head: HeadState | None = None) -> StoredAdapter:
    """Of (O, I) layers."""
    random = torch.Generator().manual_seed(0)
    matrices = {
        name: (torch.randn(3, inputs, generator=random), scale * torch.randn(outputs, 3, generator=random))
        for name, (outputs, inputs) in shapes.items()
    }
    spec = AdapterSpec(rank=3, alpha=6.0, layers=frozenset(shapes), alpha_pattern={".*1.mlp.*": 12.0})
    return StoredAdapter(spec, matrices, "", None, head or HeadState())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_sum_rounded_once(family: str, dtype: torch.dtype) -> None:
    model = (tiny_llama() if family == "llama" else tiny_gpt2()).to(dtype)
    before = copy.deepcopy(model)
    transposed = family == "gpt2"
    shapes = {}
    for name in LAYERS[family]:
        shape = tuple(model.get_submodule(name).weight.shape)
        shapes[name] = shape[::-1] if transposed else shape
    adapter = stored(shapes)
    lost = merge(model, adapter, 2)
    assert lost < (1e-5 if dtype is torch.float32 else 0.05)
    for name, scaling in zip(LAYERS[family], (2.0, 4.0), strict=True):
        A, B = adapter.matrices[name]
        delta = scaling * B.double() @ A.double()
        exact = before.get_submodule(name).weight.double() + (delta.T if transposed else delta)
        tolerance = 2.0 ** -(22 if dtype is torch.float32 else 8)  # half a unit in the last place, and fp32's products
        assert ((model.get_submodule(name).weight.double() - exact).abs() <= tolerance * (1 + exact.abs())).all()
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in LAYERS[family]:
            assert torch.equal(parameter, before.get_parameter(name)), name


def test_an_adapter_that_rounding_takes_is_an_error() -> None:
    model = tiny_llama().to(torch.bfloat16)
    with pytest.raises(ParityError, match="equal those of the base"):
        merge(model, stored({LAYERS["llama"][0]: (64, 64)}, scale=1e-9), 2)


@pytest.mark.parametrize(("scale", "dtype"), [(0.05, torch.bfloat16), (1e-4, torch.float32)])
def test_weights_are_float32_where_rounding_would_take_the_adapter(
    scale: float, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, name = write_tiny_model(tmp_path / "base"), LAYERS["llama"][0]
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before.save_pretrained(base)
    adapter = stored({name: (64, 64)}, scale)
    loaded: Any = SimpleNamespace(
        identity=SimpleNamespace(compute_dtype="bfloat16", resolved=str(base), revision=None, classes=None),
        trusted=False, plain=adapter, adapters=SimpleNamespace(layer_count=2),
        task=SimpleNamespace(base=SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(base))),
    )
    write_merged(loaded, tmp_path, [Exported("merged", Member(0))])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert merged.dtype is dtype and ("in float32" in capsys.readouterr().err) == (dtype is torch.float32)
    A, B = adapter.matrices[name]
    delta, weight = 2.0 * B.double() @ A.double(), before.get_submodule(name).weight.double()
    found = merged.get_submodule(name).weight.double() - weight
    assert (found - delta).norm() < 0.1 * delta.norm()


def ordered(path: Path, matrices: tuple[str, ...], quantization: str = "nf4") -> Order:
    words = [f"model.path={path}", f"model.quantization={quantization}", "export.forms=[merged]"]
    config = load_config(None, words)
    adapter = stored(dict.fromkeys(matrices, (64, 64)))
    return Order(config, Splits([], [], [], [], ""), adapter, adapter, {}, "causal", False)


def test_what_cannot_be_merged_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tied")
    inside = LAYERS["llama"][:1]
    assert plan_merged(ordered(model, inside)) == [Exported("merged", Member(0))]
    assert plan_dequantized(ordered(model, inside)) == [Exported("merged_dequantized", Member(0))]
    with pytest.raises(ConfigError, match="shares its weights with it. Ask for adapter"):
        plan_merged(ordered(model, (*inside, "lm_head")))
    for quantization, what in (("none", "not quantized. Ask for merged"), ("int8", "no plain weights")):
        with pytest.raises(ConfigError, match=what):
            plan_dequantized(ordered(model, inside, quantization))
    apart = write_tiny_model(tmp_path / "apart", "qwen2")
    assert plan_merged(ordered(apart, (*inside, "lm_head")))  # a head of its own
    text = (apart / "config.json").read_text().replace("{", '{"quantization_config": {"quant_method": "gptq"},', 1)
    (apart / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="the base is stored quantized"):
        plan_merged(ordered(apart, inside))


def test_the_configuration_names_every_target() -> None:
    assert RunConfig(export=ExportConfig(forms=tuple(TARGETS))).export.forms == tuple(TARGETS)  # type: ignore[arg-type]
    assert all(name == target.name and target.help for name, target in TARGETS.items())


def test_a_script_has_the_lines_of_its_own_case_alone() -> None:
    base = {"files": {"model.safetensors": "00"}, "commit": None}
    reading = {
        "merged": False, "quantization": "nf4", "kind": "choice", "outputs": None, "base": base, "choice_score": "sum",
        "average": "probability", "temperature": 1.5,
    }
    adapter = use_script(reading, False)
    assert "module.train()" in adapter and "hashlib" in adapter and "PeftModel" in adapter
    cases = [
        ({"merged": True, "quantization": "none"}, ("peft", "bitsandbytes", "hashlib", "module.train()")),
        ({"base": {"files": {}, "commit": "abc"}}, ("hashlib",)),
        ({"outputs": 2}, ("ids_of", "CausalLM")),
        ({"outputs": 1, "kind": "regression", "average": "value", "quantization": "int8"}, ("log_softmax", "nf4")),
        ({"kind": "completion", "temperature": None, "average": "logit"}, ("temperature",)),
    ]
    for change, absent in cases:
        script = use_script({**reading, **change}, False)
        compile(script, "use.py", "exec")
        assert not [word for word in absent if word in script], change
        assert len(max(script.splitlines(), key=len)) <= 120 and "loradrop" not in script


def test_members_of_a_form_have_the_weights_of_the_ensemble() -> None:
    """Also the adapter without masks among draws, and the same draws in another form's folders."""
    entries = [
        {"folder": "adapter", "draw": None}, {"folder": "draws/draw_002", "draw": 2},
        {"folder": "other/two", "draw": 2},
    ]
    ensemble = {
        "members": ["draws/draw_002", "adapter"], "weights": [0.75, 0.25], "average": "logit",
        "temperature": {"value": 2.0},
    }
    result = {
        "ensemble": {"chosen": "masks_2", "members": [2, None]},
        "systems": [{"key": "masks_2", "test": {"before": {"nll": {"value": 0.5}}}}],
    }
    alone = {"average": "logit", "temperature": None}
    form = Form.of([Exported("other/two", Member(0, 2))], entries, alone, ensemble, result)
    assert (form.members, form.draws, form.weights) == (["other/two", "adapter"], [2, None], [0.75, 0.25])
    assert form.readout["temperature"] == {"value": 2.0} and form.scores == {"before": {"nll": 0.5}}
    single = Form.of([Exported("adapter", Member(0))], entries, alone, ensemble, result)
    assert (single.members, single.draws, single.weights, single.scores) == (["adapter"], [None], [1.0], {})
