"""Scores of answers, or of classes, under M members at once, without touching any state of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import MaskKey, Member, MemberPlan
from pipeline.data.collate import collate
from pipeline.data.encode import Encoded
from pipeline.data.sampler import length_sorted_chunks
from pipeline.distributed import zero
from pipeline.distributed.world import largest
from pipeline.model.classifier import head_outputs
from pipeline.model.head import evaluating
from pipeline.prediction.causal import KEY_COST, Answered, PaddedPass, SharingPass, replicated
from pipeline.prediction.pace import Pace
from pipeline.prediction.sequences import Scored, common_beginning, plan_sequences

T = TypeVar("T")


@dataclass(frozen=True)
class PassSettings:
    """How rows go through the model: what every function here is told after its rows and members."""

    pad_id: int
    """Token id written on padding."""
    budget_tokens: int
    """Rows × members × padded length of one forward, at most."""
    key: MaskKey
    """Of all mask draws."""
    shares_keys: bool = False
    """Whether passes may share keys and values, and pad on the right (see `model.shared_keys: may_share`)."""
    pace: Pace = field(default_factory=Pace, compare=False)
    """What was measured of passes of several sizes."""
    on_chunk: Callable[[int, int], None] | None = None
    """Told (sequences done, sequences in all)."""


def predict_choices(
    adapters: Adapters, candidates: Sequence[Sequence[Encoded]], members: Sequence[Member], settings: PassSettings
) -> np.ndarray:
    """log p(tokens of the choice | prompt, member): (M, N, C) float64, -inf where a row has fewer choices.

    Args:
        candidates: per row its encoded answers.
        members: evaluated in one pass per chunk of rows.
    """
    width = max(len(answers) for answers in candidates)
    scores = np.full((len(members), len(candidates), width), -np.inf)
    for row, answers in enumerate(candidates):
        scores[:, row, : len(answers)] = 0.0
    for sequence, log_probs in _score(adapters, candidates, members, settings):
        for j, choice in enumerate(sequence.choices):
            scores[:, sequence.row, choice] += log_probs[:, j]
    return scores


def predict_completions(
    adapters: Adapters, references: Sequence[Encoded], members: Sequence[Member], settings: PassSettings
) -> tuple[np.ndarray, np.ndarray]:
    """log p of every supervised token of each row's reference: (M, total tokens) and offsets (N+1,)."""
    counts = [reference.supervised for reference in references]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    flat = np.zeros((len(members), int(offsets[-1])), dtype=np.float32)
    for sequence, log_probs in _score(adapters, [[one] for one in references], members, settings):
        flat[:, offsets[sequence.row] : offsets[sequence.row + 1]] = log_probs
    return flat, offsets


def predict_classes(
    adapters: Adapters, texts: Sequence[Encoded], members: Sequence[Member], settings: PassSettings
) -> np.ndarray:
    """log p(class | row, member) of a model with a classification head: (M, N, C). Arguments as `predict_choices`."""
    return torch.log_softmax(_head_outputs(adapters, texts, members, settings), dim=-1).numpy()


def predict_values(
    adapters: Adapters, texts: Sequence[Encoded], members: Sequence[Member], settings: PassSettings
) -> np.ndarray:
    """The one output of the head for every row under every member: (M, N). Arguments as `predict_choices`."""
    return _head_outputs(adapters, texts, members, settings)[..., 0].numpy()


def _head_outputs(
    adapters: Adapters, texts: Sequence[Encoded], members: Sequence[Member], settings: PassSettings
) -> Tensor:
    """(M, N, C) fp32 on the CPU."""

    def prepare(masks: MemberPlan) -> Callable[[list[int]], Tensor]:
        def run(chunk: list[int]) -> Tensor:
            batch = collate([texts[i] for i in chunk], settings.pad_id, "right")
            plan, tensors = replicated(adapters, masks, batch)
            with adapters.axis.active(plan):
                found = head_outputs(
                    adapters.model, tensors["input_ids"], tensors["attention_mask"], tensors.get("token_type_ids")
                )
            return found.float().cpu().view(masks.size, len(chunk), -1)

        return run

    outputs: dict[int, Tensor] = {}
    for chunk, found_MBC in _passes(adapters, [len(text.input_ids) for text in texts], members, settings, prepare):
        outputs.update({row: found_MBC[:, b] for b, row in enumerate(chunk)})
    return torch.stack([outputs[row] for row in range(len(texts))], dim=1)


def _score(
    adapters: Adapters, candidates: Sequence[Sequence[Encoded]], members: Sequence[Member], settings: PassSettings
) -> Iterator[tuple[Scored, np.ndarray]]:
    """Yield each sequence (all of a row's, in any order) with its (M, targets) log-probabilities."""
    by_token = any(masks_tokens(adapters, member) for member in members)
    shares = settings.shares_keys and not by_token and not zero.is_sharded(adapters.model)
    sequences = plan_sequences(candidates, tails=shares)
    beginning, sequences = common_beginning(sequences) if shares else ((), sequences)
    costs = [len(sequence.input_ids) + len(beginning) // KEY_COST for sequence in sequences]

    def prepare(masks: MemberPlan) -> Callable[[list[int]], Answered]:
        run: Callable[[list[Scored]], Answered] = PaddedPass(adapters, masks, settings.pad_id)
        if shares:
            run = SharingPass(adapters, masks, settings.pad_id, settings.budget_tokens, beginning)
        return lambda chunk: run([sequences[i] for i in chunk])

    for _, found in _passes(adapters, costs, members, settings, prepare):
        yield from found


def masks_tokens(adapters: Adapters, member: Member) -> bool:
    """Whether masks of a member depend on the token, and so want whole sequences."""
    if member.adapter is None or member.draw is None:
        return False
    return any(not site.masks_weights for site in adapters.specs[member.adapter].sites if site.rate > 0)


def _passes(
    adapters: Adapters,
    costs: Sequence[int],
    members: Sequence[Member],
    settings: PassSettings,
    prepare: Callable[[MemberPlan], Callable[[list[int]], T]],
) -> Iterator[tuple[list[int], T]]:
    """Run all rows under all members, chunk by chunk: yield (indices of the rows, what is found).

    Args:
        costs: tokens of each row.
        prepare: the plan of the members for one row each -> a chunk's pass; called with gradients off and evaluation
            mode on.
    """
    with evaluating(adapters.model), torch.no_grad():
        run = prepare(adapters.plan(members, 1, settings.key))
        done = 0
        for chunk, counts in _chunks(adapters.model, costs, len(members), settings):
            found = run(chunk)
            if counts:
                yield chunk, found
                done += len(chunk)
            if settings.on_chunk is not None:
                settings.on_chunk(done, len(costs))


def _chunks(
    model: nn.Module, costs: Sequence[int], members: int, settings: PassSettings
) -> Iterator[tuple[list[int], bool]]:
    """Each chunk and whether it counts."""
    if zero.is_sharded(model):  # every process runs as many passes, however fast it is
        yield from lockstep(length_sorted_chunks(costs, settings.budget_tokens, members), model)
    else:
        yield from ((chunk, True) for chunk in settings.pace.chunks(costs, settings.budget_tokens, members))


def lockstep(chunks: Sequence[list[int]], model: nn.Module) -> Iterator[tuple[list[int], bool]]:
    """Each chunk and whether it counts; under ZeRO-3, the last one again until all processes had as many.

    Forward passes of a sharded model are collectives: a process that has fewer chunks keeps the others company.
    """
    # Asked before the first pass: later some processes would ask while others still run theirs.
    most = largest(len(chunks)) if zero.is_sharded(model) else len(chunks)
    yield from ((chunk, True) for chunk in chunks)
    for _ in range(most - len(chunks)):
        yield chunks[-1], False
