"""Classes out of a column: their words, in an order that does not depend on the rows' order."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pipeline.config import TemplateConfig
from pipeline.data.formats.record import Unusable
from pipeline.data.shapes.table import Table
from pipeline.errors import DataError

MOST_CLASSES = 200
NAMES = (
    "label_text", "label", "labels", "category", "intent", "class", "sentiment", "gold_label", "is_duplicate", "topic",
    "emotion", "coarse_label", "target",
)
"""Columns that hold a class."""


def label_column(table: Table) -> str | None:
    """The column with the classes: what the template says, else the first of `NAMES`.

    Raises:
        DataError: rows with several labels each.
    """
    own = table.own.label
    if own is not None:
        return own.strip("{} ") if own.strip("{} ") in table.columns else None
    found = table.find(*NAMES)
    if found is not None and any(isinstance(value, list | tuple) for value in table.seen(found)):
        raise DataError(
            table.key, table.name, f"has several labels per row (its column {found} holds lists), and a row has one"
            " right class here", "Give a row per class: {text, label: yes or no}.",
        )
    return found


def is_score(table: Table, column: str) -> bool:
    """Whether a column holds numbers to be predicted rather than classes: some are not whole."""
    return any(_fraction(value) for value in table.seen(column))


def class_parts(table: Table, column: str) -> tuple[dict[str, Any], str]:
    """(choices and label of a template, what to say of them) for the classes of a column.

    Words are sorted, numbers by size; a leading blank is added. Numbers 0, 1, … are indices, of which only
    `data.template.choices` knows the names.

    Raises:
        DataError: one value alone, or more than `MOST_CLASSES`.
    """
    label = table.own.label or column
    if table.own.choices is not None:
        return {"choices": table.own.choices, "label": label}, ""
    if names := table.classes.get(column):
        return {"choices": tuple(f" {name}" for name in names), "label": label}, f"{len(names)} classes"
    number_column = table.find("label") if column.casefold() == "label_text" else None
    seen = _distinct(table, column, number_column)
    if len(seen) < 2:
        only = f"one value ({next(iter(seen))!r})" if seen else "no value"
        raise DataError(
            table.key, table.name, f"has {only} in the column {column}, which would be its classes",
            "Give rows of two classes or more, or say with data.template what is to be learnt.",
        )
    words = [word for word, _ in sorted(seen.items(), key=lambda item: _order(*item))]
    numbers = all(_whole(value) for value in seen.values())
    if numbers and number_column is None:
        contiguous = words == [str(i) for i in range(len(words))]
        as_text = label if contiguous or table.own.label else f"{{{column}}}"
        note = (f"{len(words)} classes, whose words are the numbers {_listed(words)}: name them with"
                " data.template.choices=[…]")
        return {"choices": tuple(f" {word}" for word in words), "label": as_text}, note
    return {"choices": tuple(f" {word}" for word in words), "label": label}, f"{len(words)} classes"


def prompt_end(column: str, choices: Iterable[str]) -> str:
    """What stands between a text and its class: `Category:` on a line of its own."""
    title = column.removesuffix("_text").replace("_", " ").strip().capitalize() or "Label"
    return f"\n{title}:" if all(choice.startswith((" ", "\n")) for choice in choices) else f"\n{title}:\n"


def _distinct(table: Table, column: str, number_column: str | None) -> dict[str, Any]:
    """Word -> what it is sorted by: its value, or the number that stands beside it."""
    found: dict[str, Any] = {}
    beside = table.all_values(number_column) if number_column is not None else None
    for value in table.all_values(column):
        number = next(iter(beside), None) if beside is not None else None
        if value is None or isinstance(value, Unusable | list | tuple | dict) or _is_nan(value):
            continue  # a fault of its row, which the reader names
        word = str(value).strip()
        if word:
            found.setdefault(word, value if number is None else number)
        if len(found) > MOST_CLASSES:
            raise DataError(
                table.key, table.name, f"has more than {MOST_CLASSES} different values in the column {column}: too"
                " many for classes", f'Is that text to be generated? data.template=\'{{completion: "{{{column}}}"}}\'.'
                " Classes can be given with data.template.choices.",
            )
    return found


def _order(word: str, value: Any) -> tuple[int, float, str, str]:
    number = _whole(value)
    return (0, float(value), "", word) if number else (1, 0.0, word.casefold(), word)


def _whole(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, str):
        text = value.strip().removeprefix("-")
        return text.isdecimal() and text.isascii() and len(text) < 16
    return isinstance(value, int | float) and abs(value) < 1e15 and float(value).is_integer()


def _fraction(value: Any) -> bool:
    if isinstance(value, bool | int):
        return False
    try:
        return isinstance(value, float | str) and not float(value).is_integer()
    except (ValueError, OverflowError):
        return False


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _listed(words: list[str]) -> str:
    return ", ".join(word[:40] for word in words[:6]) + (", …" if len(words) > 6 else "")


def has_classes(template: TemplateConfig) -> bool:
    """Whether a template says what the classes are, or where they stand."""
    return template.choices is not None or template.label is not None
