"""Padding, and the order in which rows are used."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.collate import collate, filler
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.sampler import global_batch_indices, length_sorted_chunks, process_share
from pipeline.errors import ConfigError

LONG = Encoded("long", (5, 6, 7), (IGNORE_INDEX, 6, 7))
SHORT = Encoded("short", (9, 0), (IGNORE_INDEX, 0))
IGNORED = IGNORE_INDEX


def test_left_padding() -> None:
    batch = collate([LONG, SHORT], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [IGNORED, IGNORED, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch.example_ids == ["long", "short"]


def test_right_padding() -> None:
    batch = collate([SHORT, LONG], pad_id=0, side="right")
    assert batch.input_ids.tolist() == [[9, 0, 0], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORED, 0, IGNORED], [IGNORED, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 2]]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 3),
    st.sampled_from(["left", "right"]),
    st.integers(1, 8),
)
def test_padding_loses_nothing(
    lengths: list[int], pad_id: int, side: Literal["left", "right"], multiple_of: int
) -> None:
    rows = [Encoded(str(n), tuple(i % 4 for i in range(n)), (IGNORED, *(i % 4 for i in range(1, n)))) for n in lengths]
    batch = collate(rows, pad_id, side, multiple_of)
    assert batch.input_ids.shape[1] % multiple_of == 0 and batch.input_ids.shape[1] - max(lengths) < multiple_of
    for i, row in enumerate(rows):
        real = batch.attention_mask[i].bool()
        assert tuple(batch.input_ids[i][real].tolist()) == row.input_ids
        assert tuple(batch.labels[i][real].tolist()) == row.labels
        assert batch.position_ids[i][real].tolist() == list(range(lengths[i]))
        assert (batch.labels[i][~real] == IGNORED).all()
    assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.attention_mask, batch.labels))


def test_a_fixed_length() -> None:
    assert collate([LONG], 0, length=8).input_ids.shape == (1, 8)
    with pytest.raises(ValueError, match="3 tokens, more than length = 2"):
        collate([LONG], 0, length=2)
    with pytest.raises(ValueError, match="at least one"):
        collate([], 0)


def test_a_filler_is_attended_and_carries_no_loss() -> None:
    batch = collate([LONG, filler(2)], pad_id=0)
    assert batch.attention_mask[1].tolist() == [0, 1, 1] and (batch.labels[1] == IGNORED).all()
    assert filler(2).supervised == 0


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 20))
def test_every_epoch_uses_every_row_once(rows: int, global_batch: int, seed: int, epoch: int) -> None:
    first_step, last_step = epoch * rows // global_batch, ((epoch + 1) * rows - 1) // global_batch
    chain = [i for s in range(first_step, last_step + 1) for i in global_batch_indices(rows, global_batch, s, seed)]
    offset = epoch * rows - first_step * global_batch
    assert sorted(chain[offset : offset + rows]) == list(range(rows))


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 9))
def test_the_chain_does_not_depend_on_the_batch_size(rows: int, global_batch: int, seed: int) -> None:
    steps = [i for s in range(6) for i in global_batch_indices(rows, global_batch, s, seed)]
    assert steps == [global_batch_indices(rows, 1, s, seed)[0] for s in range(6 * global_batch)]


def test_orders_differ_by_seed_and_epoch_and_are_pinned() -> None:
    first = global_batch_indices(50, 50, 0, seed=0)
    assert first != global_batch_indices(50, 50, 1, seed=0) and first != global_batch_indices(50, 50, 0, seed=1)
    assert global_batch_indices(8, 8, 0, seed=0) == PINNED


def test_positions_are_uniform_over_seeds() -> None:
    firsts = Counter(global_batch_indices(6, 1, 0, seed)[0] for seed in range(3000))
    chi_square = sum((firsts[i] - 500) ** 2 / 500 for i in range(6))
    assert chi_square < 20.5  # 99.9 % point, 5 degrees of freedom


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5))
def test_shares_are_the_batch_cut_in_equal_pieces(world_size: int, each: int) -> None:
    indices = [7 * i % 31 for i in range(world_size * each)]
    shares = [process_share(indices, rank, world_size) for rank in range(world_size)]
    assert [pair for share in shares for pair in share] == list(enumerate(indices))
    assert {len(share) for share in shares} == {each}


def test_an_indivisible_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.global_batch = 10: must be a multiple of the 4 processes.*=12"):
        process_share(list(range(10)), 0, 4)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 300), st.integers(1, 4))
def test_chunks_fit_the_budget_and_hold_every_row(lengths: list[int], budget: int, copies: int) -> None:
    chunks = length_sorted_chunks(lengths, budget, copies)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))
    maxima = [max(lengths[i] for i in chunk) for chunk in chunks]
    assert maxima == sorted(maxima, reverse=True)
    assert all(len(c) == 1 or len(c) * copies * m <= budget for c, m in zip(chunks, maxima, strict=True))


def test_chunks_are_filled() -> None:
    assert length_sorted_chunks([3, 5, 3, 4], budget_tokens=10) == [[1, 3], [0, 2]]
    assert length_sorted_chunks([3, 5, 3, 4], budget_tokens=10, copies=2) == [[1], [3], [0], [2]]


PINNED = [0, 2, 1, 5, 4, 3, 6, 7]
"""Computed once: an order that changes would make resumed runs see other rows."""
