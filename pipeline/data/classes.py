"""Rows for a classifier: the text is the prompt alone, the answer is the index of the right choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.rows import Row
from pipeline.data.tokens import framed_ids
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shared_choices(rows: Iterable[Row]) -> tuple[str, ...]:
    """The choices that all rows have in common, in label order: the classes.

    Raises:
        DataError: a completion or chat row, or rows with different choices: a classifier has one set of classes.
    """
    first: Row | None = None
    for row in rows:
        if row.kind != "choice":
            raise DataError(
                f"row {row.id}", row.kind, "cannot be answered by a classifier, which chooses among fixed classes",
                "Give rows {prompt, choices, label}, or a causal language model as model.path.",
            )
        first = first or row
        if row.choices != first.choices:
            raise DataError(
                f"row {row.id}: choices", list(row.choices), f"differ from {list(first.choices)} of row {first.id}: a"
                " classifier has one set of classes",
                "Give every row the same choices in the same order, or use a causal language model as model.path.",
            )
    if first is None:
        raise DataError("data.path", None, "has no rows", "Give rows {prompt, choices, label}.")
    return first.choices


def encode_text(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """The row's prompt between the tokenizer's own special tokens (CLS, SEP), without supervision.

    A longer text loses its beginning; the special tokens stay.

    Raises:
        DataError: a text without tokens, or `max_tokens` too small for one token of it.
    """
    lead, body, tail = framed_ids(tokenizer, row.prompt)
    if not body:
        raise DataError(f"row {row.id}", row.prompt, "has no tokens in the model's vocabulary", "Leave the row out.")
    room = max_tokens - len(lead) - len(tail)
    if room < 1:
        least = len(lead) + len(tail) + 1
        remedy = f"Set data.max_tokens={least} or more."
        raise DataError("data.max_tokens", max_tokens, "leaves no room for a text", remedy)
    ids = (*lead, *body[-room:], *tail)
    return Encoded(row.id, ids, (IGNORE_INDEX,) * len(ids))


def encode_classification(row: Row, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> Encoded:
    """`encode_text` with its class: `labels[0]` is the index of the right choice, so that `supervised` is 1.

    Raises:
        DataError: as `encode_text`, or a row without a label.
    """
    text = encode_text(row, tokenizer, max_tokens)
    if row.label is None:
        raise DataError(f"row {row.id}: label", None, "is missing", "Give the index of the right choice.")
    return Encoded(row.id, text.input_ids, (row.label, *text.labels[1:]))
