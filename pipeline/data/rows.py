"""One example, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline.data.formats.record import Unusable
from pipeline.errors import DataError

LONGEST_ID = 1000
"""Characters: ids stand in every predictions file, each as wide as the longest."""


@dataclass(frozen=True)
class Row:
    """An example of one of four kinds.

    choice: `prompt`, `choices`, `label`. regression: `prompt`, `score`. completion: `prompt`, `completion`.
    chat: `messages`.
    """

    id: str
    """Unique in its file: the `id` column, else a hash of the content."""
    prompt: str = ""
    """Text before the answer; empty for chat."""
    choices: tuple[str, ...] = ()
    """Answer texts in label order; empty for generation."""
    label: int | None = None
    """Index of the right choice."""
    completion: str | None = None
    """Answer text of a completion row."""
    messages: tuple[dict[str, Any], ...] = ()
    """`{"role", "content"}` of a chat, and an assistant's `tool_calls`; the last role is assistant."""
    references: tuple[str, ...] = ()
    """Other acceptable answers, for generation."""
    second: str | None = None
    """Second text of a pair, for encoders; None where there is one text."""
    score: float | None = None
    """Number to be predicted of a regression row."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that the assistant of a chat may call, as JSON schemas."""
    unit: str | None = None
    """What the row is one of several observations of (a document, a subject), for intervals: rows that share it are not
    independent. None: its question."""
    label_counts: tuple[float, ...] = ()
    """How many of the people asked chose each choice; empty where nobody counted. No model reads it."""
    label_probabilities: tuple[float, ...] = ()
    """How probable each choice is, together 1: what training learns in place of `label`; empty where `label` is all."""
    where: str = field(default="", compare=False)
    """File and line that it was read from, for people; empty where it was not read."""

    @property
    def named(self) -> str:
        """How errors call it: `row ID (FILE:LINE)`."""
        return f"row {self.id} ({self.where})" if self.where else f"row {self.id}"

    @property
    def kind(self) -> Literal["choice", "regression", "completion", "chat"]:
        """How the row is answered."""
        if self.messages:
            return "chat"
        if self.score is not None:
            return "regression"
        return "choice" if self.choices else "completion"

    @property
    def question(self) -> str:
        """What is asked, without the answer: rows that share it never sit in two splits.

        For a chat it is what precedes the first assistant turn, so that rows which continue the same
        conversation stay together.
        """
        if not self.messages:
            return self.prompt if self.second is None else _canonical([self.prompt, self.second])
        first = next(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return _canonical(self.messages[:first])

    @property
    def content(self) -> str:
        """Canonical JSON of all that a model may read: everything but the id, the unit, the counts of labels and the
        place."""
        later = {name for name in ("tools", "label_probabilities") if not getattr(self, name)}  # without: ids stay
        left_out = {"id", "unit", "label_counts", "where"} | later
        return _canonical({name: value for name, value in vars(self).items() if name not in left_out})


class IdRegister:
    """Names the rows of one file: a given id as it is, else 16 hex digits of the content's SHA-256.

    The second row with the same content gets `-1`, the third `-2`, so ids do not depend on the order of
    rows that differ.
    """

    def __init__(self) -> None:
        self._first_use: dict[str, str] = {}
        self._copies: Counter[str] = Counter()

    def name(self, row: Row, given: Any, where: str, unit: Any = None) -> Row:
        """`row` with its id (and unit), and where it was read.

        Raises:
            DataError: `given` names an earlier row of the file, or cannot be a name.
        """
        identity = _given_id(given, f"{where}: id") or self._content_id(row)
        if identity in self._first_use:
            raise DataError(
                f"{where}: id", identity, f"is the id of {self._first_use[identity]} too",
                "Make the ids unique, or leave the column out.",
            )
        self._first_use[identity] = where
        return replace(row, id=identity, unit=_given_id(unit, f"{where}: unit") or None, where=where)

    def _content_id(self, row: Row) -> str:
        digest = hashlib.sha256(row.content.encode()).hexdigest()[:16]
        self._copies[digest] += 1
        return digest if self._copies[digest] == 1 else f"{digest}-{self._copies[digest] - 1}"


def whole_text(text: str, field: str) -> str:
    """`text` itself. Raises `DataError` where it holds half a character, which no file and no tokenizer takes."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.start + 20]
            raise DataError(
                field, around, f"holds half a character at place {error.start + 1}, as a cut emoji leaves it",
                "Mend the text, or leave the row out.",
            ) from error
    return text


def _given_id(given: Any, field: str) -> str:
    """The text of a given id; empty where there is none."""
    if given is None:
        return ""
    if not isinstance(given, str):
        if isinstance(given, Unusable):
            raise given.fault(field)
        endless = isinstance(given, float) and not math.isfinite(given)
        if endless or isinstance(given, Mapping | list | tuple | bytes | bool):
            raise DataError(field, given, "must be a text or a whole number", "Mend it, or leave the column out.")
        given = str(given)
    text = whole_text(given, field)
    if len(text) > LONGEST_ID or "\0" in text:
        raise DataError(
            field, text, f"must be a name of at most {LONGEST_ID} characters, without NUL",
            "Shorten it, or leave the column out: rows are then named by their content.",
        )
    return text if text.strip() else ""


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
