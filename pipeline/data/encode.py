"""Rows -> token ids and, position by position, what is supervised.

Supervision is decided by position, never by token id: the pad token is often the end-of-text token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.data.chat import chat_segments
from pipeline.data.formats.faults import SHOWN
from pipeline.data.rows import Row
from pipeline.data.tokens import following_ids, prompt_ids
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens.

    `labels[t]` is the supervision for predicting `input_ids[t]` (from the tokens before t): that token, or
    IGNORE_INDEX. Nothing is shifted. The first position is never supervised: nothing precedes it. (A classifier's
    rows hold their class there instead, see `pipeline.data.encode_classifier`.)
    """

    example: str
    """Row id."""
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    token_types: tuple[int, ...] | None = None
    """Segment of each token, where the tokenizer tells the two texts of a pair apart."""
    score: float | None = None
    """Number to be predicted, of a regression row."""
    weight: float = 1.0
    """In the loss: of an answer that is one of several, its probability."""

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def weighed(self) -> float:
        """Supervised tokens, as far as they count in the loss."""
        return self.weight * self.supervised

    @property
    def answers(self) -> tuple[Encoded, ...]:
        """What is trained on in the row's place: itself alone (see `Answers` for several)."""
        return (self,)

    @property
    def parts(self) -> tuple[Encoded, ...]:
        """The examples that share the row: itself alone (see `pipeline.data.packing` for several)."""
        return (self,)


@dataclass(frozen=True)
class Answers(Encoded):
    """A row of which several answers are learnt, each as its `weight` says, together 1: all are trained on in one step.

    `input_ids` and `labels` are those of its answers, one behind the other.
    """

    told: tuple[Encoded, ...] = ()

    @property
    def weighed(self) -> float:
        """Supervised tokens of an answer, in the mean over answers."""
        return sum(answer.weighed for answer in self.told)

    @property
    def answers(self) -> tuple[Encoded, ...]:
        """Those that are not impossible."""
        return self.told


def weigh(answers: Sequence[Encoded], probabilities: Sequence[float]) -> Encoded:
    """The answers of a row as one example, by how probable each is; what is impossible is left out, and one that is
    certain is an example like any other."""
    told = [replace(one, weight=q) for one, q in zip(answers, probabilities, strict=True) if q > 0.0]
    if len(told) == 1:
        return replace(told[0], weight=1.0)
    ids, labels = (tuple(token for one in told for token in getattr(one, name)) for name in ("input_ids", "labels"))
    types = None if told[0].token_types is None else tuple(kind for one in told for kind in one.token_types or ())
    return Answers(told[0].example, ids, labels, types, told=tuple(told))


class AnswerTooLong(DataError):
    """An answer that data.max_tokens cannot hold; `needed` tokens would."""

    def __init__(self, max_tokens: int, needed: int, who: str) -> None:
        self.needed = needed
        super().__init__(
            "data.max_tokens", max_tokens, f"{who}; an answer is never cut, and at least one prompt token stays",
            f"Set data.max_tokens={needed} or more, or leave such rows out.",
        )


def encode_training(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """The row with its right answer.

    Supervised are: the tokens of the right choice, and the end token behind it where `encode_candidates` closes the
    row's choices; the completion and one end token; every assistant turn of a chat. A longer row loses the beginning of
    its prompt (BOS stays); a choice row is cut for its longest choice, so that training and evaluation see the same
    prompt. Of a row with `label_probabilities` it is every choice, weighed by them (`weigh`).

    Raises:
        DataError: an answer that does not fit, a text without tokens, a chat the template cannot render.
    """
    candidates = encode_candidates(row, tokenizer, max_tokens)
    return weigh(candidates, row.label_probabilities) if row.label_probabilities else candidates[row.label or 0]


def encode_candidates(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Encoded]:
    """One encoding per choice, all with the same prompt tokens; for generation one, the reference.

    Where the tokens of one choice begin another's, the tokenizer's end token (eos) closes every choice of the row:
    without it P(" 1") >= P(" 12") whatever the model, and " 12" could never be the answer. Other rows stay as they
    are: their scores are those of the public harnesses, and one-token answers share a sequence.

    Raises:
        DataError: as `encode_training`.
    """
    if row.kind == "chat":
        return [_encode_chat(row, tokenizer, max_tokens)]
    lead, body = prompt_ids(tokenizer, row.prompt)
    answers = _answers(row, tokenizer)
    for text, tokens in [(row.prompt, lead + body), *zip(row.choices or [row.completion], answers, strict=True)]:
        if not tokens:
            raise DataError(f"{row.named}", text, "has no tokens in the model's vocabulary", "Leave the row out.")
    kept = lead + _tail(body, max_tokens, len(lead), max(map(len, answers)), row)
    return [
        Encoded(row.id, (*kept, *answer), (*[IGNORE_INDEX] * len(kept), *answer)) for answer in answers
    ]


def encode_training_rows(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Encoded]:
    """The whole training split; answers that do not fit are counted, and the first rows named, in one error.

    Raises:
        DataError: as `encode_training`, or no supervised token at all.
    """
    encoded: list[Encoded] = []
    long: list[AnswerTooLong] = []
    names: list[str] = []
    for row in rows:
        try:
            encoded.append(encode_training(row, tokenizer, max_tokens))
        except AnswerTooLong as error:
            long.append(error)
            names.append(row.named)
    if len(long) > 1:
        who = f"{len(long)} of {len(encoded) + len(long)} rows have longer answers: {first_named(names)}"
        raise AnswerTooLong(max_tokens, max(error.needed for error in long), who)
    if long:
        raise long[0]
    supervised_share(encoded)
    return encoded


def first_named(names: Sequence[str]) -> str:
    """The first rows of a list, for errors."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def supervised_share(encoded: Sequence[Encoded]) -> float:
    """Supervised tokens ÷ all tokens, in (0, 1).

    Raises:
        DataError: no token is supervised: there would be nothing to learn.
    """
    supervised = sum(row.supervised for row in encoded)
    if not supervised:
        raise DataError(
            "data.path", None, f"no token of its {len(encoded)} training rows is supervised",
            "Check the answers that data.template makes.",
        )
    return supervised / sum(len(row.input_ids) for row in encoded)


def begins_another(answers: Sequence[Sequence[int]]) -> bool:
    """Whether the tokens of some answer are those that a longer one begins with."""
    ordered = sorted(map(list, answers))  # what begins others comes right before one of them
    return any(0 < len(a) < len(b) and b[: len(a)] == a for a, b in zip(ordered, ordered[1:], strict=False))


def _answers(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each choice, or of the completion with one end token behind it."""
    if row.kind == "choice":
        answers = following_ids(tokenizer, row.choices)
        if not begins_another(answers):
            return answers
        end = _end(tokenizer, f"the choices of {row.named}, of which one begins another, cannot be told apart")
        return [[*answer, end] for answer in answers]
    end = _end(tokenizer, "a model cannot learn where a completion ends")
    (answer,) = following_ids(tokenizer, [row.completion or ""])
    return [answer if answer[-1:] == [end] else [*answer, end]]


def _end(tokenizer: PreTrainedTokenizerBase, otherwise: str) -> int:
    """The eos token; `otherwise` is what comes of it where there is none."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError(
            "model.path", None, f"its tokenizer has no eos token, so {otherwise}",
            "Set eos_token in tokenizer_config.json.",
        )
    return end


def _tail(body: list[int], max_tokens: int, lead: int, answer: int, row: Row) -> list[int]:
    """The end of `body` that fits beside `lead` and `answer` tokens, at least one token of it."""
    room = max_tokens - lead - answer
    needed = lead + answer + 1
    if room < 1:
        raise AnswerTooLong(max_tokens, needed, f"{row.named} has an answer of {answer} tokens")
    return body[-room:]


def _encode_chat(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """The last answer is kept whole; from what precedes it the oldest tokens go, earlier answers among them."""
    segments = chat_segments(row, tokenizer)
    ids = [token for tokens, _ in segments for token in tokens]
    labels = [token if supervised else IGNORE_INDEX for tokens, supervised in segments for token in tokens]
    last = len(segments[-1][0])
    if not last or len(ids) == last:
        raise DataError(f"{row.named}", None, "has no tokens in the model's vocabulary", "Leave the row out.")
    lead = int(ids[0] == tokenizer.bos_token_id)
    context = _tail(ids[lead:-last], max_tokens, lead, last, row)
    keep = len(context) + last
    ids, labels = ids[:lead] + ids[-keep:], [IGNORE_INDEX] * lead + labels[-keep:]
    return Encoded(row.id, tuple(ids), (IGNORE_INDEX, *labels[1:]))
