"""Rows for a model with a head: one text or a pair of texts; the answer is the index of a class, or a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.config import DataConfig
from pipeline.data.encode import IGNORE_INDEX, Encoded, weigh
from pipeline.data.rows import Row
from pipeline.data.tokens import framed_ids
from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def output_count(rows: Sequence[Row]) -> int:
    """Outputs that the head needs: the number of classes, or 1 for rows whose answer is a number.

    Raises:
        DataError: as `shared_choices`, or scores among classes.
    """
    regression = [row for row in rows if row.kind == "regression"]
    if not regression:
        return len(shared_choices(rows))
    if len(regression) < len(rows):
        other = next(row for row in rows if row.kind != "regression")
        raise DataError(
            f"{other.named}", other.kind, f"stands beside rows with a score (such as {regression[0].named})",
            "Give every row a score, or every row choices.",
        )
    return 1


def refuse_for_causal(rows: Iterable[Row]) -> None:
    """Refuse what only a model with a head can read. Raises `DataError`."""
    for row in rows:
        if row.kind == "regression":
            raise DataError(
                f"{row.named}: score", row.score, "is a number, and a causal language model answers in words",
                "Use an encoder, set model.kind=classifier, or map the numbers to choices.",
            )
        if row.second is not None:
            raise DataError(
                f"{row.named}: second", row.second, "is the second text of a pair, which a causal model cannot tell"
                " from the first", "Write both into one text with data.template.prompt, or use an encoder.",
            )


def refuse_choice_score(data: DataConfig) -> None:
    """Refuse a rule for the scores of texts where choices are outputs of a head. Raises `ConfigError`."""
    if data.choice_score != "sum":
        raise ConfigError(
            "data.choice_score", data.choice_score, "weighs the texts of choices, and a model with a head reads none of"
            " them: it has an output per choice", "Set data.choice_score=sum.",
        )


def shared_choices(rows: Iterable[Row]) -> tuple[str, ...]:
    """The choices that all rows have in common, in label order: the classes.

    Raises:
        DataError: a row of another kind, or rows with different choices: a classifier has one set of classes.
    """
    first: Row | None = None
    for row in rows:
        if row.kind != "choice":
            raise DataError(
                f"{row.named}", row.kind, "cannot be answered by a classifier, which chooses among fixed classes",
                "Give rows {prompt, choices, label}, or a causal language model as model.path.",
            )
        first = first or row
        if row.choices != first.choices:
            raise DataError(
                f"{row.named}: choices", list(row.choices), f"differ from {list(first.choices)} of {first.named}: a"
                " classifier has one set of classes",
                "Give every row the same choices in the same order, or use a causal language model as model.path.",
            )
    if first is None:
        raise DataError("data.path", None, "has no rows", "Give rows {prompt, choices, label}.")
    return first.choices


def encode_text(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """The row's text, or pair of texts, between the tokenizer's own special tokens (CLS, SEP), without supervision.

    A longer text loses its beginning. Of a pair that is too long the longer text loses its end, token by token (the
    tokenizer's `longest_first`, which the GLUE scripts use). The special tokens stay.

    Raises:
        DataError: a text without tokens, or `max_tokens` too small for one token of it.
    """
    if row.second is not None:
        return _encode_pair(row, row.second, tokenizer, max_tokens)
    lead, body, tail = framed_ids(tokenizer, row.prompt)
    if not body:
        raise DataError(f"{row.named}", row.prompt, "has no tokens in the model's vocabulary", "Leave the row out.")
    room = max_tokens - len(lead) - len(tail)
    if room < 1:
        least = len(lead) + len(tail) + 1
        remedy = f"Set data.max_tokens={least} or more."
        raise DataError("data.max_tokens", max_tokens, "leaves no room for a text", remedy)
    ids = (*lead, *body[-room:], *tail)
    return Encoded(row.id, ids, (IGNORE_INDEX,) * len(ids))


def encode_classification(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """`encode_text` with its class: `labels[0]` is the index of the right choice, so that `supervised` is 1. Of a row
    with `label_probabilities` it is every class, weighed by them: the loss is cross-entropy with that distribution.

    Raises:
        DataError: as `encode_text`, or a row without a label.
    """
    text = encode_text(row, tokenizer, max_tokens)
    if row.label is None:
        raise DataError(f"{row.named}: label", None, "is missing", "Give the index of the right choice.")
    if row.label_probabilities:
        classes = [replace(text, labels=(number, *text.labels[1:])) for number in range(len(row.choices))]
        return weigh(classes, row.label_probabilities)
    return replace(text, labels=(row.label, *text.labels[1:]))


def encode_regression(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """`encode_text` with its score; `labels[0]` is 0, so that `supervised` is 1.

    Raises:
        DataError: as `encode_text`.
    """
    text = encode_text(row, tokenizer, max_tokens)
    return replace(text, labels=(0, *text.labels[1:]), score=row.score)


def encode_answered(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """The text with the answer that it has: a class or a number. Raises `DataError` as the two functions above."""
    encode = encode_regression if row.kind == "regression" else encode_classification
    return encode(row, tokenizer, max_tokens)


def _encode_pair(row: Row, second: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if max_tokens < least:
        raise DataError("data.max_tokens", max_tokens, "leaves no room for a pair of texts", f"Set {least} or more.")
    found = tokenizer(row.prompt, second, truncation="longest_first", max_length=max_tokens)
    ids = tuple(found["input_ids"])
    for name, text in (("prompt", row.prompt), ("second", second)):
        if not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise DataError(f"{row.named}: {name}", text, "has no tokens in the model's vocabulary", "Leave it out.")
    types = found.get("token_type_ids")
    return Encoded(row.id, ids, (IGNORE_INDEX,) * len(ids), None if types is None else tuple(types))
