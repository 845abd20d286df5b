"""Quantized bases: attaching is the identity, and evaluation does no harm to the next training step.

On CPUs with AVX512-BF16 bitsandbytes repacks a 4-bit weight in an eval-mode forward; a training forward after that
passes no gradient to its input. The controls show that these tests see exactly this.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from helpers.families import LORA_DROPOUT, SITES, examples, gradients, load_tiny, trained_start
from helpers.reference import dense_model, dense_update
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.loss.objective import SupervisedLM
from pipeline.model.load import pin_training_mode
from pipeline.prediction.passes import PassSettings, predict_completions
from pipeline.training.batch import lay_out

IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(1))
needs_repacking = pytest.mark.skipif(
    not has_avx512bf16(), reason="this CPU has no AVX512-BF16: bitsandbytes does not repack"
)


@pytest.mark.usefixtures("stock_attention")
@pytest.mark.parametrize("precision", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attaching_is_the_identity_bit_for_bit(family: str, precision: str, tmp_path: Path) -> None:
    model = load_tiny(tmp_path, family, precision)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = model(IDS).logits
            adapters = attach(model, [AdapterSpec(sites=LORA_DROPOUT), AdapterSpec(rank=2)], "all-linear", seed=0)
            with adapters.axis.active(adapters.plan([Member(0, 0), Member(1)], 2, MaskKey(0, 0))):
                assert torch.equal(model(IDS).logits, before)
        model = load_tiny(tmp_path, family, precision)


def dequantized(model: nn.Module) -> nn.Module:
    """A stock float64 model with the weights that the 4-bit layers stand for."""
    from bitsandbytes.functional import dequantize_4bit

    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if type(module).__name__ == "Linear4bit":
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, linear)
    return plain.double()


def test_members_on_an_nf4_base_equal_the_dense_reference(tmp_path: Path) -> None:
    """Masked members over 4-bit layers against W(dequantized) + ΔW in float64: logits and gradients within 1e-4."""
    model = load_tiny(tmp_path)
    dense = dequantized(model)
    adapters = trained_start(attach(model, [AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT)], "all-linear", seed=0))
    members = [Member(0, 0), Member(0, 1)]
    plan = adapters.plan(members, 2, MaskKey(0, 0))
    ones, positions = torch.ones_like(IDS), torch.arange(7).repeat(4, 1)
    with adapters.axis.active(plan):
        ours = model(IDS, attention_mask=ones, position_ids=positions).logits
    parts = []
    for m in range(2):
        updates = {
            name: dense_update(layer.buckets[0].lora_A[0], layer.buckets[0].lora_B[0], 2.0,
                               plan.masks[name]["lora_A"][m], plan.masks[name]["lora_B"][m])
            for name, layer in adapters.layers.items()
        }
        rows = slice(2 * m, 2 * m + 2)
        parts.append(dense_model(dense, updates, IDS[rows], ones[rows], positions[rows]))
    theirs = torch.cat(parts)
    leaves, direction = [p for p in model.parameters() if p.requires_grad], torch.randn(theirs.shape)
    found = torch.autograd.grad(ours, leaves, direction)
    expected = torch.autograd.grad(theirs, leaves, direction.double())
    assert float((ours - theirs).detach().abs().max()) <= 1e-4 * float(theirs.detach().abs().max())
    for got, wanted in zip(found, expected, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def training_gradients(adapters: Adapters) -> dict[str, Tensor]:
    """One training pass under dropout, as the training loop runs it."""
    adapters.model.train()
    rows = lay_out(adapters, examples([7, 5, 9, 6]), split_layout(range(4), 2), 2, MaskKey(1, 0))
    with adapters.axis.active(rows.plan):
        SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights).backward()
    return gradients(adapters)


def evaluate(adapters: Adapters) -> None:
    """Every way into eval mode: the predictor, and a bare model.eval()."""
    members = [Member(0), Member(0, 1), Member(None)]
    predict_completions(adapters, examples([7, 5]), members, PassSettings(2, 10**6, MaskKey(0, "test")))
    adapters.model.eval()
    with torch.no_grad():
        adapters.model(IDS)


@pytest.mark.parametrize(
    ("site", "precision"), [*((site, "nf4") for site in (*SITES, "lora_dropout")), ("lora_dropout", "int8")]
)
def test_train_eval_train_changes_no_bit_of_the_gradients(site: str, precision: str, tmp_path: Path) -> None:
    """Also where a quantized layer is no target, so that nothing of ours wraps it."""
    targets = "all-linear" if site == "lora_dropout" else ["q_proj", "down_proj"]
    spec = AdapterSpec(rank=4, sites=SITES.get(site, LORA_DROPOUT))
    adapters = trained_start(attach(load_tiny(tmp_path, "llama", precision), [spec], targets, seed=0))
    first = training_gradients(adapters)
    assert len(first) == 2 * len(adapters.layers) and all(gradient.any() for gradient in first.values())
    evaluate(adapters)
    assert_same_bits(first, training_gradients(adapters))


def test_the_wrapper_alone_keeps_its_base_in_training_mode(tmp_path: Path) -> None:
    """A base that nobody pinned, wrapped in every quantized layer."""
    model = load_tiny(tmp_path)
    unpin(model)
    adapters = trained_start(attach(model, [AdapterSpec(rank=4, sites=LORA_DROPOUT)], "all-linear", seed=0))
    first = training_gradients(adapters)
    evaluate(adapters)
    assert_same_bits(first, training_gradients(adapters))


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name


def unpin(model: nn.Module) -> None:
    """Undo `pin_training_mode`: what the layers would do by themselves."""
    for module in model.modules():
        module.__dict__.pop("train", None)


@needs_repacking
def test_control_a_quantized_layer_in_eval_mode_loses_its_input_gradient(tmp_path: Path) -> None:
    """bitsandbytes alone, without anything of ours: the fault that the tests above guard against."""
    layer = load_tiny(tmp_path).model.layers[0].mlp.up_proj
    x = torch.randn(4, 64)

    def input_gradient() -> Tensor | None:
        leaf = x.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (layer(leaf).sum() + 0.0 * leaf.sum()).backward()
        return leaf.grad

    before = input_gradient()
    unpin(layer)
    layer.eval()
    with torch.no_grad():
        layer(x)
    layer.train()
    assert before.abs().max() > 0 and not input_gradient().any()


@needs_repacking
def test_control_train_eval_train_without_the_pin_is_noticed(tmp_path: Path) -> None:
    """The same steps as above on unpinned layers: gradients go missing or change."""
    model = load_tiny(tmp_path)
    unpin(model)
    adapters = trained_start(attach(model, [AdapterSpec(rank=4, sites=LORA_DROPOUT)], ["q_proj", "down_proj"], seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = training_gradients(adapters)
        evaluate(adapters)
        with pytest.raises(AssertionError):
            assert_same_bits(first, training_gradients(adapters))


def test_every_quantized_layer_stays_in_training_mode(tmp_path: Path) -> None:
    model = load_tiny(tmp_path)
    attach(model, [AdapterSpec()], ["q_proj"], seed=0)
    quantized = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for mode in (False, True, False):
        model.train(mode)
        assert len(quantized) == 14 and all(module.training for module in quantized)
        assert model.model.norm.training is mode
    assert pin_training_mode(model) == 14
