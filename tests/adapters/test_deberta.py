"""DeBERTaV3's projected relative positions under the member axis, against dense float64 models and stock PEFT."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import attach_encoder, load_encoder, texts, trained_encoder
from helpers.families import CPU, LORA_DROPOUT
from helpers.reference import dense_update
from peft import LoraConfig, get_peft_model
from torch.func import functional_call
from transformers import AutoModelForSequenceClassification

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.linear import LoRALinear
from pipeline.adapters.members import MaskKey, Member, MemberAxisError
from pipeline.adapters.peft_format import adapter_matrices
from pipeline.adapters.sites import deberta
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.config.model import ModelConfig
from pipeline.loss.objective import SupervisedClassifier
from pipeline.model.load import BaseModel, load_base
from pipeline.prediction.passes import PassSettings, predict_classes
from pipeline.support.tiny import write_encoder
from pipeline.training.batch import lay_out

DROPOUT = AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT)
PLAIN = AdapterSpec(rank=2, alpha=3.0)
MEMBERS = [Member(0, 0), Member(1), Member(None), Member(0), Member(0, 1)]
SETTINGS = PassSettings(1, 10**6, MaskKey(7, "test"))
ROWS = texts([9, 4, 12])
"""Longer than the 8 buckets, so that distances share logarithmic ones."""


def load_variant(folder: Path, **changes: object) -> BaseModel:
    write_encoder(folder, "deberta-v3", **changes)
    return load_base(ModelConfig(path=str(folder), quantization="none", attention="eager"), CPU, 3)


def dense_log_probs(adapters: Adapters, stock: torch.nn.Module, members: list[Member]) -> np.ndarray:
    """(M, N, C) of float64 models W + ΔW, one member and one unpadded row at a time."""
    masks = adapters.plan(members, 1, SETTINGS.key).masks
    passes = []
    for m, member in enumerate(members):
        head = adapters.heads
        weights = {}
        for name, trained in head.items():
            module = trained.start if member.adapter is None else trained.copies[member.adapter]
            weights |= {f"{name}.{leaf}": p.detach().double() for leaf, p in module.named_parameters()}
        for name, layer in adapters.layers.items() if member.adapter is not None else ():
            bucket = next(b for b in layer.buckets if member.adapter in b.slot)
            slot, spec = bucket.slot[member.adapter], adapters.specs[member.adapter]
            own = masks.get(name, {}) if member.draw is not None else {}
            a, b = (own[side][m] if side in own else None for side in ("lora_A", "lora_B"))
            update = dense_update(bucket.lora_A[slot], bucket.lora_B[slot], spec.alpha / spec.rank, a, b, None)
            weights[f"{name}.weight"] = stock.get_submodule(name).weight + update
        ids = [torch.tensor([row.input_ids]) for row in ROWS]
        logits = [functional_call(stock, weights, kwargs={"input_ids": one}).logits for one in ids]
        passes.append(torch.cat(logits).log_softmax(-1))
    return torch.stack(passes).detach().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"share_att_key": False}, {"pos_att_type": ["c2p"]}, {"pos_att_type": ["p2c"], "position_buckets": -1}],
    ids=["v3", "own projections", "c2p", "p2c, all distances"],
)
def test_members_equal_dense_models(changes: dict[str, object], tmp_path: Path) -> None:
    base = load_variant(tmp_path, **changes)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, DROPOUT, PLAIN)
    found = predict_classes(adapters, ROWS, MEMBERS, SETTINGS)
    expected = dense_log_probs(adapters, stock, MEMBERS)
    assert np.abs(found - expected).max() <= 2e-5
    assert np.abs(expected[0] - expected[4]).max() > 1e-2, "draws differ"


def test_every_member_projects_the_table_with_its_own_update(tmp_path: Path) -> None:
    """Only the query and key projections differ, and they differ in the table alone: rows of zeros in the content."""
    base = load_encoder(tmp_path, "deberta-v3")
    adapters = attach_encoder(base, DROPOUT, targets=["query_proj"])
    layer = next(iter(adapters.layers.values()))
    with torch.no_grad():
        layer.buckets[0].lora_B.normal_()
    attention = base.model.deberta.encoder.layer[0].attention.self
    table = base.model.deberta.encoder.get_rel_embedding()
    plan = adapters.plan([Member(0), Member(None), Member(0, 0), Member(0, 1)], 3, MaskKey(0, 0))
    with adapters.axis.active(plan):
        projected = getattr(attention, deberta.BIAS)._project(plan, table)
    assert set(projected) == {"query_proj"} and projected["query_proj"].shape == (4, 16, 64)
    masks = plan.masks[layer.name]
    for m, member in enumerate(plan.members):
        sides = [masks[side][m] if member.draw is not None else None for side in ("lora_A", "lora_B")]
        bucket = layer.buckets[0]
        update = dense_update(bucket.lora_A[0], bucket.lora_B[0], 2.0, *sides, None) if member.adapter == 0 else 0.0
        expected = table.double() @ (layer.base.weight.double() + update).T + layer.base.bias.double()
        torch.testing.assert_close(projected["query_proj"][m].double(), expected, rtol=1e-5, atol=1e-5)


def test_without_it_the_member_axis_refuses_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.adapters.attach.install_position_projections", lambda model, axis: None)
    adapters = trained_encoder(load_encoder(tmp_path, "deberta-v3"), DROPOUT)
    with pytest.raises(MemberAxisError, match=r"query_proj received an input of leading size 1"):
        predict_classes(adapters, ROWS, MEMBERS[:1], SETTINGS)


def test_loss_and_gradients_equal_stock_peft(tmp_path: Path) -> None:
    """Plain LoRA on every linear, two members of one adapter: padded rows here, row by row there."""
    base = load_encoder(tmp_path, "deberta-v3")
    adapters = trained_encoder(base, AdapterSpec(rank=4, alpha=8.0))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    targets = {"target_modules": "all-linear", "modules_to_save": ["pooler"]}
    settings = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, **targets)
    stock = get_peft_model(model, settings).eval()
    named = dict(stock.named_parameters())
    with torch.no_grad():
        for name, (a, b) in adapter_matrices(adapters.layers, 0).items():
            named[f"base_model.model.{name}.lora_A.default.weight"].copy_(a)
            named[f"base_model.model.{name}.lora_B.default.weight"].copy_(b)
        for head, trained in adapters.heads.items():
            for leaf, value in trained.copies[0].named_parameters():
                named[f"base_model.model.{head}.modules_to_save.default.{leaf}"].copy_(value)
    built = lay_out(adapters, ROWS, replicate_layout(3, 2), 1, MaskKey(0, 0), "right")
    with adapters.axis.active(built.plan):
        ours = SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights)
        ours.backward()
    theirs = sum(
        torch.nn.functional.cross_entropy(stock(input_ids=torch.tensor([row.input_ids])).logits, torch.tensor([i % 3]))
        for i, row in enumerate(ROWS)
    )
    theirs.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, layer in adapters.layers.items():
        for side in ("lora_A", "lora_B"):
            expected = named[f"base_model.model.{name}.{side}.default.weight"].grad
            found = getattr(layer.buckets[0], side).grad[0]
            assert float((found - expected).abs().max()) <= 2e-5 * max(float(expected.abs().max()), 1e-3), (name, side)


@pytest.mark.slow
@pytest.mark.parametrize("sites", [LORA_DROPOUT, (Site(position="lora_input", rate=0.5),)], ids=["weights", "input"])
def test_a_mixed_nf4_pass_equals_a_pass_for_each_member_and_row(sites: tuple[Site, ...], tmp_path: Path) -> None:
    """`lora_input` masks of the table belong to the member, not to the rows beside it."""
    base = load_encoder(tmp_path, "deberta-v3", "nf4")
    assert base.identity.quantized_modules == 12
    adapters = trained_encoder(base, AdapterSpec(rank=4, alpha=8.0, sites=sites), PLAIN)
    together = predict_classes(adapters, ROWS, MEMBERS, SETTINGS)
    for m, member in enumerate(MEMBERS):
        alone = np.concatenate([predict_classes(adapters, [row], [member], SETTINGS)[0] for row in ROWS])
        assert np.abs(together[m] - alone).max() <= 1e-4
    assert np.abs(together[0] - together[4]).max() > 1e-3 and np.abs(together[3] - together[0]).max() > 1e-3


@pytest.mark.slow
def test_recomputation_gives_the_same_gradients(tmp_path: Path) -> None:
    sites = (*LORA_DROPOUT, Site(position="lora_input", rate=0.3))
    found = []
    for checkpointing in (False, True):
        adapters = trained_encoder(load_encoder(tmp_path, "deberta-v3", "nf4"), AdapterSpec(rank=4, sites=sites))
        if checkpointing:
            adapters.model.activation_checkpointing_enable({"use_reentrant": False})
        built = lay_out(adapters, ROWS, replicate_layout(3, 2), 1, MaskKey(0, 0), "right")
        with adapters.axis.active(built.plan):
            SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights).backward()
        found.append({name: p.grad for name, p in adapters.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_the_tables_keys_are_one_row_per_member(tmp_path: Path) -> None:
    adapters = attach_encoder(load_encoder(tmp_path, "deberta-v3"), DROPOUT)
    plan = adapters.plan([Member(0, 5), Member(0)], 2, MaskKey(0, 0))
    assert deberta._table_keys(plan, 16) is None
    plan = with_row_keys(plan, torch.arange(4), torch.zeros(4, 9, dtype=torch.int64))
    keys = deberta._table_keys(plan, 16)
    assert keys is not None and keys.branch.tolist() == [5, -1] and keys.position.shape == (2, 16)
    assert keys.example.tolist() == [deberta.TABLE_KEY] * 2


def test_attention_without_adapted_projections_stays_stock(tmp_path: Path) -> None:
    base = load_encoder(tmp_path, "deberta-v3")
    attach_encoder(base, DROPOUT, targets=["value_proj", "dense"])
    attention = base.model.deberta.encoder.layer[0].attention.self
    assert deberta.BIAS not in vars(attention) and isinstance(attention.value_proj, LoRALinear)
