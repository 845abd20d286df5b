"""Rows laid end to end against padded rows: the same masks to the bit, the same loss and gradients, and no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.families import FAMILIES, assert_close_gradients, examples, gradients, trained_start
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import RowLayout, training_layout, weightless
from pipeline.adapters.masks import dropped_hidden, dropped_keys, dropped_pairs, element_mask
from pipeline.adapters.members import MaskKey, Member, MemberAxisError, RowKeys
from pipeline.adapters.sites.anatomy import padding_reason
from pipeline.adapters.sites.attention import AttentionSites
from pipeline.adapters.sites.attention_kernels import AttentionInputs, scaled_dot_product
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.method import LEGAL, Consistency, Site
from pipeline.data.collate import lay_in_line
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.packing import pack
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedLM
from pipeline.model.head import hidden_states
from pipeline.support.tiny import ENCODERS, tiny_decoder, tiny_encoder
from pipeline.training.batch import MemberBatch, choose_rows, lay_out
from pipeline.training.loader import pass_tokens
from pipeline.training.throughput import Meter, Work

LENGTHS = [5, 19, 4, 7, 8, 11]
"""Of three lengths in attention: 19; 11 and less; 4."""
KEY = MaskKey(3, 5)
WEIGHT_SITES = (Site(position="lora_A", rate=0.4), Site(position="lora_B", rate=0.4))
NO_TERM = Consistency()
TERMS = {
    "none": NO_TERM,
    "kl, one": Consistency(kind="kl", weight=0.5, branches="one"),
    "kl, both": Consistency(kind="kl", weight=0.5, branches="both"),
    "js, one": Consistency(kind="js", weight=0.5, branches="one"),
    "js, both": Consistency(kind="js", weight=0.5, branches="both"),
}


def every_site(pattern: str) -> tuple[Site, ...]:
    return tuple(
        Site(position=position, pattern=pattern if pattern in patterns else patterns[0], rate=0.4)  # type: ignore[arg-type]
        for position, (patterns, _) in LEGAL.items()
    )


def adapted(
    family: str = "llama", *specs: AdapterSpec, sites: tuple[Site, ...] = (), term: Consistency = NO_TERM,
    exact: bool = False,
) -> Adapters:
    model = tiny_decoder(family)
    model.config.use_cache = False
    if exact:
        model.double()
    chosen = list(specs) or [AdapterSpec(rank=4, sites=sites, consistency=term)]
    return trained_start(attach(model, chosen, "all-linear", seed=0))


def read(adapters: Adapters, built: MemberBatch) -> tuple[float, float, dict[str, Tensor]]:
    objective = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)
    with adapters.axis.active(built.plan):
        nll, apart = objective(**built.inputs)
        (nll + 0.5 * apart).sum().backward()
    return float(nll.detach().sum()), float(apart.detach().sum()), gradients(adapters)


def both(
    adapters: Adapters, rows: Sequence[Encoded], layout: RowLayout, padded_layout: RowLayout | None = None
) -> tuple[MemberBatch, MemberBatch]:
    """(padded, end to end)."""
    padded = lay_out(adapters, list(rows), padded_layout or layout, 2, KEY)
    assert adapters.set_end_to_end("sdpa", 64) is None
    return padded, lay_out(adapters, list(rows), layout, 2, KEY)


def compare(adapters: Adapters, padded: MemberBatch, laid: MemberBatch) -> None:
    expected, found = read(adapters, padded), read(adapters, laid)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-5) and expected[0] > 0
    assert_close_gradients(found[2], expected[2])


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral"])
def test_every_family_has_the_loss_and_gradients_of_padded_rows(family: str) -> None:
    adapters = adapted(family, sites=WEIGHT_SITES)
    padded, laid = both(adapters, examples(LENGTHS), training_layout(range(6), 4, "split", True))
    assert padded.tensors["input_ids"].shape == (8, 19) and laid.tensors["input_ids"].shape == (1, sum(LENGTHS))
    compare(adapters, padded, laid)


@pytest.mark.parametrize(("pattern", "term", "layout"), [
    *((pattern, term, "split") for pattern in ("column", "element", "span") for term in ("none", "kl, one")),
    *(("column", term, "split") for term in ("kl, both", "js, one", "js, both")),
    *(("column", term, "replicate") for term in ("none", "js, both")),
])
def test_every_site_and_term_has_the_loss_and_gradients_of_padded_rows(pattern: str, term: str, layout: str) -> None:
    adapters = adapted(sites=every_site(pattern), term=TERMS[term])
    compare(adapters, *both(adapters, examples(LENGTHS), training_layout(range(6), 4, layout, True, TERMS[term])))


@pytest.mark.parametrize("heads", ["query", "kv"])
def test_states_are_those_of_padded_rows_in_float64(heads: str) -> None:
    keys = Site(position="attention_logits", pattern="column", rate=0.4, heads=heads)  # type: ignore[arg-type]
    adapters = adapted(sites=(*WEIGHT_SITES, keys, Site(position="ffn_hidden", rate=0.4)), exact=True)
    layout = training_layout(range(6), 3, "split", True)  # without fillers: tokens come in the same order
    states = []
    for built in both(adapters, examples(LENGTHS), layout):
        inputs = [built.model_tensors[name] for name in ("input_ids", "attention_mask", "position_ids")]
        with torch.no_grad(), adapters.axis.active(built.plan):
            states.append(hidden_states(adapters.model, *inputs)[built.tensors["attention_mask"].bool()])
    torch.testing.assert_close(states[1], states[0], rtol=1e-9, atol=1e-9)


def test_masks_are_those_of_padded_rows_to_the_bit() -> None:
    """Of three members, the third of a run with another seed; the second has a filler in padded rows and none here."""
    spec = AdapterSpec(rank=4, sites=every_site("column"))
    adapters, keys = adapted("llama", spec, spec), {0: KEY, 1: MaskKey(4, 5)}
    members = (Member(0, 0), Member(0, 1), Member(1, 2))
    layout = RowLayout(members, 2, (0, 3, 1, 1, 2, 4), (1.0, 1.0, 1.0, 0.0, 1.0, 1.0))
    rows = examples(LENGTHS[:5])
    padded = lay_out(adapters, rows, layout, 2, keys)
    assert adapters.set_end_to_end("sdpa", 64) is None
    plan = lay_out(adapters, rows, layout, 2, keys).plan
    expected, laid, real = padded.plan.row_keys, plan.row_keys, padded.tensors["attention_mask"].bool()
    assert expected is not None and laid is not None and plan.end_to_end is not None
    real[3] = False
    every = slice(None)

    def by_token(keys: RowKeys, rows: slice) -> list[Tensor]:
        sites = [Site(position="ffn_hidden", pattern=pattern, rate=0.4) for pattern in ("element", "column", "span")]  # type: ignore[arg-type]
        masks = [element_mask(keys, rows, 77, 16, 0.4), *(dropped_hidden(keys, rows, 78, 16, site) for site in sites)]
        return [mask.expand(-1, keys.position.shape[1], -1) for mask in masks]

    alone = [by_token(laid, laid.rows_of(m, m + 1)) for m in range(3)]
    for wanted, whole, *parts in zip(by_token(expected, every), by_token(laid, every), *alone, strict=True):
        assert torch.equal(whole[:, 0], wanted[real])
        assert torch.equal(torch.cat(parts)[:, 0], wanted[real])
    column, span = (Site(position="attention_logits", pattern=pattern, rate=0.4) for pattern in ("column", "span"))  # type: ignore[arg-type]

    def by_head(keys: RowKeys) -> tuple[Tensor, Tensor]:
        return dropped_keys(keys, every, 79, 4, column), dropped_pairs(keys, every, 80, 4, span)

    wanted_keys, wanted_pairs = by_head(expected)
    found: dict[int, int] = {}
    for group in plan.end_to_end.groups:
        assert group.keys is not None
        keys_HT, pairs_HTT = by_head(group.keys)
        for row, example in enumerate(group.keys.example.tolist()):
            other = found[example] = expected.example.tolist().index(example)
            size = int(real[other].sum())
            assert torch.equal(keys_HT[row, :, :size], wanted_keys[other, :, -size:])
            assert torch.equal(pairs_HTT[row, :, :size, :size], wanted_pairs[other, :, -size:, -size:])
    assert sorted(found.values()) == [0, 1, 2, 4, 5]
    assert [group.length for group in plan.end_to_end.groups] == [19, 8, 4]


def test_members_of_other_adapters_and_of_the_base_share_a_pass() -> None:
    """Different ranks, an AdaLoRA, and sites that only one adapter has; a member without adapter, one without draw."""
    adaptive = AdapterSpec.from_config(load_config(None, ["adapter.kind=adalora"]).adapter, 100)
    specs = [AdapterSpec(rank=4, sites=WEIGHT_SITES), AdapterSpec(rank=6, sites=every_site("column")), adaptive]
    adapters = adapted("llama", *specs)
    with torch.no_grad():
        for name, parameter in adapters.model.named_parameters():
            if name.endswith("lora_E"):
                parameter.fill_(0.3)
    members = (Member(None), Member(1), Member(0, 0), Member(1, 1), Member(2))
    source = (0, 0, 1, 2, 3, 4, 5, 0, 2, 2)
    layout = RowLayout(members, 2, source, tuple(1.0 if n not in (1, 9) else 0.0 for n in range(10)))
    compare(adapters, *both(adapters, examples(LENGTHS), layout))


@pytest.mark.parametrize("term", ["none", "kl, one", "js, both"])
def test_packed_rows_are_their_examples_under_the_draw_of_the_row(term: str) -> None:
    rows, draws = examples(LENGTHS), 3 if term == "none" else 6
    adapters = adapted(sites=every_site("element"), term=TERMS[term])
    groups = ((0, 1, 2), (3, 4), (5,))
    alone = training_layout([n for n, group in enumerate(groups) for _ in group], draws, "split", True, TERMS[term])
    padded = lay_out(adapters, rows, alone, 2, KEY)
    assert adapters.set_end_to_end("sdpa", 64) is None
    packed = [pack([rows[i] for i in group]) for group in groups]
    laid = lay_out(adapters, packed, training_layout(range(3), draws, "split", True, TERMS[term]), 2, KEY)
    assert laid.examples[:3] == ("row-0", "row-1", "row-2")
    compare(adapters, padded, laid)


@pytest.mark.parametrize("pattern", ["column", "element"])
def test_activation_checkpointing_recomputes_the_same_bits(pattern: str) -> None:
    adapters = adapted(sites=every_site(pattern))
    adapters.model.train()
    _, laid = both(adapters, examples(LENGTHS), training_layout(range(6), 4, "split", True))
    plain = read(adapters, laid)
    adapters.model.activation_checkpointing_enable({"use_reentrant": False})
    again = read(adapters, laid)
    assert again[0] == plain[0] and all(torch.equal(again[2][name], plain[2][name]) for name in plain[2])


def test_a_pass_without_loss_moves_nothing() -> None:
    adapters = adapted(sites=every_site("column"), term=TERMS["js, one"])
    layout = weightless(training_layout([0], 2, "split", True, TERMS["js, one"]))
    _, laid = both(adapters, examples([9]), layout)
    nll, apart, found = read(adapters, laid)
    assert nll == apart == 0.0 and all(not gradient.any() for gradient in found.values())
    assert laid.tensors["input_ids"].shape == (1, 9)


def test_a_line_restarts_positions_and_predicts_no_first_token() -> None:
    rows = examples([3, 2], supervised=2)
    line = lay_in_line(rows)
    assert line.position_ids.tolist() == [[0, 1, 2, 0, 1]] and line.token_rows.tolist() == [[0, 0, 0, 1, 1]]
    assert line.input_ids.tolist() == [[*rows[0].input_ids, *rows[1].input_ids]]
    assert rows[1].labels[0] != IGNORE_INDEX and line.labels[0, 3] == IGNORE_INDEX
    assert line.labels[0, [1, 2, 4]].tolist() == [*rows[0].input_ids[1:], rows[1].input_ids[1]]


def test_no_position_is_padding() -> None:
    adapters = adapted(sites=WEIGHT_SITES)
    batches = both(adapters, examples(LENGTHS), training_layout(range(6), 4, "split", True))
    shares = []
    for batch in batches:
        meter = Meter(Work(1, 1, 1, False), torch.device("cpu"), "float32")
        meter.add(batch.tensors, batch.counted)
        shares.append(meter.read(1.0)["padding_share"])
    assert shares == [pytest.approx(1 - sum(LENGTHS) / (8 * 19), abs=1e-4), 0.0]


def test_the_size_of_a_pass_is_that_of_its_tokens() -> None:
    term = TERMS["js, one"]  # one branch with gradient, two without
    layout = training_layout(range(5), 4, "split", True, term)
    assert pass_tokens(layout, [5, 19, 4, 7, 8], end_to_end=True) == 2 * 43
    assert pass_tokens(layout, [5, 19, 4, 7, 8], end_to_end=False) == 2 * 6 * 19
    plain = training_layout(range(5), 4, "split", True)
    assert pass_tokens(plain, [5, 19, 4, 7, 8], end_to_end=True) == 43


def test_other_inputs_than_the_rows_are_refused() -> None:
    adapters = adapted(sites=WEIGHT_SITES)
    _, laid = both(adapters, examples(LENGTHS), training_layout(range(6), 4, "split", True))
    layer = next(iter(adapters.layers.values()))
    with adapters.axis.active(laid.plan):
        for shape in ((54, 64), (2, 27, 64), (1, 53, 64)):
            with pytest.raises(MemberAxisError, match=r"one row of 54 tokens.*adapter\.target_modules"):
                layer(torch.zeros(shape))
        assert layer(torch.zeros(1, 54, 64)).shape == (1, 54, 64)
    bare = replace(laid.plan, row_keys=None)
    keyed = adapted(sites=every_site("column"))
    assert keyed.set_end_to_end("sdpa", 64) is None
    inputs = [laid.model_tensors[name] for name in ("input_ids", "attention_mask", "position_ids")]
    with keyed.axis.active(bare), pytest.raises(MemberAxisError, match="needs row keys"):
        hidden_states(keyed.model, *inputs)


@pytest.mark.parametrize(("family", "settings", "reason"), [
    ("llama", {}, None),
    ("gpt2", {}, None),
    ("mistral", {"sliding_window": None}, None),
    ("mistral", {"sliding_window": 30}, None),
    ("mistral", {"sliding_window": 29}, "29 tokens back"),
    ("gemma2", {}, "soft cap"),
    ("gemma2", {"attn_logit_softcapping": None}, "4 tokens back"),
    ("llama", {"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
])
def test_which_decoders_may_lie_end_to_end(family: str, settings: dict[str, object], reason: str | None) -> None:
    model = tiny_decoder(family)
    for name, value in settings.items():
        setattr(model.config, name, value)
    found = padding_reason(model, "sdpa", 30)
    assert found is None if reason is None else reason in (found or "")
    assert padding_reason(model, "eager", 30) == "model.attention is eager"


@pytest.mark.parametrize("family", [name for name in ENCODERS if "-" not in name])
def test_encoders_stay_padded(family: str) -> None:
    assert padding_reason(tiny_encoder(f"{family}-mlm"), "sdpa", 30) is not None


def test_a_model_that_mixes_rows_stays_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = adapted()
    assert choose_rows(adapters, "sdpa", 30) is None and adapters.end_to_end
    adapters = adapted()
    whole = AttentionSites.end_to_end

    def across(self: AttentionSites, heads: AttentionInputs) -> Tensor:
        whole(self, heads)
        return scaled_dot_product(heads).transpose(1, 2)

    monkeypatch.setattr(AttentionSites, "end_to_end", across)
    assert choose_rows(adapters, "sdpa", 30) == "LlamaForCausalLM does not keep rows that lie end to end apart"
    assert not adapters.end_to_end
