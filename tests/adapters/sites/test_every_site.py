"""Every site of the grammar on at once: what a loss may depend on, also where two draws are compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.families import adapted_llama, examples, gradients
from torch import Tensor

from pipeline.adapters.attach import Adapters
from pipeline.adapters.layout import replicate_layout, training_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import LEGAL, Consistency, Site
from pipeline.data.encode import Encoded
from pipeline.data.packing import pack
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedLM
from pipeline.loss.terms import bidirectional_kl
from pipeline.training.batch import lay_out

pattern = pytest.mark.parametrize("pattern", ["column", "element", "span"])


def every_site(pattern: str, rate: float) -> tuple[Site, ...]:
    """All positions; where a position has the pattern, in that pattern."""
    return tuple(
        Site(position=position, pattern=pattern if pattern in patterns else patterns[0], rate=rate)  # type: ignore[arg-type]
        for position, (patterns, _) in LEGAL.items()
    )


def with_every_site(pattern: str, rate: float = 0.6) -> Adapters:
    return adapted_llama(AdapterSpec(rank=4, sites=every_site(pattern, rate)), layers=2)


def per_token(adapters: Adapters, rows: list[Encoded], side: str = "left") -> tuple[Tensor, Tensor]:
    """(2, n) loss of every token after a row's first under two draws, and (n,) KL between the draws."""
    built = lay_out(adapters, rows, replicate_layout(len(rows), 2), 2, MaskKey(1, 3), side=side)  # type: ignore[arg-type]
    objective = SupervisedLM(adapters.model)
    with torch.no_grad(), adapters.axis.active(built.plan):
        read = objective.features(**built.model_tensors)
        losses, log_probs = objective.score(read.values, read.targets)
    halves = log_probs.view(2, -1, log_probs.shape[-1])
    return losses.view(2, -1), bidirectional_kl(*halves)


def changed(row: Encoded, start: int) -> Encoded:
    """Other tokens from `start` on."""
    ids = (*row.input_ids[:start], *((token + 17) % 57 + 3 for token in row.input_ids[start:]))
    return replace(row, input_ids=ids, labels=(-100, *ids[1:]))


def rows_of(lengths: list[int]) -> list[Encoded]:
    return [changed(row, 10**6) for row in examples(lengths)]


@pattern
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_at_a_token_does_not_depend_on_those_after_it(pattern: str, side: str) -> None:
    adapters, rows = with_every_site(pattern), rows_of([10, 6])
    losses, apart = per_token(adapters, rows, side)
    others, others_apart = per_token(adapters, [changed(rows[0], 7), rows[1]], side)
    before = torch.tensor([*[t < 7 for t in range(1, 10)], *[True] * 5])
    assert bool(losses.isfinite().all()) and float((losses[0] - losses[1]).abs().min()) > 0  # the draws differ
    torch.testing.assert_close(others[:, before], losses[:, before], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others_apart[before], apart[before], rtol=1e-4, atol=1e-5)
    assert float((others - losses)[:, ~before].abs().min()) > 1e-3


@pattern
def test_packed_examples_and_padding_do_not_enter_each_others_loss(pattern: str) -> None:
    """The loss of an example in a packed row, whatever its neighbours say; and the same as in a row of its own."""
    adapters, rows = with_every_site(pattern), rows_of([7, 9, 5])
    together, apart = per_token(adapters, [pack(rows)])
    others, others_apart = per_token(adapters, [pack([changed(rows[0], 0), rows[1], changed(rows[2], 0)])])
    own = slice(6, 6 + 8)  # tokens 1 … 8 of the second example
    torch.testing.assert_close(others[:, own], together[:, own], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others_apart[own], apart[own], rtol=1e-4, atol=1e-5)
    assert float((others - together)[:, 0:6].abs().min()) > 1e-3
    alone, alone_apart = per_token(adapters, rows)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(apart, alone_apart, rtol=1e-4, atol=1e-4)


@pattern
@pytest.mark.parametrize("rate", [0.9, 0.999])
@pytest.mark.parametrize("term", [Consistency(kind="kl"), Consistency(kind="js", branches="both")], ids=["kl", "js"])
def test_never_a_nan(pattern: str, rate: float, term: Consistency) -> None:
    """Rates at which nearly every query, row and rank is lost, padded rows: loss and every gradient are finite."""
    adapters, rows = with_every_site(pattern, rate), rows_of([8, 3, 5])
    built = lay_out(adapters, rows, training_layout(range(3), 2, "split", True, term), 2, MaskKey(1, 3))
    with adapters.axis.active(built.plan):
        nll, apart = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)(**built.inputs)
        (nll + apart).backward()
    assert bool(nll.isfinite()) and bool(apart.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(adapters).values())
