"""Choices that stand in the row, as ARC, MMLU and their like nest them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.data.shapes.turns import from_json
from pipeline.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def texts_and_names(value: Any, field: str) -> tuple[list[str], list[str]]:
    """(texts of the choices, the names that an answer key calls them by) of a list of texts, of {text, label} or of
    [{text, label}, ...]. Choices without names are called A, B, C, …

    Raises:
        DataError: anything else.
    """
    value = from_json(value, field)
    if isinstance(value, Mapping):
        texts, names = value.get("text"), value.get("label", value.get("labels"))
    elif isinstance(value, list | tuple) and value and all(isinstance(one, Mapping) for one in value):
        texts, names = [one.get("text") for one in value], [one.get("label") for one in value]
    else:
        texts, names = value, None
    if not isinstance(texts, list | tuple) or not all(_is_scalar(text) for text in texts):
        raise DataError(field, value, "must be a list of texts, or {text: [...], label: [...]}", "Flatten the column.")
    if not isinstance(names, list | tuple) or len(names) != len(texts) or not all(map(_is_scalar, names)):
        names = LETTERS[: len(texts)]
    return [str(text) for text in texts], [str(name) for name in names]


def find_named(value: Any, names: list[str]) -> int | None:
    """Index of the choice that an answer key names; None where it is no name but, perhaps, an index or a text."""
    return names.index(value.strip()) if isinstance(value, str) and value.strip() in names else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
