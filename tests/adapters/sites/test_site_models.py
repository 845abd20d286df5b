"""Activation sites on whole models: what their masks depend on, what they never see, who refuses them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.site_models import Reference, adapted, batch, model_positions, our_logits, plan_for, with_random_B
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import replicate_layout, split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.sites.anatomy import attention_modules, down_projections, is_causal
from pipeline.adapters.sites.attention import NAME
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig
from pipeline.config.method import LEGAL, Method, Site
from pipeline.errors import ConfigError
from pipeline.loss.objective import SupervisedLM
from pipeline.support.sites import FAMILIES, format_table, support_table, tiny_model
from pipeline.training.batch import lay_out

MEMBERS = [Member(0, 0), Member(0, 5), Member(0)]
EXAMPLES = torch.tensor([21, 22])
ROUNDING = 1e-4
"""Between two orders of summation: on the longest path through two layers of width 64 (FFN 128) and the head lie about
2 · (64 + 64 + 64 + 64 + 128) + 64 = 830 sums, each off by 2^-24 of its size at most: 5e-5 in either order."""


def sites_of(pattern: str) -> tuple[Site, ...]:
    """Every activation site at once, the attention's and the FFN's in one pattern."""
    return (
        Site(position="lora_input", rate=0.3),
        Site(position="attention_logits", pattern=pattern, rate=0.3),  # type: ignore[arg-type]
        Site(position="attention_weights", pattern=pattern, rate=0.3),  # type: ignore[arg-type]
        Site(position="ffn_hidden", pattern=pattern, rate=0.3),  # type: ignore[arg-type]
    )


def by_example(
    adapters: Adapters, rows: dict[str, Tensor], examples: Tensor = EXAMPLES
) -> dict[tuple[int, int], Tensor]:
    """(member, example) -> logits (tokens, V) of its real tokens, in order."""
    logits = our_logits(adapters, plan_for(adapters, MEMBERS, rows, examples), rows).detach()
    found = {}
    for m in range(len(MEMBERS)):
        for row in range(logits.shape[1]):
            of_token = examples[row].expand(logits.shape[2]) if examples.dim() == 1 else examples[row]
            real = rows["position_ids"].new_ones(logits.shape[2]).bool()
            mask = rows.get("attention_mask")
            if mask is not None and mask.dim() == 2:
                real = mask[row].bool()
            for example in of_token[real].unique().tolist():
                found[m, example] = logits[m, row][real & (of_token == example)]
    return found


def assert_same(ours: dict[tuple[int, int], Tensor], wanted: dict[tuple[int, int], Tensor]) -> None:
    assert ours.keys() <= wanted.keys() and ours
    for where, logits in ours.items():
        torch.testing.assert_close(
            logits, wanted[where], rtol=ROUNDING, atol=ROUNDING, msg=lambda text, w=where: f"{w}: {text}"
        )


def packed(form: str) -> tuple[dict[str, Tensor | None], Tensor]:
    """The two rows of `batch()` in one row of 14 tokens, as the three forms that models take."""
    rows = batch()
    real = rows["attention_mask"].bool()
    ids, positions = rows["input_ids"][real][None], rows["position_ids"][real][None]
    owner = torch.tensor([[0] * 9 + [1] * 5])
    block = (owner[:, :, None] == owner[:, None, :]) & torch.ones(14, 14, dtype=torch.bool).tril()
    masks = {
        "positions": None,
        "bool": block[:, None],
        "additive": torch.zeros(1, 1, 14, 14).masked_fill(~block[:, None], torch.finfo(torch.float32).min),
    }
    return {"input_ids": ids, "attention_mask": masks[form], "position_ids": positions}, EXAMPLES[owner]


# --- what masks depend on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_side_length_order_and_company_change_nothing(family: str, pattern: str) -> None:
    adapters, _ = adapted(family, *sites_of(pattern))
    wanted = by_example(adapters, batch())
    assert not torch.allclose(wanted[0, 21], wanted[1, 21], atol=1e-2)
    assert not torch.allclose(wanted[0, 21], wanted[2, 21], atol=1e-2)
    assert_same(by_example(adapters, batch(side="right")), wanted)
    assert_same(by_example(adapters, batch(total=17)), wanted)
    rows = batch()
    assert_same(by_example(adapters, {k: v.flip(0) for k, v in rows.items()}, EXAMPLES.flip(0)), wanted)
    for b in range(2):
        assert_same(by_example(adapters, {k: v[b : b + 1] for k, v in rows.items()}, EXAMPLES[b : b + 1]), wanted)


@pytest.mark.parametrize("form", ["positions", "bool", "additive"])
@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_rows_equal_rows_of_their_own(family: str, pattern: str, form: str) -> None:
    adapters, _ = adapted(family, *sites_of(pattern))
    rows, owners = packed(form)
    assert_same(by_example(adapters, rows, owners), by_example(adapters, batch()))  # type: ignore[arg-type]


def test_packed_rows_equal_the_dense_reference() -> None:
    """The packed form itself against float64, not only against our unpacked rows."""
    adapters, stock = adapted(
        "llama", Site(position="attention_logits", rate=0.4), Site(position="ffn_hidden", rate=0.3, pattern="column")
    )
    rows, owners = packed("bool")
    plan = plan_for(adapters, MEMBERS, rows, owners)  # type: ignore[arg-type]
    ours = our_logits(adapters, plan, rows).detach().double()  # type: ignore[arg-type]
    reference = Reference(stock, adapters, "llama")
    for m, member in enumerate(MEMBERS):
        theirs = reference.logits(member, plan, rows, owners).detach()  # type: ignore[arg-type]
        assert float((ours[m] - theirs).abs().max()) <= 1e-3 * float(theirs.abs().max())


@pytest.mark.usefixtures("stock_attention")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "bert", "roberta"])
def test_without_draws_the_model_is_the_stock_one(family: str, attention: str) -> None:
    """The registered name must carry its mask: left padding and packed rows, at no rate at all."""
    adapters, _ = adapted(family, *sites_of("column"), attention=attention)
    stock = tiny_model(family, "none", attention)
    forms = [
        "positions",
        "additive",
        *(["bool"] if attention == "sdpa" else []),
    ]  # stock eager adds a bool mask as 0 and 1
    inputs = [batch(), batch(side="right"), *(packed(f)[0] for f in forms if family not in ("bert", "roberta"))]
    for rows in inputs:
        examples = torch.zeros(len(rows["input_ids"]), dtype=torch.int64)
        ours = our_logits(adapters, plan_for(adapters, [Member(None)], rows, examples), rows)[0]  # type: ignore[arg-type]
        with_positions = {**rows, "position_ids": model_positions(stock, rows["position_ids"])}
        theirs = stock(**with_positions, use_cache=False).logits
        mask = rows["attention_mask"]
        real = torch.ones(ours.shape[:2]).bool() if mask is None or mask.dim() == 4 else mask.bool()
        if attention == "sdpa":
            assert torch.equal(ours[real], theirs[real])
        else:
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)


def llama_rows(pattern: str) -> tuple[Adapters, list[object]]:
    from helpers.families import examples

    adapters, _ = adapted("llama", *sites_of(pattern), Site(position="lora_A", rate=0.3))
    return adapters, examples([7, 4, 9, 6])  # type: ignore[return-value]


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
def test_micro_batches_and_processes_change_neither_loss_nor_gradient(pattern: str) -> None:
    """A global batch of four under two draws (`split`), whole and in every way of cutting it."""
    adapters, rows = llama_rows(pattern)

    def total(parts: list[list[int]]) -> tuple[float, list[Tensor]]:
        loss = torch.zeros(())
        for part in parts:
            built = lay_out(adapters, [rows[i] for i in part], split_layout(part, 2), 2, MaskKey(1, 4))  # type: ignore[misc]
            with adapters.axis.active(built.plan):
                loss = loss + SupervisedLM(adapters.model)(**built.tensors, row_weights=built.weights)
        parameters = [p for p in adapters.model.parameters() if p.requires_grad]
        return float(loss.detach()), list(torch.autograd.grad(loss, parameters))

    whole, gradients = total([[0, 1, 2, 3]])
    for parts in ([[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [2], [1], [0]]):
        loss, others = total(parts)
        assert loss == pytest.approx(whole, rel=ROUNDING)
        for ours, wanted in zip(others, gradients, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0.0, atol=ROUNDING * max(float(wanted.abs().max()), 1e-2))


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
def test_activation_checkpointing_recomputes_the_same_masks(pattern: str) -> None:
    """Loss and gradients bit for bit; without the plan in the backward pass they would differ or fail."""
    adapters, rows = llama_rows(pattern)
    adapters.model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            adapters.model.activation_checkpointing_enable({"use_reentrant": False})
        built = lay_out(adapters, rows, replicate_layout(4, 2), 2, MaskKey(1, 4))  # type: ignore[arg-type]
        with adapters.axis.active(built.plan):
            loss = SupervisedLM(adapters.model)(**built.tensors, row_weights=built.weights)
            parameters = [p for p in adapters.model.parameters() if p.requires_grad]
            found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_masks_change_with_step_seed_and_layer_and_are_the_same_again() -> None:
    adapters, _ = adapted("llama", *sites_of("column"))
    rows = batch()

    def logits(seed: int, phase: int | str) -> Tensor:
        return our_logits(adapters, plan_for(adapters, MEMBERS, rows, EXAMPLES, MaskKey(seed, phase)), rows).detach()

    first = logits(7, 3)
    assert torch.equal(first, logits(7, 3))
    for other in (logits(8, 3), logits(7, 4), logits(7, "test")):
        assert not torch.allclose(first[:2], other[:2], atol=1e-2) and torch.equal(first[2], other[2])
    modules = attention_modules(adapters.model).values()
    keys = [key for m in modules for _, key in m.loradrop_sites.sites[0]]  # type: ignore[union-attr, index]
    assert len(set(keys)) == len(keys) == 4


# --- what masks never see --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_the_loss_at_a_position_does_not_depend_on_later_tokens(family: str, pattern: str) -> None:
    """Every site on, at a rate that leaves many queries with nothing: the same bits, whatever comes after."""
    sites = [s.model_copy(update={"rate": 0.8}) for s in sites_of(pattern)] + [Site(position="lora_B", rate=0.5)]
    adapters, _ = adapted(family, *sites)
    rows = batch((10, 6))
    plan = plan_for(adapters, MEMBERS, rows, EXAMPLES)
    before = our_logits(adapters, plan, rows).detach()
    changed = {**rows, "input_ids": rows["input_ids"].clone()}
    changed["input_ids"][:, 7:] = (changed["input_ids"][:, 7:] + 17) % 60 + 3
    after = our_logits(adapters, plan, changed).detach()
    assert bool(before.isfinite().all()) and not torch.allclose(before[:, :, 7:], after[:, :, 7:])
    real = rows["attention_mask"].bool()[:, :7]
    torch.testing.assert_close(after[:, :, :7][:, real], before[:, :, :7][:, real], rtol=1e-5, atol=1e-5)
    shorter = {k: v[:, :7] for k, v in rows.items()}
    cut = our_logits(adapters, plan_for(adapters, MEMBERS, shorter, EXAMPLES), shorter).detach()
    torch.testing.assert_close(cut[:, real], before[:, :, :7][:, real], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("pattern", ["column", "element", "span"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_has_no_weight(family: str, pattern: str) -> None:
    sites = [s.model_copy(update={"rate": 0.8}) for s in sites_of(pattern)]
    adapters, _ = adapted(family, *sites)
    rows = batch()
    plan, real = plan_for(adapters, MEMBERS, rows, EXAMPLES), rows["attention_mask"].bool()
    other = {**rows, "input_ids": torch.where(real, rows["input_ids"], torch.full_like(rows["input_ids"], 33))}
    before, after = (our_logits(adapters, plan, r).detach()[:, real] for r in (rows, other))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert bool(before.isfinite().all())


# --- where sites go --------------------------------------------------------------------------------------------------


def test_hiddenkey_is_in_the_latter_half_of_a_decoder_and_in_all_of_an_encoder() -> None:
    """`layers: auto` of the presets is resolved where the model is known, and stored as a range."""
    spec = AdapterSpec.from_config(AdapterConfig(method="hiddenkey_minus"), 1)
    for family, layers in (("llama", (0.5, 1.0)), ("gpt2", (0.5, 1.0)), ("bert", (0.0, 1.0)), ("roberta", (0.0, 1.0))):
        model = tiny_model(family)
        assert is_causal(model) is (layers[0] == 0.5)
        adapters = attach(model, [spec], "all-linear", seed=0)
        assert {site.layers for site in adapters.specs[0].sites} == {layers}
        with_attention = [bool(m.loradrop_sites.sites) for m in attention_modules(model).values()]  # type: ignore[union-attr]
        with_hooks = [len(m._forward_pre_hooks) > 0 for m in down_projections(model).values()]
        assert with_attention == with_hooks == [layers[0] == 0.0, True]
    everywhere = AdapterSpec(sites=(Site(position="attention_logits", rate=0.1),))
    assert attach(tiny_model("llama"), [everywhere], "all-linear", seed=0).specs[0].sites[0].layers == (0.0, 1.0)


def test_only_the_model_at_hand_is_switched() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, other = tiny_model("llama"), tiny_model("llama")
    attach(plain, [AdapterSpec(sites=(Site(position="ffn_hidden", rate=0.1),))], "all-linear", seed=0)
    attach(other, [AdapterSpec(sites=(Site(position="attention_logits", rate=0.1),))], "all-linear", seed=0)
    assert tiny_model("llama").config._attn_implementation == "sdpa"
    assert plain.config._attn_implementation == other.config._attn_implementation == NAME
    assert not any(hasattr(m, "loradrop_sites") for m in attention_modules(plain).values())
    assert NAME in ALL_ATTENTION_FUNCTIONS and NAME in ALL_MASK_ATTENTION_FUNCTIONS
    assert all(hasattr(m, "loradrop_sites") for m in attention_modules(other).values())


def test_adapters_with_different_sites_in_one_model_are_what_they_are_alone() -> None:
    """K adapters, one pass: DropKey in half of the layers, DropAttention, HiddenCut, nothing."""
    specs = [
        AdapterSpec(rank=4, sites=(Site(position="attention_logits", rate=0.4, layers=(0.5, 1.0)),)),
        AdapterSpec(rank=2, sites=(Site(position="attention_weights", rate=0.3, pattern="element"),)),
        AdapterSpec(
            rank=4, sites=(Site(position="ffn_hidden", rate=0.3, pattern="span"), Site(position="lora_input", rate=0.2))
        ),
        AdapterSpec(rank=4),
    ]
    together = with_random_B(attach(tiny_model("llama"), specs, "all-linear", seed=0))
    rows = batch()
    members = [Member(k, draw) for k in range(4) for draw in (0, 1)]
    ours = our_logits(together, plan_for(together, members, rows, EXAMPLES), rows).detach()
    real = rows["attention_mask"].bool()
    for m, member in enumerate(members):
        alone = our_logits(together, plan_for(together, [member], rows, EXAMPLES), rows).detach()[0]
        torch.testing.assert_close(ours[m][real], alone[real], rtol=ROUNDING, atol=ROUNDING)
    assert not torch.allclose(ours[0][real], ours[1][real], atol=1e-2)
    torch.testing.assert_close(ours[6][real], ours[7][real], rtol=1e-5, atol=1e-5)


# --- who refuses them ------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], object], Site, tuple[str, ...]]] = {
    "DeBERTaV3": (
        lambda: tiny_model("deberta-v2", "none", "eager"),
        Site(position="attention_logits", rate=0.1),
        ("adapter.method = 'attention_logits'", "deberta-v2", "attention interface", "lora_input, ffn_hidden"),
    ),
    "soft cap": (
        lambda: tiny_model("gemma2", "none", "eager"),
        Site(position="attention_weights", rate=0.1),
        ("attention_weights", "gemma2", "soft cap"),
    ),
    "experts": (
        lambda: tiny_model("mixtral"),
        Site(position="ffn_hidden", rate=0.1),
        ("ffn_hidden", "mixtral", "no feed-forward network"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_cannot_honour_a_site_refuses_it_by_name_and_stays_as_it_was(name: str) -> None:
    build, site, parts = REFUSED[name]
    model = build()
    names = [n for n, _ in model.named_modules()]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError) as caught:
        attach(model, [AdapterSpec(sites=(site,))], ["v_proj", "value_proj"], seed=0)  # type: ignore[arg-type]
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert [n for n, _ in model.named_modules()] == names  # type: ignore[attr-defined]


def test_another_attention_implementation_is_refused_with_the_way_out() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ConfigError, match="model.attention=sdpa"):
        attach(model, [AdapterSpec(sites=(Site(position="attention_logits", rate=0.1),))], "all-linear", seed=0)


def test_a_site_at_rate_zero_is_no_site() -> None:
    model = tiny_model("deberta-v2", "none", "eager")
    adapters = attach(
        model, [AdapterSpec(sites=(Site(position="attention_logits", rate=0.0),))], ["value_proj"], seed=0
    )
    assert not adapters.needs_row_keys()


# --- the grammar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"position": "ffn_hidden", "rate": 0.1, "heads": "kv"}, "heads says nothing about ffn_hidden"),
        ({"position": "attention_logits", "rate": 0.1, "span_length": 8}, "span_length says nothing"),
        ({"position": "attention_logits", "rate": 0.1, "stop_gradient": False}, "stop_gradient says nothing"),
        ({"position": "attention_logits", "rate": 0.1, "compensation": "inverse"}, "compensations none"),
        ({"position": "ffn_hidden", "rate": 0.1, "layers": [0.5, 0.5]}, "0 <= from < to <= 1"),
        ({"position": "ffn_hidden", "rate": 0.1, "layers": "latter"}, "auto"),
        (
            {"position": "attention_weights", "rate": 0.1, "pattern": "span", "span_length": 0},
            "greater than or equal to 1",
        ),
    ],
)
def test_a_site_that_means_nothing_is_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Site.model_validate(values)


def test_two_sites_on_the_same_layers_are_refused_and_divided_layers_are_not() -> None:
    first, second = (Site(position="ffn_hidden", rate=0.1, layers=layers) for layers in ((0.0, 0.5), (0.5, 1.0)))
    assert Method(sites=(first, second)).sites == (first, second)
    with pytest.raises(ConfigError, match="ffn_hidden has two sites"):
        Method(sites=(first, Site(position="ffn_hidden", rate=0.2)))
    with pytest.raises(ConfigError, match="ffn_hidden has two sites"):
        AdapterConfig(method="hiddenkey_minus+hiddencut")


def test_sites_round_trip_through_yaml() -> None:
    for position, (patterns, compensations) in LEGAL.items():
        for pattern in patterns:
            for compensation in compensations:
                site = Site(position=position, pattern=pattern, compensation=compensation, rate=0.2, layers=(0.25, 1.0))  # type: ignore[arg-type]
                assert Site.model_validate(site.model_dump(mode="json")) == site
    auto = AdapterConfig(method="hiddenkey_minus").resolved_method()
    assert Method.model_validate(auto.model_dump(mode="json")) == auto and auto.sites[0].layers == "auto"


# --- the whole line --------------------------------------------------------------------------------------------------

PRESETS = [
    "droplora",
    "rank_dropout",
    "dropkey",
    "dropattention",
    "hiddencut",
    "hiddenkey_minus",
    "lora_dropout+hiddenkey_minus",
    "hiddenkey",
    "lora_dropout+hiddenkey",
    "input_dropout+dropkey",
]


@pytest.mark.slow
@pytest.mark.parametrize("method", PRESETS)
def test_presets_train_and_evaluate(
    method: str, tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training under the preset, then base, adapter and four mask draws on all splits; draws differ, all is finite."""
    from pipeline.adapters.peft_format import read_adapter
    from pipeline.config import load_config
    from pipeline.files import read_json_lines
    from pipeline.run_folder.members import read_members
    from pipeline.run_folder.paths import RunPaths
    from pipeline.run_folder.predictions import read_predictions
    from pipeline.stages.evaluate import evaluate_run
    from pipeline.stages.train import train_run

    monkeypatch.setattr("pipeline.stages.evaluate.leave_world", lambda: None)  # it serves the next test
    config = load_config(None, [*tiny_settings, f"adapter.method={method}", "train.max_steps=12", "train.draws=2"])
    result = train_run(config, tmp_path / "run")
    evaluate_run(tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    losses = [row["loss"] for row in read_json_lines(paths.metrics) if row["kind"] == "train"]
    assert losses[-1] < losses[0] and math.isfinite(result["validation_nll"])
    stored = read_adapter(paths.adapter).spec.sites
    assert all(
        site.layers == ((0.5, 1.0) if "hiddenkey" in method and not site.position.startswith("lora") else (0.0, 1.0))
        for site in stored
    )
    predictions = read_predictions(paths.predictions, "test")
    groups = [member.group for member in read_members(paths.predictions)]
    assert groups == ["base", "mean_field"] + ["mask_draw"] * 4
    log_probs = torch.from_numpy(predictions.log_probs)  # type: ignore[union-attr]
    assert bool(log_probs.isfinite().all())
    for m in range(2, 6):
        assert not torch.allclose(log_probs[m], log_probs[1], atol=1e-4)
        assert m == 2 or not torch.allclose(log_probs[m], log_probs[2], atol=1e-4)


@pytest.mark.slow
def test_two_processes_checkpointing_and_accumulation_train_the_same(tmp_path: Path, tiny_settings: list[str]) -> None:
    from helpers.runs import adapter_hash, launch, losses

    settings = [*tiny_settings, "adapter.method=lora_dropout+hiddenkey_minus"]
    runs = {
        "one": ["launch.processes=1"],  # accumulation 2
        "two": ["launch.processes=2"],
        "large micro batch": ["launch.processes=1", "train.micro_batch=8"],
        "checkpointing": ["launch.processes=1", "train.activation_checkpointing=true"],
    }
    for name, extra in runs.items():
        assert launch(tmp_path / name, [*settings, *extra]) == 0, name
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-3), name
    assert adapter_hash(tmp_path / "checkpointing") == adapter_hash(tmp_path / "one")


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_is_found_out_by_attaching(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two small families; a broken mechanism shows as FAILED, not as tested."""
    from pipeline.support import sites

    monkeypatch.setattr(sites, "BACKENDS", (("none", "eager"),))
    cells = support_table(["deberta-v2"])
    by_position = {position: {c.status for c in cells if c.site.position == position} for position in LEGAL}
    assert by_position == {p: {"refused" if p.startswith("attention") else "tested"} for p in LEGAL}
    assert "attention interface" in format_table(cells)
    monkeypatch.setattr(sites, "legal_sites", lambda: iter([Site(position="ffn_hidden", rate=0.4)]))
    monkeypatch.setattr("pipeline.adapters.sites.ffn.drop", lambda x, dropped, kept: x)
    assert sites.main(["--family", "llama"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "two draws give the same result" in shown


@pytest.mark.slow
def test_every_column_and_element_site_works_where_it_was_promised() -> None:
    """Llama, Qwen, BERT with an NF4 and a plain base: tested, not refused; nowhere a failure."""
    cells = support_table(tuple(FAMILIES))
    assert not [cell for cell in cells if cell.status == "FAILED"]
    for cell in cells:
        if cell.family in ("llama", "qwen2", "qwen3", "bert", "roberta", "gpt2"):
            assert cell.status == "tested", cell
        if cell.status == "refused":
            assert cell.family in cell.detail or cell.site.position in cell.detail
