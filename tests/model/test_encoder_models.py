"""Encoders: which models are classifiers, what of them is trained whole, and which rows they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.encoders import ENCODERS, attach_encoder, load_encoder
from helpers.families import CPU
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from pipeline.adapters.spec import AdapterSpec, count_layers, layer_number
from pipeline.config import load_config
from pipeline.config.model import ModelConfig
from pipeline.data.encode_classifier import encode_classification, encode_text, shared_choices
from pipeline.data.rows import Row
from pipeline.errors import ConfigError, DataError
from pipeline.model.classifier import position_limit
from pipeline.model.kind import local_kind, model_kind
from pipeline.model.load import load_base
from pipeline.plan.preflight import check_inputs
from pipeline.support.tiny import POSITIONS, encoder_tokenizer, tiny_llama, tiny_tokenizer, write_encoder

IDS = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(1))
PLAIN = AdapterSpec(rank=4, alpha=8.0)


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
        ("roberta", {"classifier": {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}}),
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
    for module in (head.start, head.copies[0]):
        assert torch.equal(module.weight, saved.classifier.weight)


@pytest.mark.parametrize("family", list(ENCODERS))
def test_the_base_has_no_dropout_of_its_own(family: str, tmp_path: Path) -> None:
    base = load_encoder(tmp_path, family)
    evaluated = base.model(input_ids=IDS).logits
    base.model.train()
    assert torch.equal(base.model(input_ids=IDS).logits, evaluated)


def test_neither_has_a_decoder_whose_attention_keeps_its_rate_as_a_number(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = load_base(ModelConfig(path=str(tmp_path), quantization="none"), CPU).model
    assert torch.equal(loaded.train()(input_ids=IDS).logits, model(input_ids=IDS).logits)


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
