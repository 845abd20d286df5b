"""Scores of answers, or of classes, under M members at once, without touching any state of the model.

Logits are computed at the scored positions only; a row whose answers are one token each costs one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.members import MaskKey, Member, replicate_rows
from pipeline.data.collate import collate, example_keys
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.sampler import length_sorted_chunks
from pipeline.distributed import zero
from pipeline.distributed.world import largest
from pipeline.model.classifier import head_outputs
from pipeline.model.head import head_of, hidden_states

HEAD_ROWS = 256
"""Hidden states turned into logits at a time (memory: rows × vocabulary)."""


@dataclass(frozen=True)
class PassSettings:
    """How rows go through the model: what every function here is told after its rows and members."""

    pad_id: int
    """Token id written on padding."""
    budget_tokens: int
    """Rows × members × padded length of one forward."""
    key: MaskKey
    """Of all mask draws."""
    on_chunk: Callable[[int, int], None] | None = None
    """Told (sequences done, sequences in all)."""


@dataclass(frozen=True)
class Scored:
    """One sequence and the tokens scored in it: log p(target) given everything up to `position`."""

    row: int
    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    targets: tuple[int, ...]
    choices: tuple[int, ...]
    """Which answer of the row each target belongs to."""
    example: str


def plan_sequences(candidates: Sequence[Sequence[Encoded]]) -> list[Scored]:
    """Sequences to run for rows of candidate answers; one-token answers to one prompt share a sequence."""
    sequences: list[Scored] = []
    for row, answers in enumerate(candidates):
        if len(answers) > 1 and _share_one_prompt(answers):
            prompt = answers[0].input_ids[:-1]
            targets = tuple(answer.input_ids[-1] for answer in answers)
            last = (len(prompt) - 1,) * len(targets)
            sequences.append(Scored(row, prompt, last, targets, tuple(range(len(targets))), answers[0].example))
            continue
        for choice, answer in enumerate(answers):
            positions = tuple(t - 1 for t, label in enumerate(answer.labels) if label != IGNORE_INDEX and t > 0)
            targets = tuple(answer.labels[t + 1] for t in positions)
            sequences.append(
                Scored(row, answer.input_ids, positions, targets, (choice,) * len(targets), answer.example)
            )
    return sequences


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
    for sequence, log_probs in _score(adapters, plan_sequences(candidates), members, settings):
        for j, choice in enumerate(sequence.choices):
            scores[:, sequence.row, choice] += log_probs[:, j]
    return scores


def predict_completions(
    adapters: Adapters, references: Sequence[Encoded], members: Sequence[Member], settings: PassSettings
) -> tuple[np.ndarray, np.ndarray]:
    """log p of every supervised token of each row's reference: (M, total tokens) and offsets (N+1,)."""
    sequences = plan_sequences([[reference] for reference in references])
    offsets = np.concatenate([[0], np.cumsum([len(s.targets) for s in sequences])]).astype(np.int64)
    flat = np.zeros((len(members), int(offsets[-1])), dtype=np.float32)
    for sequence, log_probs in _score(adapters, sequences, members, settings):
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

    def forward(tensors: dict[str, Tensor]) -> Tensor:
        segments = tensors.get("token_type_ids")
        return head_outputs(adapters.model, tensors["input_ids"], tensors["attention_mask"], segments)

    outputs: dict[int, Tensor] = {}
    for chunk, found_MBC in _passes(adapters, texts, members, settings, forward, "right"):
        on_cpu = found_MBC.float().cpu()
        outputs.update({row: on_cpu[:, b] for b, row in enumerate(chunk)})
    return torch.stack([outputs[row] for row in range(len(texts))], dim=1)


def _score(
    adapters: Adapters, sequences: list[Scored], members: Sequence[Member], settings: PassSettings
) -> Iterator[tuple[Scored, np.ndarray]]:
    """Yield each sequence with its (M, targets) log-probabilities."""

    def hidden(tensors: dict[str, Tensor]) -> Tensor:
        return hidden_states(adapters.model, tensors["input_ids"], tensors["attention_mask"], tensors["position_ids"])

    texts = [Encoded(s.example, s.input_ids, (IGNORE_INDEX,) * len(s.input_ids)) for s in sequences]
    passes = _passes(adapters, texts, members, settings, hidden)
    for chunk, hidden_MBTD in passes:
        chosen = [sequences[i] for i in chunk]
        yield from zip(chosen, _gather(hidden_MBTD, chosen, hidden_MBTD.shape[2], head_of(adapters.model)), strict=True)


def _passes(
    adapters: Adapters,
    texts: Sequence[Encoded],
    members: Sequence[Member],
    settings: PassSettings,
    forward: Callable[[dict[str, Tensor]], Tensor],
    side: Literal["left", "right"] = "left",
) -> Iterator[tuple[list[int], Tensor]]:
    """Run all texts under all members, chunk by chunk: yield (indices of the texts, (M, B, …) outputs).

    Args:
        forward: (M·B, T) tensors -> (M·B, …); called with gradients off, evaluation mode on and the plan active.
        side: where rows are padded.
    """
    was_training = adapters.model.training
    adapters.model.eval()
    try:
        with torch.no_grad():
            masks = adapters.plan(members, 1, settings.key)
            done = 0
            lengths = [len(text.input_ids) for text in texts]
            chunks = length_sorted_chunks(lengths, settings.budget_tokens, len(members))
            for chunk, counts in lockstep(chunks, adapters.model):
                batch = collate([texts[i] for i in chunk], settings.pad_id, side)
                tensors = {name: replicate_rows(t, masks.size) for name, t in batch.tensors(adapters.device).items()}
                plan = replace(masks, rows=len(chunk))
                if adapters.needs_row_keys():
                    examples = example_keys(batch.example_ids).to(adapters.device).repeat(masks.size)
                    plan = with_row_keys(plan, examples, tensors["position_ids"])
                with adapters.axis.active(plan):
                    output = forward(tensors)
                if counts:
                    yield chunk, output.view(masks.size, len(chunk), *output.shape[1:])
                    done += len(chunk)
                if settings.on_chunk is not None:
                    settings.on_chunk(done, len(texts))
    finally:
        adapters.model.train(was_training)


def _gather(
    hidden_MBTD: Tensor, chosen: list[Scored], length: int, head: Callable[[Tensor], Tensor]
) -> list[np.ndarray]:
    """log p(target) at each scored position; positions are left-padded into the batch."""
    where = [
        (b, length - len(s.input_ids) + p, t)
        for b, s in enumerate(chosen)
        for p, t in zip(s.positions, s.targets, strict=True)
    ]
    distinct = sorted({(b, p) for b, p, _ in where})
    slot = {place: i for i, place in enumerate(distinct)}
    device = hidden_MBTD.device
    b_index = torch.tensor([b for b, _ in distinct], device=device)
    p_index = torch.tensor([p for _, p in distinct], device=device)
    target = torch.tensor([t for _, _, t in where], device=device)
    source = torch.tensor([slot[b, p] for b, p, _ in where], device=device)
    members = []
    for hidden_BTD in hidden_MBTD:
        selected = hidden_BTD[b_index, p_index]
        logits_parts = []
        for begin in range(0, len(distinct), HEAD_ROWS):
            log_probs = torch.log_softmax(head(selected[begin : begin + HEAD_ROWS]).float(), dim=-1)
            inside = (source >= begin) & (source < begin + HEAD_ROWS)
            logits_parts.append((inside.nonzero().squeeze(1), log_probs[source[inside] - begin, target[inside]]))
        values = torch.empty(len(where), device=device)
        for index, part in logits_parts:
            values[index] = part
        members.append(values)
    table = torch.stack(members).cpu().numpy()
    ends = np.cumsum([len(s.targets) for s in chosen])
    return np.split(table, ends[:-1], axis=1)


def _share_one_prompt(answers: Sequence[Encoded]) -> bool:
    prompt = answers[0].input_ids[:-1]
    return len(prompt) > 0 and all(
        answer.input_ids[:-1] == prompt
        and sum(label != IGNORE_INDEX for label in answer.labels) == 1
        and answer.labels[-1] != IGNORE_INDEX
        for answer in answers
    )


def lockstep(chunks: Sequence[list[int]], model: nn.Module) -> Iterator[tuple[list[int], bool]]:
    """Each chunk and whether it counts; under ZeRO-3, the last one again until all processes had as many.

    Forward passes of a sharded model are collectives: a process that has fewer chunks keeps the others company.
    """
    # Asked before the first pass: later some processes would ask while others still run theirs.
    most = largest(len(chunks)) if zero.is_sharded(model) else len(chunks)
    yield from ((chunk, True) for chunk in chunks)
    for _ in range(most - len(chunks)):
        yield chunks[-1], False
