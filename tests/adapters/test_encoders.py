"""Encoders: a trained head beside every adapter, against a dense float64 model and stock PEFT."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import ENCODERS, attach_encoder, load_encoder, texts, trained_encoder, weights_of
from helpers.families import CPU, LORA_DROPOUT
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.heads import head_state, load_head
from pipeline.adapters.layout import replicate_layout, split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.peft_format import adapter_matrices, load_matrices, masked_matrices, read_adapter, write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.config.model import ModelConfig
from pipeline.errors import ConfigError, RunFolderError
from pipeline.loss.objective import SupervisedClassifier
from pipeline.model.load import load_base
from pipeline.prediction.passes import PassSettings, predict_classes
from pipeline.support.tiny import tiny_llama, tiny_tokenizer, write_encoder
from pipeline.training.batch import lay_out

KEY = MaskKey(11, "test")
IDS = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
PLAIN = AdapterSpec(rank=4, alpha=8.0)
MIXED = (
    AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT),
    AdapterSpec(rank=2, alpha=3.0, sites=(Site(position="lora_rank", rate=0.5, compensation="none"),)),
)
MEMBERS = [Member(0, 0), Member(None), Member(1), Member(0), Member(1, 3), Member(0, 1), Member(1, 0)]


def logits(adapters: Adapters, members: list[Member], ids: Tensor = IDS) -> Tensor:
    """(M, B, C)."""
    with adapters.axis.active(adapters.plan(members, len(ids), KEY)):
        found = adapters.model(input_ids=ids.repeat(len(members), 1)).logits
    return found.view(len(members), len(ids), -1)


def dense_logits(adapters: Adapters, stock: nn.Module, members: list[Member], ids: Tensor = IDS) -> Tensor:
    masks = adapters.plan(members, len(ids), KEY).masks
    passes = [
        functional_call(stock, weights_of(adapters, stock, member, masks, m), kwargs={"input_ids": ids}).logits
        for m, member in enumerate(members)
    ]
    return torch.stack(passes)


# --- forward and gradients against a dense model ----------------------------------------------------------------------


@pytest.mark.parametrize("family", list(ENCODERS))
def test_members_with_heads_of_their_own_equal_dense_models(family: str, tmp_path: Path) -> None:
    """Any mix of adapters, draws and the base in one pass; logits, and gradients of A, B and the heads."""
    base = load_encoder(tmp_path, family)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, *MIXED)
    ours, theirs = logits(adapters, MEMBERS), dense_logits(adapters, stock, MEMBERS)
    assert ours.dtype == torch.float32
    size = float(theirs.detach().abs().max())
    assert float((ours.double() - theirs).detach().abs().max()) <= 1e-5 * size
    assert float((theirs[2] - theirs[3]).detach().abs().max()) > 0.1 * size, "the members differ"
    leaves = {name: p for name, p in adapters.model.named_parameters() if p.requires_grad}
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(ours, list(leaves.values()), direction)
    wanted = torch.autograd.grad(theirs, list(leaves.values()), direction.double())
    for name, got, expected in zip(leaves, found, wanted, strict=True):
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got.double() - expected.double()).abs().max()) <= 2e-5 * scale, name


def test_a_mixed_pass_equals_a_pass_for_each_member(tmp_path: Path) -> None:
    adapters = trained_encoder(load_encoder(tmp_path, "roberta"), *MIXED)
    together = logits(adapters, MEMBERS)
    for m, member in enumerate(MEMBERS):
        torch.testing.assert_close(together[m], logits(adapters, [member])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("stock_attention")
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_attaching_is_the_identity_up_to_the_head(family: str, tmp_path: Path) -> None:
    """What enters the head has the stock model's bits, whatever the members; with its start as the classifier of the
    stock model, so has what comes out of the first adapter and of the base."""
    base = load_encoder(tmp_path, family)
    stock = copy.deepcopy(base.model)
    adapters = attach_encoder(base, AdapterSpec(sites=LORA_DROPOUT), AdapterSpec(rank=2))
    stock.classifier.load_state_dict(adapters.heads["classifier"].start.state_dict())
    entered: list[Tensor] = []
    for model in (stock, adapters.model):
        model.classifier.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    expected = stock(input_ids=IDS.repeat(3, 1)).logits.view(3, 3, -1)
    second = logits(adapters, [Member(1), Member(0, 0), Member(None)])[0]
    assert torch.equal(*entered)
    assert not torch.allclose(second, expected[0]), "the second adapter starts from a head of its own"
    assert torch.equal(logits(adapters, [Member(0), Member(0, 0), Member(0, 1)]), expected)
    assert torch.equal(logits(adapters, [Member(None)] * 3), expected)


def test_heads_start_from_seed_and_adapter_alone(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, "roberta")

    def heads(specs: int, seed: int) -> list[Tensor]:
        adapters = attach_encoder(load_encoder(folder), *[PLAIN] * specs, seed=seed)
        head = adapters.heads["classifier"]
        return [head.start.dense.weight, *(module.dense.weight for module in head.copies)]

    start, first, second = heads(2, 0)
    assert torch.equal(start, first) and not torch.equal(first, second)
    assert torch.equal(heads(1, 0)[1], first) and not torch.equal(heads(1, 3)[1], first)
    assert float(first.std()) == pytest.approx(0.2, rel=0.05), "N(0, initializer_range²)"
    bias = attach_encoder(load_encoder(folder), PLAIN).heads["classifier"].copies[0].out_proj.bias
    assert not bias.any()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_loss_and_gradients_of_a_training_pass_equal_the_dense_model(family: str, tmp_path: Path) -> None:
    """Rows of different lengths, padded, under two draws each: Σ ½ · cross-entropy of every unpadded row by itself."""
    base = load_encoder(tmp_path, family)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, MIXED[0])
    rows = texts([3, 9, 6])
    built = lay_out(adapters, rows, replicate_layout(3, 2), 1, KEY, "right")
    with adapters.axis.active(built.plan):
        ours = SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights)
        ours.backward()
    found = {name: p.grad for name, p in adapters.model.named_parameters() if p.requires_grad}
    adapters.model.zero_grad()
    theirs = torch.zeros((), dtype=torch.float64)
    for m, member in enumerate(built.plan.members):
        weights = weights_of(adapters, stock, member, built.plan.masks, m)
        for i, row in enumerate(rows):
            ids = torch.tensor([row.input_ids])
            alone = functional_call(stock, weights, kwargs={"input_ids": ids}).logits[0]
            theirs = theirs - 0.5 * alone.log_softmax(-1)[i % 3]
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad:
            scale = max(float(parameter.grad.abs().max()), 1e-3)
            assert float((found[name] - parameter.grad).abs().max()) <= 2e-5 * scale, name


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_activation_checkpointing_changes_no_bit_of_an_encoders_gradients(family: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        adapters = trained_encoder(load_encoder(tmp_path, family, "nf4"), MIXED[0])
        if checkpointing:
            adapters.model.gradient_checkpointing_enable({"use_reentrant": False})
        built = lay_out(adapters, texts([9, 4, 6]), split_layout(range(3), 2), 1, MaskKey(0, 0), "right")
        with adapters.axis.active(built.plan):
            SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights).backward()
        found.append({name: p.grad for name, p in adapters.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_a_decoder_with_a_head_reads_the_last_token_of_padded_rows(tmp_path: Path) -> None:
    """Its pad token is its end-of-text token."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), quantization="none", kind="classifier")
    base = load_base(config, CPU, 3)
    assert base.heads == {"score": {"weight"}}
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, *MIXED)
    assert len(adapters.layers) == 14
    rows = [replace(row, input_ids=row.input_ids[1:-1], labels=row.labels[1:-1]) for row in texts([9, 4, 6])]
    found = predict_classes(adapters, rows, MEMBERS, PassSettings(base.tokenizer.pad_token_id, 10**6, KEY))
    for i, row in enumerate(rows):
        expected = dense_logits(adapters, stock, MEMBERS, torch.tensor([row.input_ids]))[:, 0].log_softmax(-1)
        assert np.abs(found[:, i] - expected.detach().numpy()).max() <= 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_predictions_do_not_depend_on_the_chunks(family: str, tmp_path: Path) -> None:
    base = load_encoder(tmp_path, family)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, *MIXED)
    rows = texts([3, 12, 5, 9, 4])
    expected = np.stack([
        dense_logits(adapters, stock, MEMBERS, torch.tensor([row.input_ids]))[:, 0].log_softmax(-1).detach().numpy()
        for row in rows
    ], axis=1)  # fmt: skip
    adapters.model.train()
    told: list[tuple[int, int]] = []
    for budget in (1, 100, 10**6):
        settings = PassSettings(1, budget, KEY, on_chunk=lambda *done: told.append(done))
        found = predict_classes(adapters, rows, MEMBERS, settings)
        assert found.shape == (len(MEMBERS), 5, 3) and np.abs(found - expected).max() <= 1e-5
    assert told[-1] == (5, 5) and adapters.model.training and adapters.axis.current is None


def test_lora_input_masks_reach_the_pooler(tmp_path: Path) -> None:
    """One vector per row there; masks do not depend on padding."""
    spec = AdapterSpec(rank=4, alpha=8.0, sites=(Site(position="lora_input", rate=0.5),))
    adapters = trained_encoder(load_encoder(tmp_path), spec)
    rows, members, key = texts([9, 4]), [Member(0), Member(0, 0)], MaskKey(0, "test")
    together = predict_classes(adapters, rows, members, PassSettings(1, 10**6, key))
    alone = [predict_classes(adapters, [row], members, PassSettings(1, 1, key))[:, 0] for row in rows]
    np.testing.assert_allclose(together, np.stack(alone, axis=1), atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


# --- PEFT's format ----------------------------------------------------------------------------------------------------


def stored(adapters: Adapters, folder: Path, adapter: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    matrices, head = adapter_matrices(adapters.layers, adapter), head_state(adapters.heads, adapter)
    write_adapter(folder, matrices, adapters.specs[adapter], adapters.layer_count, "base", adapters.suffixes, head)
    return folder


def stock_model(folder: Path, adapters: list[Path], precision: str = "fp32") -> PeftModel:
    torch.manual_seed(99)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=dtype)
    peft = PeftModel.from_pretrained(model, adapters[0], adapter_name="0")
    for k, adapter in enumerate(adapters[1:], start=1):
        peft.load_adapter(adapter, adapter_name=str(k))
    return peft.eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", list(ENCODERS))
def test_stock_peft_loads_our_adapters(family: str, precision: str, tmp_path: Path) -> None:
    """Two adapters with their heads, and a mask draw with the head of its adapter. bf16: 5 % of the effect."""
    adapters = trained_encoder(load_encoder(tmp_path / "base", family, precision), *MIXED)
    folders = [stored(adapters, tmp_path / "first", 0), stored(adapters, tmp_path / "second", 1)]
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == set(adapters.heads)
    draw = tmp_path / "draw"
    draw.mkdir()
    masks = adapters.plan([Member(0, 4)], 1, KEY).masks
    matrices = masked_matrices(adapter_matrices(adapters.layers, 0), masks, 0)
    write_adapter(draw, matrices, PLAIN, adapters.layer_count, "base", adapters.suffixes, head_state(adapters.heads, 0))
    members = [Member(0), Member(1), Member(0, 4)]
    ours = logits(adapters, [*members, Member(None)]).detach()
    stock = stock_model(tmp_path / "base", [*folders, draw], precision)
    for k, expected in enumerate(ours[:-1]):
        stock.set_adapter(str(k))
        effect = float((expected - ours[-1]).abs().max())
        difference = float((stock(input_ids=IDS).logits.float() - expected).abs().max())
        assert difference <= (1e-5 if precision == "fp32" else 0.05) * max(effect, 1.0), members[k]
        assert effect > 0.05


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_we_load_stock_pefts_adapters(family: str, tmp_path: Path) -> None:
    """And save them again under the same names, with the same bytes."""
    write_encoder(tmp_path / "base", family)
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    stock = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings)).eval()
    stock.save_pretrained(tmp_path / "stock")
    adapter = read_adapter(tmp_path / "stock")
    assert set(adapter.head.modules) == {"classifier", "score"}
    base = load_encoder(tmp_path / "base")
    adapters = attach(base.model, [adapter.spec], sorted(adapter.matrices), 0, base.heads)
    load_matrices(adapters.layers, 0, adapter.matrices, "adapter")
    load_head(adapters.heads, 0, adapter.head, "adapter")
    torch.testing.assert_close(logits(adapters, [Member(0)])[0], stock(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    ours = load_file(stored(adapters, tmp_path / "ours") / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "stock" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_adapters_of_other_kinds_and_classes_are_refused(tmp_path: Path) -> None:
    three = trained_encoder(load_encoder(tmp_path / "base"), PLAIN)
    folder = stored(three, tmp_path / "three")
    four = attach_encoder(load_encoder(tmp_path / "base", classes=4), PLAIN)
    with pytest.raises(ConfigError, match=r"classifier.weight of shape \(3, 64\), the model \(4, 64\)"):
        load_head(four.heads, 0, read_adapter(folder).head, "adapter 0")
    with pytest.raises(ConfigError, match="one without to a causal model"):
        load_head({}, 0, read_adapter(folder).head, "adapter 0")
    causal = attach(tiny_llama(), [PLAIN], ["q_proj"], 0)
    matrices = adapter_matrices(causal.layers, 0)
    (tmp_path / "causal").mkdir()
    write_adapter(tmp_path / "causal", matrices, PLAIN, 2, "base", causal.suffixes)
    with pytest.raises(ConfigError, match="other trained modules"):
        load_head(four.heads, 0, read_adapter(tmp_path / "causal").head, "adapter 0")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    with pytest.raises(RunFolderError, match="modules_to_save"):
        read_adapter(folder)


def test_the_head_is_no_target(tmp_path: Path) -> None:
    base = load_encoder(tmp_path, "roberta")
    with pytest.raises(ConfigError, match="matches no linear layer"):
        attach_encoder(base, PLAIN, targets=["out_proj"])
    adapters = attach_encoder(base, PLAIN, targets=["dense"])
    assert len(adapters.layers) == 6 and adapters.suffixes["dense"] == 6
