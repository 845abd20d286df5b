"""Packing and passes cut by tokens: the same examples, masks, loss and gradients, whatever shares a row or a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from helpers.families import FAMILIES, assert_close_gradients, examples, gradients, trained_start
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import training_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.config.method import Consistency, Site
from pipeline.data.collate import collate
from pipeline.data.encode import IGNORE_INDEX
from pipeline.data.packing import PackedRows, best_fit, pack
from pipeline.errors import ConfigError
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedLM
from pipeline.model.head import check_packing
from pipeline.support.tiny import tiny_decoder, tiny_llama
from pipeline.training.batch import lay_out
from pipeline.training.loader import BatchLoader, MicroBatch, open_loader

GROUPS = ((0, 1, 2), (3, 4), (5,))
LENGTHS = [5, 9, 4, 7, 8, 6]
WEIGHT_SITES = tuple(Site(position=position, rate=0.4) for position in ("lora_A", "lora_B"))
ACTIVATION_SITES = {
    "input": (Site(position="lora_input", rate=0.4),),
    "ranks": (Site(position="lora_rank", pattern="element", rate=0.4),),
    "keys": (Site(position="attention_logits", pattern="column", rate=0.4),),
    "pairs": (Site(position="attention_logits", pattern="element", rate=0.4),),
    "spans": (Site(position="attention_logits", pattern="span", rate=0.4),),
    "hidden spans": (Site(position="ffn_hidden", pattern="span", rate=0.4),),
    "hidden columns": (Site(position="ffn_hidden", pattern="column", rate=0.4),),
}


def adapted(
    family: str, attention: str, sites: tuple[Site, ...], consistency: Consistency = Consistency()  # noqa: B008
) -> Adapters:
    model = tiny_decoder(family)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    spec = AdapterSpec(rank=4, sites=sites, consistency=consistency)
    return trained_start(attach(model, [spec], "all-linear", seed=0))


def loss_and_gradients(adapters: Adapters, micros: list[MicroBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    term, total = adapters.specs[0].consistency, 0.0
    objective = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)
    for micro in micros:
        rows = lay_out(adapters, micro.examples, micro.layout, 2, MaskKey(0, 7))
        with adapters.axis.active(rows.plan):
            nll, divergence = objective(**rows.inputs)
            loss = nll + term.weight * divergence
            loss.backward()
        total += float(loss.detach())
    return total, gradients(adapters)


def compare_packed(adapters: Adapters) -> None:
    """Three packed rows under three draws, against every example in a row of its own under its row's draw."""
    rows, term = examples(LENGTHS), adapters.specs[0].consistency
    draws = 3 if term.kind == "none" else 6
    packed = [pack([rows[i] for i in group]) for group in GROUPS]
    alone = [draw for draw, group in enumerate(GROUPS) for _ in group]
    together = MicroBatch(packed, training_layout(range(3), draws, "split", True, term))
    apart = MicroBatch(rows, training_layout(alone, draws, "split", True, term))
    loss, found = loss_and_gradients(adapters, [together])
    expected_loss, expected = loss_and_gradients(adapters, [apart])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(found, expected, 1e-4)
    other = MicroBatch(packed, training_layout([1, 2, 3], draws, "split", True, term))
    assert abs(loss_and_gradients(adapters, [other])[0] - loss) > 1e-3  # the draw of a row matters


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_have_the_loss_and_gradients_of_rows_of_their_own(family: str, attention: str) -> None:
    adapters = adapted(family, attention, WEIGHT_SITES)
    check_packing(adapters.model, attention)
    compare_packed(adapters)


@pytest.mark.parametrize("site", ACTIVATION_SITES)
def test_activation_masks_do_not_see_the_packing(site: str) -> None:
    compare_packed(adapted("llama", "sdpa", ACTIVATION_SITES[site]))


@pytest.mark.parametrize(("kind", "branches"), [("kl", "one"), ("js", "both")])
def test_packed_examples_have_the_consistency_term_of_rows_of_their_own(kind: str, branches: str) -> None:
    term = Consistency(kind=kind, weight=0.5, branches=branches)
    compare_packed(adapted("llama", "sdpa", ACTIVATION_SITES["keys"], term))


@pytest.mark.parametrize("side", ["left", "right"])
def test_packed_batches_restart_positions_and_have_no_attention_mask(side: str) -> None:
    rows = examples([4, 5, 6])
    batch = collate([pack(rows[:2]), rows[2]], pad_id=2, side=side)
    ids, positions = batch.input_ids.tolist(), batch.position_ids.tolist()
    assert positions[0] == [0, 1, 2, 3, 0, 1, 2, 3, 4]
    assert positions[1] == ([0, 0, 0, *range(6)] if side == "left" else [*range(6), 0, 0, 0])
    assert ids[0] == [*rows[0].input_ids, *rows[1].input_ids]
    assert batch.labels[0, 4] == IGNORE_INDEX  # nothing before an example predicts its first token
    assert batch.packed and not collate(rows, pad_id=2).packed
    layout = training_layout([0, 1], 2, "split", True)
    packed = lay_out(adapted("llama", "sdpa", WEIGHT_SITES), [pack(rows[:2]), rows[2]], layout, 2, MaskKey(0, 0))
    assert "attention_mask" not in packed.inputs and int(packed.tensors["attention_mask"].sum()) == 15


def test_a_model_that_mixes_packed_examples_is_refused() -> None:
    def without_mask(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     attention_mask: torch.Tensor | None, **kwargs: object) -> tuple[torch.Tensor, None]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        done = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return done.transpose(1, 2).contiguous(), None

    AttentionInterface.register("without_mask", without_mask)
    model = tiny_llama()
    check_packing(model, "sdpa")
    model.set_attn_implementation("without_mask")
    with pytest.raises(ConfigError, match="train.packing.*LlamaForCausalLM with model.attention=without_mask"):
        check_packing(model, "without_mask")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_best_fit_fills_rows_and_forgets_no_example(lengths: list[int], capacity: int) -> None:
    lengths = sorted(lengths, reverse=True)
    groups = best_fit(lengths, capacity)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in group) for group in groups]
    assert max(filled) <= capacity
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1  # two half-empty rows would be one


def test_every_epoch_packs_every_example_once_and_otherwise() -> None:
    rows = examples([4 + i % 5 for i in range(50)])
    packed = PackedRows(rows, [len(row.input_ids) for row in rows], 16, seed=3)
    epochs = [[packed.row(epoch, index) for index in range(len(packed))] for epoch in (0, 1)]
    for epoch, found in enumerate(epochs):
        assert Counter(part.example for row in found for part in row.parts) == Counter(row.example for row in rows)
        assert all(len(row.input_ids) == packed.length(epoch, i) <= 16 for i, row in enumerate(found))
    assert [row.example for row in epochs[0]] != [row.example for row in epochs[1]]
    again = PackedRows(rows, [len(row.input_ids) for row in rows], 16, seed=3)
    assert [again.row(1, index) for index in range(len(again))] == epochs[1]


def loaders(
    settings: list[str], lengths: list[int], masked: bool, processes: int = 1, end_to_end: bool = False
) -> list[BatchLoader]:
    config, spec = load_config(None, settings), AdapterSpec(rank=4, sites=WEIGHT_SITES if masked else ())
    train, longest = config.train, config.data.max_tokens
    return [
        open_loader(train, longest, examples(lengths), spec, rank, processes, end_to_end=end_to_end)
        for rank in range(processes)
    ]


BATCH = ["train.global_batch=12", "train.micro_batch=2", "train.draws=3"]
LONG = [4 + 7 * (i % 6) for i in range(40)]


@pytest.mark.parametrize("layout", ["split", "replicate"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_passes_cut_by_tokens_cover_the_global_batch(layout: str, processes: int) -> None:
    settings = [*BATCH, f"train.draw_layout={layout}"]
    (fixed,) = loaders(settings, LONG, masked=True)
    own = loaders([*settings, "train.micro_tokens=130"], LONG, masked=True, processes=processes)
    counts = set()
    for step in range(6):
        expected = fixed.of_step(step)
        parts = [loader.of_step(step) for loader in own]
        assert len({len(part.micros) for part in parts}) == 1
        counts.add(len(parts[0].micros))
        assert sum(part.supervised for part in parts) == expected.supervised
        assert sum(part.tokens for part in parts) == expected.tokens
        assert pairs(m for part in parts for m in part.micros) == pairs(expected.micros)
        for micro in (m for part in parts for m in part.micros):
            assert micro.places <= 130 or len(micro.examples) == 1
    assert len(counts) > 1 or processes > 1  # the number of passes differs from step to step


def pairs(micros: Iterable[MicroBatch]) -> Counter[tuple[str, int | None, float]]:
    """(example, draw, weight) of every row that counts."""
    found: Counter[tuple[str, int | None, float]] = Counter()
    for micro in micros:
        for row, (source, weight) in enumerate(zip(micro.layout.source, micro.layout.weights, strict=True)):
            if weight > 0:
                found[micro.examples[source].example, micro.layout.members[row // micro.layout.rows].draw, weight] += 1
    return found


def test_passes_cut_by_tokens_pad_less_and_need_few_fillers() -> None:
    def fillers_and_padding(loader: BatchLoader) -> tuple[int, int]:
        fillers = padding = 0
        for micro in (micro for step in range(5) for micro in loader.of_step(step).micros):
            rows = [micro.examples[source] for source in micro.layout.source]
            fillers += sum(weight == 0 for weight in micro.layout.weights)
            longest = max(len(row.input_ids) for row in rows)
            padding += sum(longest - len(row.input_ids) for row in rows)
        return fillers, padding

    _, fixed = fillers_and_padding(loaders([*BATCH, "train.micro_batch=6"], LONG, masked=True)[0])
    fillers, padding = fillers_and_padding(loaders([*BATCH, "train.micro_tokens=200"], LONG, masked=True)[0])
    assert padding < 0.7 * fixed and fillers <= 5


@pytest.mark.parametrize(("layout", "masked"), [("split", True), ("replicate", True), ("split", False)])
def test_passes_cut_by_tokens_have_the_loss_and_gradients_of_fixed_ones(layout: str, masked: bool) -> None:
    adapters = adapted("llama", "sdpa", WEIGHT_SITES if masked else ())
    settings = [*BATCH, f"train.draw_layout={layout}"]
    expected_loss, expected = loss_and_gradients(adapters, loaders(settings, LONG, masked)[0].of_step(3).micros)
    cut = loaders([*settings, "train.micro_tokens=70"], LONG, masked, processes=2)
    parts = [loader.of_step(3).micros for loader in cut]
    loss, found = loss_and_gradients(adapters, [*parts[0], *parts[1]])
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(found, expected, 1e-4)


@pytest.mark.parametrize("layout", ["split", "replicate"])
def test_passes_of_rows_end_to_end_hold_as_many_tokens(layout: str) -> None:
    """Two processes, passes cut by the tokens of their rows: the global batch, its loss, its gradients."""
    adapters = adapted("llama", "sdpa", (*WEIGHT_SITES, *ACTIVATION_SITES["keys"]))
    settings = [*BATCH, f"train.draw_layout={layout}"]
    (fixed,) = (loader.of_step(3).micros for loader in loaders(settings, LONG, masked=True))
    expected_loss, expected = loss_and_gradients(adapters, fixed)
    assert adapters.set_end_to_end("sdpa", 64) is None
    budget, copies = 130, 3 if layout == "replicate" else 1
    cut = loaders([*settings, f"train.micro_tokens={budget}"], LONG, masked=True, processes=2, end_to_end=True)
    micros = [micro for loader in cut for micro in loader.of_step(3).micros]
    assert pairs(micros) == pairs(fixed)
    for micro in micros:
        assert sum(len(row.input_ids) for row in micro.examples) * copies <= budget or len(micro.examples) == 1
    loss, found = loss_and_gradients(adapters, micros)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert_close_gradients(found, expected, 1e-4)


def test_a_process_without_rows_makes_a_pass_without_loss() -> None:
    own = loaders([*BATCH, "train.micro_tokens=100000"], LONG, masked=True, processes=2)
    empty = own[1].of_step(0)
    assert empty.supervised == 0 and len(empty.micros) == 1 and empty.micros[0].layout.weights == (0.0,)
    loss, found = loss_and_gradients(adapted("llama", "sdpa", WEIGHT_SITES), empty.micros)
    assert loss == 0.0 and all(gradient.abs().max() == 0.0 for gradient in found.values())
    assert empty.micros[0].places == min(LONG)


def test_packed_feed_has_the_rows_of_one_process_on_several() -> None:
    settings = [*BATCH, "train.packing=true", "data.max_tokens=48", "train.global_batch=6", "train.micro_batch=1"]
    (whole,) = loaders(settings, LONG, masked=True)
    parts = loaders(settings, LONG, masked=True, processes=2)
    for step in (0, 5):
        found = [pairs(micro for part in parts for micro in part.of_step(step).micros)]
        assert found == [pairs(whole.of_step(step).micros)]
    assert sum(LONG) / 48 <= whole.rows <= 1.2 * sum(LONG) / 48
