"""What is timed: both sides compute the same, and the limit is that of the linears that are adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.checkout import ROOT, Checkout
from benchmarks.passes import (
    KEY,
    StockStep,
    config_of,
    our_adapters,
    packed_layout,
    prompt_tokens,
    random_examples,
    stock_peft,
)
from benchmarks.products import Products
from benchmarks.setting import SCALES, Setting
from pipeline.adapters.attach import Adapters, linear_shape
from pipeline.adapters.layout import RowLayout, plain_layout, split_layout
from pipeline.data.encode import Encoded
from pipeline.loss.objective import SupervisedLM
from pipeline.training.batch import lay_out


@pytest.fixture
def setting(tiny_folder: Path, tmp_path: Path) -> Setting:
    overrides = (f"model.path={tiny_folder / 'model'}", "model.quantization=none", "adapter.rank=4")
    return Setting(SCALES["small"], tmp_path, Checkout(ROOT, "here"), repeats=1, overrides=overrides)


def loss_of(adapters: Adapters, examples: list[Encoded], layout: RowLayout) -> torch.Tensor:
    rows = lay_out(adapters, examples, layout, 0, KEY)
    with adapters.axis.active(rows.plan):
        loss = SupervisedLM(adapters.model)(**rows.model_tensors, row_weights=rows.weights)
        loss.backward()
    return loss.detach()


def test_a_pack_has_the_gradients_of_its_runs(setting: Setting) -> None:
    pack = our_adapters(setting, "float32", runs=3)
    with torch.no_grad():
        for layer in pack.layers.values():
            torch.nn.init.normal_(layer.buckets[0].lora_B, std=0.1)  # type: ignore[arg-type]
    examples = random_examples(pack.model, 6, 8)
    loss_of(pack, examples, packed_layout(3, 2))
    together = {name: layer.buckets[0].lora_A.grad.clone() for name, layer in pack.layers.items()}  # type: ignore[union-attr]
    pack.model.zero_grad()
    for run in range(3):
        loss_of(pack, examples[2 * run : 2 * run + 2], split_layout(range(2), 4, run))
    for name, layer in pack.layers.items():
        alone = layer.buckets[0].lora_A.grad
        assert float(alone.abs().max()) > 0.0  # type: ignore[union-attr]
        torch.testing.assert_close(together[name], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))  # type: ignore[union-attr]


def test_stock_peft_has_the_loss_that_we_have(setting: Setting) -> None:
    ours, stock = our_adapters(setting, "float32"), stock_peft(setting, "float32", 0.0)
    examples = random_examples(ours.model, 4, 8)
    expected = loss_of(ours, examples, plain_layout(4))
    for own_loss, supervised in ((False, 1), (True, 4)):
        theirs = StockStep(stock, examples, own_loss).loss().detach() * supervised
        torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-6)
    adapted = sum(parameter.numel() for parameter in stock.parameters() if parameter.requires_grad)
    assert adapted == sum(parameter.numel() for parameter in ours.model.parameters() if parameter.requires_grad) > 0


def test_the_products_are_those_of_the_adapted_linears(setting: Setting) -> None:
    ours, products = our_adapters(setting, "float32"), Products(config_of(setting, "float32"), "cpu")
    weights = sum(i * o for i, o in (linear_shape(layer.base) for layer in ours.layers.values()))
    assert products.operations(10, backward=False) == 2 * 10 * weights
    assert products.operations(10, backward=True) == 4 * 10 * weights
    seen: list[tuple[int, ...]] = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append((*args[-2].shape, args[-1].shape[1]))
            return result

    work = products.work(10, backward=True)
    with Counting():
        work()
    assert sum(2 * m * k * n for m, k, n in seen) == products.operations(10, backward=True)


def test_prompt_tokens_leave_answers_out(tiny_settings: list[str], setting: Setting) -> None:
    from pipeline.config import load_config
    from pipeline.data.splits import load_splits
    from pipeline.support.tiny import tiny_tokenizer

    config = load_config("default", tiny_settings)
    rows = load_splits(config.data).validation[:5]
    assert prompt_tokens(config, rows, tiny_tokenizer()) == sum(len(row.prompt.split()) for row in rows)


def test_packed_layout() -> None:
    layout = packed_layout(2, 3)
    assert [(member.adapter, member.draw) for member in layout.members] == [(k, s) for k in (0, 1) for s in (0, 1, 2)]
    assert layout.rows == 1 and layout.source == tuple(range(6)) and layout.weights == (1.0,) * 6
