"""Encoders: a trained head beside every adapter, against a dense float64 model and stock PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import (
    ENCODERS,
    POSITIONS,
    attach_encoder,
    encoder_tokenizer,
    load_encoder,
    texts,
    trained_encoder,
    write_encoder,
)
from families import LORA_DROPOUT
from peft import LoraConfig, PeftModel, get_peft_model
from reference import dense_update
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.heads import head_state, load_head
from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.members import Member
from pipeline.adapters.spec import AdapterSpec, count_layers, layer_number
from pipeline.adapters.state import adapter_matrices, load_matrices, masked_matrices, read_adapter, write_adapter
from pipeline.config import load_config
from pipeline.config.method import Site
from pipeline.config.sections import ModelConfig
from pipeline.data.classes import encode_classification, encode_text, shared_choices
from pipeline.data.rows import Row
from pipeline.errors import ConfigError, DataError, RunFolderError
from pipeline.model.classifier import position_limit
from pipeline.model.kind import local_kind, model_kind
from pipeline.objective import SupervisedClassifier, build_rows
from pipeline.predict import predict_classes
from pipeline.preflight import check_inputs

IDS = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
PLAIN = AdapterSpec(rank=4, alpha=8.0)
MIXED = (
    AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT),
    AdapterSpec(rank=2, alpha=3.0, sites=(Site(position="lora_rank", rate=0.5, compensation="none"),)),
)
MEMBERS = [Member(0, 0), Member(None), Member(1), Member(0), Member(1, 3), Member(0, 1), Member(1, 0)]


def logits(adapters: Adapters, members: list[Member], ids: Tensor = IDS) -> Tensor:
    """(M, B, C)."""
    with adapters.axis.active(adapters.plan(members, len(ids), seed=11, phase="test")):
        found = adapters.model(input_ids=ids.repeat(len(members), 1)).logits
    return found.view(len(members), len(ids), -1)


def weights_of(adapters: Adapters, stock: nn.Module, member: Member, masks: dict, m: int) -> dict[str, Tensor]:
    """float64 weights of a stock model that is this member: W + ΔW, and the member's own head."""
    weights = {}
    for name, head in adapters.heads.items():
        module = head.start if member.adapter is None else head.copies[member.adapter]
        weights |= {f"{name}.{leaf}": parameter.double() for leaf, parameter in module.named_parameters()}
    if member.adapter is None:
        return weights
    for name, layer in adapters.layers.items():
        bucket = next(b for b in layer.buckets if member.adapter in b.slot)
        slot = bucket.slot[member.adapter]
        spec = adapters.specs[member.adapter]
        scaling = spec.alpha / spec.rank
        if member.draw is None:
            scaling *= np.prod([1 - site.rate for site in spec.sites if site.compensation == "none"])
        mine = {axis: mask[m] for axis, mask in masks.get(name, {}).items()} if member.draw is not None else {}
        r = mine["lora_rank"][: spec.rank] if "lora_rank" in mine else None
        update = dense_update(bucket.lora_A[slot], bucket.lora_B[slot], scaling, mine.get("lora_A"), mine.get("lora_B"), r)
        weights[f"{name}.weight"] = stock.get_submodule(name).weight + update
    return weights


def dense_logits(adapters: Adapters, stock: nn.Module, members: list[Member], ids: Tensor = IDS) -> Tensor:
    masks = adapters.plan(members, len(ids), seed=11, phase="test").masks
    passes = [
        functional_call(stock, weights_of(adapters, stock, member, masks, m), kwargs={"input_ids": ids}).logits
        for m, member in enumerate(members)
    ]
    return torch.stack(passes)


# --- which models, and what is loaded ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("description", "kind", "expected"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, "auto", "classifier"),
        ({"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]}, "auto", "classifier"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "auto", "causal"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "auto", "classifier"),
        ({"model_type": "llama"}, "classifier", "classifier"),
        ({"model_type": "bert", "is_decoder": True}, "auto", "causal"),
    ],
)
def test_the_kind_is_decided_by_the_models_configuration(
    description: dict, kind: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(description))
    config = ModelConfig(path=str(tmp_path), kind=kind)
    assert local_kind(config) == model_kind(config) == expected


def test_kinds_of_names() -> None:
    assert local_kind(ModelConfig()) == "causal"
    assert local_kind(ModelConfig(path="embedded:all-minilm-l6-v2")) == "classifier"
    assert local_kind(ModelConfig(path="owner/name")) is None
    with pytest.raises(ConfigError, match=r"model.kind = 'causal': .* is an encoder \(bert\)"):
        model_kind(ModelConfig(path="embedded:all-minilm-l6-v2", kind="causal"))


@pytest.mark.parametrize(
    ("family", "heads"),
    [
        ("bert", {"classifier": {"weight", "bias"}}),
        ("bert-mlm", {"classifier": {"weight", "bias"}, "bert.pooler": {"dense.weight", "dense.bias"}}),
        ("roberta", {"classifier": {f"{part}.{leaf}" for part in ("dense", "out_proj") for leaf in ("weight", "bias")}}),
        ("distilbert", {name: {"weight", "bias"} for name in ("pre_classifier", "classifier")}),
        ("deberta", {"classifier": {"weight", "bias"}, "pooler": {"dense.weight", "dense.bias"}}),
    ],
)
def test_what_the_checkpoint_lacks_behind_the_stack_is_trained_whole(family: str, heads: dict, tmp_path: Path) -> None:
    base = load_encoder(tmp_path, family, "nf4")
    assert base.heads == heads
    adapters = attach_encoder(base, PLAIN)
    assert set(adapters.heads) == set(heads)
    quantized = {name for name, module in base.model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(quantized) == base.identity.quantized_modules == 12
    assert all(".base" in name for name in quantized), "every quantized linear of the stack is adapted, and no other"
    assert count_layers(list(adapters.layers)) == 2
    for name in heads:
        assert not any(layer.startswith(f"{name}.") or layer == name for layer in adapters.layers)
        assert all(p.dtype == torch.float32 for p in adapters.heads[name].parameters())


def test_layer_numbers_of_encoders() -> None:
    assert layer_number("bert.encoder.layer.11.attention.self.query") == 11
    assert layer_number("distilbert.transformer.layer.3.ffn.lin1") == 3
    assert layer_number("bert.pooler.dense") is None and layer_number("classifier") is None


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_encoder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("encoder.layer.1.")}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights of the model \(bert.encoder.layer.1"):
        load_encoder(tmp_path)


def test_an_attention_that_the_family_lacks_is_named_with_the_way_out(tmp_path: Path) -> None:
    write_encoder(tmp_path, "deberta")
    with pytest.raises(ConfigError, match=r"model.attention: .* Set model.attention=eager"):
        load_encoder(tmp_path)


def test_a_head_of_other_classes_is_drawn_anew_and_one_of_as_many_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(5)
    write_encoder(tmp_path)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    saved.save_pretrained(tmp_path / "saved")
    encoder_tokenizer().save_pretrained(tmp_path / "saved")
    same, other = load_encoder(tmp_path / "saved", classes=3), load_encoder(tmp_path / "saved", classes=4)
    assert same.heads == {"classifier": set()} and other.heads == {"classifier": {"weight", "bias"}}
    head = attach_encoder(same, PLAIN).heads["classifier"]
    assert torch.equal(head.copies[0].weight, saved.classifier.weight) and torch.equal(head.start.weight, saved.classifier.weight)


@pytest.mark.parametrize("family", list(ENCODERS))
def test_the_base_has_no_dropout_of_its_own(family: str, tmp_path: Path) -> None:
    base = load_encoder(tmp_path, family)
    evaluated = base.model(input_ids=IDS).logits
    base.model.train()
    assert torch.equal(base.model(input_ids=IDS).logits, evaluated)


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
    built = build_rows(adapters, rows, replicate_layout(3, 2), 1, 11, "test", "right")
    with adapters.axis.active(built.plan):
        ours = SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights)
        ours.backward()
    found = {name: p.grad for name, p in adapters.model.named_parameters() if p.requires_grad}
    adapters.model.zero_grad()
    theirs = torch.zeros((), dtype=torch.float64)
    for m, member in enumerate(built.plan.members):
        weights = weights_of(adapters, stock, member, built.plan.masks, m)
        for i, row in enumerate(rows):
            found_logits = functional_call(stock, weights, kwargs={"input_ids": torch.tensor([row.input_ids])}).logits[0]
            theirs = theirs - 0.5 * found_logits.log_softmax(-1)[i % 3]
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad:
            scale = max(float(parameter.grad.abs().max()), 1e-3)
            assert float((found[name] - parameter.grad).abs().max()) <= 2e-5 * scale, name


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
        found = predict_classes(adapters, rows, MEMBERS, 1, budget, 11, "test", lambda done, of: told.append((done, of)))
        assert found.shape == (len(MEMBERS), 5, 3) and np.abs(found - expected).max() <= 1e-5
    assert told[-1] == (5, 5) and adapters.model.training and adapters.axis.current is None


def test_lora_input_masks_reach_the_pooler(tmp_path: Path) -> None:
    """One vector per row there; masks do not depend on padding."""
    spec = AdapterSpec(rank=4, alpha=8.0, sites=(Site(position="lora_input", rate=0.5),))
    adapters = trained_encoder(load_encoder(tmp_path), spec)
    rows = texts([9, 4])
    together = predict_classes(adapters, rows, [Member(0), Member(0, 0)], 1, 10**6, 0)
    alone = [predict_classes(adapters, [row], [Member(0), Member(0, 0)], 1, 1, 0)[:, 0] for row in rows]
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
    masks = adapters.plan([Member(0, 4)], 1, seed=11, phase="test").masks
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


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_text_is_framed_and_cut_at_its_beginning() -> None:
    tokenizer = encoder_tokenizer()
    row = Row("r", "Review: the film was good Sentiment:", (" negative", " positive"), 1)
    ids = tokenizer(row.prompt)["input_ids"]
    assert encode_text(row, tokenizer, 64).input_ids == tuple(ids) and ids[0] == 2 and ids[-1] == 3
    cut = encode_classification(row, tokenizer, 5)
    assert cut.input_ids == (2, *ids[-4:-1], 3) and cut.labels == (1, -100, -100, -100, -100) and cut.supervised == 1
    with pytest.raises(DataError, match=r"data.max_tokens = 2: .* Set data.max_tokens=3 or more"):
        encode_text(row, tokenizer, 2)


def test_learned_positions_bound_the_text(tmp_path: Path) -> None:
    for family, limit in (("bert", POSITIONS), ("roberta", POSITIONS - 2)):
        model = load_encoder(tmp_path / family, family).model
        assert position_limit(model) == limit
        assert torch.isfinite(model(input_ids=torch.full((1, limit), 7)).logits).all()
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row("r", "a", completion="b")], "row r = 'completion': cannot be answered by a classifier"),
        ([Row("r", messages=({"role": "assistant", "content": "a"},))], "row r = 'chat'"),
        ([Row("r", "a", ("x", "y"), 0), Row("s", "a", ("y", "x"), 0)], r"row s: choices = \['y', 'x'\]: differ"),
    ],
)
def test_rows_that_a_classifier_cannot_answer_are_refused_by_name(rows: list[Row], message: str) -> None:
    with pytest.raises(DataError, match=message):
        shared_choices(rows)


def test_rows_are_checked_before_a_model_is_loaded(tmp_path: Path) -> None:
    write_encoder(tmp_path / "model")
    rows = [{"prompt": f"text {i}", "choices": ["no", "yes" if i else "maybe"], "label": 0} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [f"data.{split}_rows=4" for split in ("validation", "calibration", "test")]
    config = load_config(None, [f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'rows.jsonl'}", *sizes])
    with pytest.raises(DataError, match="a classifier has one set of classes"):
        check_inputs(config)
