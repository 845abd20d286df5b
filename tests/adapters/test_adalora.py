"""AdaLoRA on the member axis: forward and gradients against dense float64, files against stock PEFT.

Tolerances, relative to the adapter's largest effect on a logit or to the largest entry of a gradient: 1e-5 in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.encoders import attach_encoder, load_encoder
from helpers.families import load_tiny
from helpers.reference import dense_model
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from pipeline.adapters.adalora import orthogonality
from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.build import attach_stored
from pipeline.adapters.heads import head_state
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.peft_adalora import shown_rank
from pipeline.adapters.peft_format import (
    adapter_matrices,
    as_plain_lora,
    load_matrices,
    masked_matrices,
    read_adapter,
    write_adapter,
)
from pipeline.adapters.spec import AdapterSpec, RankSchedule
from pipeline.config import load_config
from pipeline.config.adapter import SERVED_RANKS
from pipeline.config.method import Site
from pipeline.errors import ConfigError
from pipeline.support.tiny import tiny_gpt2, tiny_llama

IDS = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(1))
SCHEDULE = RankSchedule(initial_rank=6, target_rank=4, warmup=1, final=2, total=9)
DROPOUT = (Site(position="lora_A", rate=0.5), Site(position="lora_B", rate=0.25))
ADALORA = AdapterSpec(rank=6, alpha=12.0, sites=DROPOUT, schedule=SCHEDULE)


def trained(adapters: Adapters, seed: int = 1) -> Adapters:
    """Random matrices; every layer's third triplet pruned, and all of one layer's."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in adapters.model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
        for name, layer in adapters.layers.items():
            for bucket in layer.buckets:
                if hasattr(bucket, "lora_E"):
                    pruned = slice(None) if name == "model.layers.1.mlp.up_proj" else 2
                    bucket.lora_E[:, pruned] = 0.0
    return adapters


def svd_update(P: Tensor, values: Tensor, Q: Tensor, scaling: float, rows: Tensor, columns: Tensor) -> Tensor:
    """s · diag(m_P) P diag(Λ) Q diag(m_Q) in float64, every diagonal matrix built in full (2404.09610, eq. 4-6)."""
    P_hat = torch.diag(rows.double()) @ P.double()
    Q_hat = Q.double() @ torch.diag(columns.double())
    return scaling * P_hat @ torch.diag(values.double()) @ Q_hat


def logits_of(model: nn.Module) -> Tensor:
    return model(IDS).logits.float()


def relative(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    return float((ours - theirs).abs().max() / (theirs - base).abs().max())


def written(folder: Path, adapters: Adapters, spec: AdapterSpec, adapter: int = 0) -> Path:
    folder.mkdir()
    matrices = adapter_matrices(adapters.layers, adapter)
    write_adapter(folder, matrices, spec, adapters.layer_count, "tiny", adapters.suffixes)
    return folder


def test_members_of_both_kinds_in_one_pass_equal_the_dense_model() -> None:
    """Two AdaLoRA adapters of other ranks and scalings, a LoRA and the base; logits and all gradients."""
    other = replace(ADALORA, rank=3, alpha=2.0, sites=(replace_rate(DROPOUT[0], 0.3),), schedule=replace(SCHEDULE))
    specs = [ADALORA, AdapterSpec(rank=6, alpha=9.0, sites=DROPOUT), other, replace(ADALORA, alpha=5.0)]
    members = [Member(0, 0), Member(1, 0), Member(2), Member(None), Member(0, 1), Member(2, 4), Member(3, 0), Member(0)]
    base = tiny_llama(layers=1)
    dense = tiny_llama(layers=1).double()
    adapters = trained(attach(base, specs, "all-linear", seed=0))
    plan = adapters.plan(members, 2, MaskKey(11, 3))
    ids, positions = IDS, torch.arange(6).repeat(2, 1)
    with adapters.axis.active(plan):
        ours = adapters.model(ids.repeat(8, 1), position_ids=positions.repeat(8, 1)).logits
    updates: list[dict[str, Tensor]] = []
    for m, member in enumerate(members):
        updates.append({})
        for name, layer in adapters.layers.items():
            bucket = next((b for b in layer.buckets if member.adapter in b.slot), None)
            if bucket is None:
                continue
            slot = bucket.slot[member.adapter]
            P, Q = bucket.lora_B[slot], bucket.lora_A[slot]
            values = bucket.lora_E[slot] if member.adapter != 1 else torch.ones(6)
            scaling = {0: 12 / (6 + 1e-5), 1: 9 / 6, 2: 2 / (3 + 1e-5), 3: 5 / (6 + 1e-5)}[member.adapter]
            masks = plan.masks[name] if member.draw is not None else {}
            columns = masks["lora_A"][m] if masks else torch.ones(Q.shape[1])
            rows = masks["lora_B"][m] if masks else torch.ones(len(P))
            updates[-1][name] = svd_update(P, values, Q, scaling, rows, columns)
    theirs = torch.cat([dense_model(dense, update, ids, torch.ones_like(ids), positions) for update in updates])
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())
    leaves = [p for p in adapters.model.parameters() if p.requires_grad]
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((ours * direction).sum(), leaves)
    wanted = torch.autograd.grad((theirs * direction.double()).sum(), leaves)
    for ours_g, theirs_g in zip(got, wanted, strict=True):
        assert float((ours_g.double() - theirs_g).abs().max()) <= 2e-5 * float(theirs_g.abs().max())


def replace_rate(site: Site, rate: float) -> Site:
    return site.model_copy(update={"rate": rate})


@pytest.mark.usefixtures("stock_attention")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_attaching_is_the_identity_bit_for_bit(make) -> None:
    model = make()
    before = model(IDS).logits
    adapters = attach(model, [ADALORA, AdapterSpec(), replace(ADALORA, rank=2)], "all-linear", seed=0)
    assert torch.equal(model(IDS).logits, before)
    with adapters.axis.active(adapters.plan([Member(0, 0), Member(2)], 1, MaskKey(0, 0))):
        assert torch.equal(model(IDS).logits, before)
    bucket = next(iter(adapters.layers.values())).buckets[0]
    for matrix in (bucket.lora_A, bucket.lora_B):
        assert float(matrix.detach().std()) == pytest.approx(0.02, rel=0.15), "N(0, 0.02²), as PEFT"


def test_the_orthogonality_term_is_pefts() -> None:
    """Against PEFT's own loss, which adds weight × term to the model's."""
    adapters = trained(attach(tiny_llama(), [ADALORA], "all-linear", seed=0))
    config = AdaLoraConfig(init_r=6, target_r=4, total_step=9, tinit=1, tfinal=2, orth_reg_weight=0.5,
                           target_modules="all-linear", task_type="CAUSAL_LM")
    stock = get_peft_model(tiny_llama(), config)
    copy_to_stock(adapters, stock)
    with torch.no_grad():
        penalized = float(stock(IDS, labels=IDS).loss)
        plain = float(stock.base_model.model(IDS, labels=IDS).loss)
        term = float(orthogonality([layer.buckets[0] for layer in adapters.layers.values()]))
    by_hand = []
    for layer in adapters.layers.values():
        P, Q = layer.buckets[0].lora_B[0].detach().double(), layer.buckets[0].lora_A[0].detach().double()
        by_hand += [(gram - torch.eye(6)).square().sum().sqrt() for gram in (P.T @ P, Q @ Q.T)]
    assert term == pytest.approx(float(sum(by_hand)) / len(by_hand), rel=1e-5)
    assert penalized - plain == pytest.approx(0.5 * term, rel=1e-4)


def copy_to_stock(adapters: Adapters, stock: PeftModel) -> None:
    with torch.no_grad():
        for name, (A, B, E) in adapter_matrices(adapters.layers, 0).items():
            layer = stock.base_model.model.get_submodule(name)
            layer.lora_A["default"].copy_(A)
            layer.lora_B["default"].copy_(B)
            layer.lora_E["default"].copy_(E.view(-1, 1))


@pytest.mark.parametrize("rescale", ["inverse", "none"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_stock_peft_computes_what_was_written_and_we_read_it_back(make, rescale: str, tmp_path: Path) -> None:
    """Ranks 5 everywhere but in one layer, which has lost them all; a site without rescale on half of the layers."""
    sites = (
        Site(position="lora_A", rate=0.5, compensation=rescale),
        Site(position="lora_B", rate=0.25, compensation=rescale, layers=(0.5, 1.0)),
    )
    spec = replace(ADALORA, sites=sites)
    adapters = trained(attach(make(), [spec], "all-linear", seed=0))
    folder = written(tmp_path / "adapter", adapters, spec)
    stored = read_adapter(folder)
    assert stored.spec.schedule == SCHEDULE and stored.spec.rank == 6
    assert {stored.spec.rank_of(name) for name in stored.matrices} == ({0, 5} if make is tiny_llama else {5})
    again = attach(make(), [stored.spec], sorted(stored.matrices), seed=1)
    load_matrices(again.layers, 0, stored.matrices, "test")
    lora = written_plain(tmp_path / "lora", again, stored)
    with torch.no_grad():
        base, ours, read = logits_of(make()), logits_of(adapters.model), logits_of(again.model)
        for path in (folder, lora):
            theirs = logits_of(PeftModel.from_pretrained(make(), path))
            assert relative(ours, theirs, base) <= 1e-5 and relative(read, theirs, base) <= 1e-5


def written_plain(folder: Path, adapters: Adapters, stored) -> Path:
    folder.mkdir()
    plain = as_plain_lora(stored)
    assert plain.spec.rank in SERVED_RANKS and plain.spec.scaling_of("x") == 1.0 and not plain.spec.rank_pattern
    assert {tuple(A.shape)[0] for A, _ in plain.matrices.values()} == {plain.spec.rank}
    write_adapter(folder, plain.matrices, plain.spec, adapters.layer_count, "tiny", adapters.suffixes)
    return folder


def test_a_classifier_with_its_head_and_a_lora_beside_it(tmp_path: Path) -> None:
    """Stored, attached together with a plain LoRA, served in one pass; stock PEFT loads both forms."""
    base = load_encoder(tmp_path / "base")
    adapters = trained(attach_encoder(base, ADALORA))
    folder, lora = tmp_path / "adalora", tmp_path / "lora"
    matrices, head = adapter_matrices(adapters.layers, 0), head_state(adapters.heads, 0)
    folder.mkdir()
    write_adapter(folder, matrices, ADALORA, adapters.layer_count, "base", adapters.suffixes, head)
    plain = as_plain_lora(read_adapter(folder))
    lora.mkdir()
    write_adapter(lora, plain.matrices, plain.spec, adapters.layer_count, "base", adapters.suffixes, plain.head)
    again = attach_stored(load_encoder(tmp_path / "base"), [read_adapter(folder), read_adapter(lora)], seed=0)
    with torch.no_grad(), again.axis.active(again.plan([Member(0), Member(1), Member(None)], 2, MaskKey(0, 0))):
        ours, twin, start = again.model(IDS.repeat(3, 1)).logits.view(3, 2, 3)
    for path, name in ((folder, "AdaLoraModel"), (lora, "LoraModel")):
        torch.manual_seed(99)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        stock = PeftModel.from_pretrained(model, path).eval()
        assert type(stock.base_model).__name__ == name
        with torch.no_grad():
            theirs = stock(input_ids=IDS).logits
        assert relative(ours, theirs, start) <= 1e-5 and relative(twin, theirs, start) <= 1e-5


def test_stock_peft_computes_the_same_on_a_4_bit_base(tmp_path: Path) -> None:
    adapters = trained(attach(load_tiny(tmp_path / "base"), [ADALORA], "all-linear", seed=0))
    folder = written(tmp_path / "adapter", adapters, ADALORA)
    with torch.no_grad():
        ours = logits_of(adapters.model)
        base = logits_of(load_tiny(tmp_path / "base"))
        theirs = logits_of(PeftModel.from_pretrained(load_tiny(tmp_path / "base"), folder))
    assert relative(ours, theirs, base) <= 1e-5


def test_each_draw_is_a_plain_lora(tmp_path: Path) -> None:
    adapters = trained(attach(tiny_llama(), [ADALORA], "all-linear", seed=0))
    stored = read_adapter(written(tmp_path / "adapter", adapters, ADALORA))
    plain = as_plain_lora(stored)
    plan = adapters.plan([Member(0, 3), Member(0, 5)], 1, MaskKey(7, "test"))
    (tmp_path / "draw").mkdir()
    matrices = masked_matrices(plain.matrices, plan.masks, 1)
    spec = replace(plain.spec, sites=())
    write_adapter(tmp_path / "draw", matrices, spec, adapters.layer_count, "tiny", adapters.suffixes)
    with torch.no_grad():
        with adapters.axis.active(replace(plan, rows=2)):
            ours = adapters.model(IDS.repeat(2, 1)).logits[2:]
        theirs = logits_of(PeftModel.from_pretrained(tiny_llama(), tmp_path / "draw"))
        assert relative(ours, theirs, logits_of(tiny_llama())) <= 1e-5
        assert relative(logits_of(adapters.model), theirs, logits_of(tiny_llama())) > 0.1  # it is a draw


@pytest.mark.usefixtures("stock_attention")
def test_an_adapter_that_stock_peft_pruned_and_wrote_is_read(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=6, target_r=2, total_step=5, tinit=1, tfinal=2, lora_alpha=7,
                           target_modules="all-linear", task_type="CAUSAL_LM")
    stock = get_peft_model(tiny_llama(), config)
    optimizer = torch.optim.SGD([p for p in stock.parameters() if p.requires_grad], lr=0.5)
    for step in range(1, 6):
        stock(IDS, labels=IDS).loss.backward()
        optimizer.step()
        stock.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with torch.no_grad():
        theirs = logits_of(stock.eval())
    stock.save_pretrained(tmp_path)
    stored = read_adapter(tmp_path)
    adapters = attach(tiny_llama(), [stored.spec], sorted(stored.matrices), seed=0)
    load_matrices(adapters.layers, 0, stored.matrices, "test")
    kept = [stored.spec.rank_of(name) for name in stored.matrices]
    assert sum(kept) == 2 * len(kept) and len(set(kept)) > 1 and shown_rank(stored.spec) == "2/2"
    with torch.no_grad():
        assert relative(logits_of(adapters.model), theirs, logits_of(tiny_llama())) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (["adapter.adalora.warmup=40", "train.max_steps=60", "adapter.adalora.final=20"], ["40 + 20", "lower them"]),
        (["train.max_steps=1"], ["raise train.max_steps"]),
        (["adapter.adalora.initial_rank=4"], ["initial_rank = 4", "adapter.rank = 8", "leave it out"]),
        (["adapter.adalora.warmup=1.5"], ["adapter.adalora.warmup", "fraction of train.max_steps"]),
        (["adapter.method=droplora"], ["lora_rank", "use lora_A and lora_B"]),
        (["adapter.rslora=true"], ["adapter.rslora", "adapter.alpha"]),
        (["adapter.rank_pattern={q_proj: 2}"], ["adapter.rank_pattern", "adapter.rank"]),
        (["adapter.alpha_pattern={q_proj: 2.0}"], ["adapter.alpha_pattern"]),
        (["adapter.init_from=x"], ["adapter.init_from", "fresh"]),
        (["adapter.kind=lora", "adapter.adalora.interval=5"], ["no effect", "adapter.kind = adalora"]),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(settings: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, ["adapter.kind=adalora", *settings])
    for part in parts:
        assert part in str(caught.value)


def test_spans_are_steps_or_fractions_and_the_start_is_half_as_wide_again() -> None:
    config = load_config(None, ["adapter.kind=adalora", "adapter.rank=5", "train.max_steps=50"]).adapter
    schedule = AdapterSpec.from_config(config, 50).schedule
    assert schedule is not None and (schedule.initial_rank, schedule.target_rank) == (8, 5)
    assert (schedule.warmup, schedule.final, schedule.total) == (5, 20, 50)
    assert load_config(None, ["adapter.kind=adalora", "adapter.adalora.warmup=7"]).adapter.adalora.steps(60) == (7, 24)
    load_config(None, ["adapter.kind=adalora", "adapter.adalora.final=900", "train.epochs=3"])  # counted later
