"""Which token sequences are run to score the answers of rows, and what of them is shared.

Rows: one row's answers share its prompt. A split: all of its rows share what they begin with (a template, few-shot
examples). The last token of an answer is scored, not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from pipeline.data.encode import IGNORE_INDEX, Encoded

WORTH_SHARING = 32
"""A share of the tokens that is smaller than 1 in so many is not worth a pass of its own."""


@dataclass(frozen=True)
class Scored:
    """One sequence and the tokens scored in it: log p(target) given everything up to `position`."""

    row: int
    input_ids: tuple[int, ...]
    positions: tuple[int, ...]
    """Rising."""
    targets: tuple[int, ...]
    choices: tuple[int, ...]
    """Which answer of the row each target belongs to."""
    example: str
    tails: tuple[Scored, ...] = ()
    """Sequences that continue this one: what answers have to themselves. Positions count from their own first token."""

    @property
    def tokens(self) -> int:
        """To be computed: its own and those of its tails."""
        return len(self.input_ids) + sum(len(tail.input_ids) for tail in self.tails)


def plan_sequences(candidates: Sequence[Sequence[Encoded]], tails: bool = False) -> list[Scored]:
    """Sequences to run for rows of candidate answers; answers whose inputs are the same share a sequence.

    Args:
        tails: whether answers may share what their inputs begin with, and continue it; they do where that is worth it.
    """
    whole = [sequence for row, answers in enumerate(candidates) for sequence in _whole(row, answers)]
    if not tails:
        return whole
    shared = [_shared(row, answers) for row, answers in enumerate(candidates)]
    before, after = (sum(sequence.tokens for sequence in sequences) for sequences in (whole, shared))
    worth = (before - after) * WORTH_SHARING > before and all(sequence.input_ids for sequence in shared)
    return shared if worth else whole


def common_beginning(sequences: Sequence[Scored]) -> tuple[tuple[int, ...], list[Scored]]:
    """(token ids that all sequences begin with, the sequences without them); none where that is not worth it.

    Every sequence keeps all places where something is scored, one token at least.
    """
    first = tuple(commonprefix([sequence.input_ids for sequence in sequences]))
    count = min(len(first), *(min(sequence.positions, default=len(sequence.input_ids) - 1) for sequence in sequences))
    saved, tokens = count * (len(sequences) - 1), sum(sequence.tokens for sequence in sequences)
    if saved * WORTH_SHARING <= tokens:
        return (), list(sequences)
    return first[:count], [
        replace(one, input_ids=one.input_ids[count:], positions=tuple(p - count for p in one.positions))
        for one in sequences
    ]


def _whole(row: int, answers: Sequence[Encoded]) -> list[Scored]:
    """One sequence per distinct input."""
    inputs: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for choice, answer in enumerate(answers):
        places = _places(choice, answer)
        inputs.setdefault(_inputs(answer, places), []).extend(places)
    return [_scored(row, ids, places, answers[0].example) for ids, places in inputs.items()]


def _shared(row: int, answers: Sequence[Encoded]) -> Scored:
    """One sequence that all answers continue."""
    places = [_places(choice, answer) for choice, answer in enumerate(answers)]
    inputs = [_inputs(answer, of_answer) for answer, of_answer in zip(answers, places, strict=True)]
    root = tuple(commonprefix(inputs))
    cut, example = len(root), answers[0].example
    tails: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for ids, of_answer in zip(inputs, places, strict=True):
        if len(ids) > cut:
            own = [(position - cut, target, choice) for position, target, choice in of_answer if position >= cut]
            tails.setdefault(ids[cut:], []).extend(own)
    own = [one for of_answer in places for one in of_answer if one[0] < cut]
    continued = tuple(_scored(row, ids, of_tail, example) for ids, of_tail in tails.items())
    return replace(_scored(row, root, own, example), tails=continued)


def _places(choice: int, answer: Encoded) -> list[tuple[int, int, int]]:
    """(position, target, choice) of every supervised token."""
    return [(t - 1, label, choice) for t, label in enumerate(answer.labels) if label != IGNORE_INDEX and t > 0]


def _inputs(answer: Encoded, places: Sequence[tuple[int, int, int]]) -> tuple[int, ...]:
    return answer.input_ids[: places[-1][0] + 1] if places else answer.input_ids


def _scored(row: int, ids: tuple[int, ...], places: Sequence[tuple[int, int, int]], example: str) -> Scored:
    positions, targets, choices = zip(*sorted(places), strict=True) if places else ((), (), ())
    return Scored(row, ids, positions, targets, choices, example)
