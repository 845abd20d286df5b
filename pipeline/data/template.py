"""Column values -> `Row`: four shapes need no template, `data.template` maps the others onto them.

    {prompt, choices, label}     label: index from 0, or the text of a choice; optional: label_counts,
                                 label_probabilities
    {prompt, score}              score: the number to be predicted
    {prompt, completion}         references optional
    {messages}                   [{role, content}, ...], the last from the assistant; references and tools optional

Choice and regression rows may be pairs of texts: {prompt, second, ...}. Other forms of a chat (ShareGPT's, TRL's) are
read as messages, see `pipeline.data.shapes.turns`. Which template fits columns of other names is found by
`pipeline.data.shapes.reading`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pipeline.config import TemplateConfig
from pipeline.data.formats.json_text import LONGEST_NUMBER
from pipeline.data.formats.record import Unusable
from pipeline.data.rows import Row, whole_text
from pipeline.data.shapes.choices import find_named, texts_and_names
from pipeline.data.shapes.jinja import MARKS, UnknownName, check_syntax, render
from pipeline.data.shapes.turns import from_json, messages_of, tools_of, with_messages
from pipeline.errors import DataError

SHAPES = "{prompt, choices, label}, {prompt, score}, {prompt, completion} or {messages}"

ROUNDING = 0.01
"""How far probabilities may be from 1 together: what written ones are rounded by."""
LARGEST_SCORE = 1e15
"""A thousand of their squares are far from the end of float32, 3.4e38."""

BY_NAME, LISTED = ".label", ".listed"
"""Behind a column of choices: what they are called (A, B, …) in place of their texts; lines of both, `A. text`."""
_COLUMN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_ENTRY = re.compile(r"(.+)\[([0-9]{1,9})\]")
"""`choices[0]`: an entry of a column that holds lists."""


class ColumnError(DataError):
    """A column that is needed is not there; in a table that holds for every row."""

    def __init__(self, field: str, value: object, what: str, columns: Iterable[str], remedy: str) -> None:
        self.what, self.columns = what, tuple(columns)
        super().__init__(field, value, f"{what}; the columns are {_listed(self.columns)}", remedy)

    def among(self, given: Container[str]) -> ColumnError:
        """The same, without columns that are not `given` and stand for what a row without an answer lacks."""
        columns = [name for name in self.columns if name in given]
        return ColumnError(self.field, self.value, self.what, columns, self.remedy)


def check_template(template: TemplateConfig | None) -> None:
    """Refuse a template that contradicts itself. Raises `DataError`."""
    if template is None:
        return
    for name, given in template:
        for text in (given,) if isinstance(given, str) else given or ():
            whole_text(text, f"data.template.{name}")
            if _may_be_jinja(text) and not _single_braces(text):  # else the columns tell which form it is
                check_syntax(text, f"data.template.{name}")
    if template.completion is not None and (template.choices is not None or template.label is not None):
        raise DataError(
            "data.template", None, "has a completion beside choices or label",
            "Keep choices and label for rows with a right choice, or completion for text to be generated.",
        )
    if template.score is not None and (template.choices, template.label, template.completion) != (None, None, None):
        raise DataError(
            "data.template", None, "has a score beside choices, label or completion",
            "Keep score for a number to be predicted, or the others for answers in words.",
        )
    if template.second is not None and template.completion is not None:
        raise DataError(
            "data.template", None, "has a second text beside a completion",
            "Put both texts in data.template.prompt: pairs are for models with a head.",
        )
    if isinstance(template.choices, str):
        _list_column(template.choices)
    elif template.choices is not None:
        _check_choices(template.choices, "data.template.choices")


def to_row(values: Mapping[str, Any], template: TemplateConfig | None, where: str) -> Row:
    """The row that one record stands for; its id is still empty.

    Args:
        values: column -> value.
        template: parts that it leaves open come from the columns prompt, second, choices, label, score, completion.
        where: file and line, for errors.

    Raises:
        DataError: a missing column, an empty text, a missing or impossible label, broken messages.
    """
    label_column, score_column, columns = "label", "score", values
    if template is None or template == TemplateConfig():
        values = with_messages(values, where)
    else:
        label_column, score_column = template.label or label_column, template.score or score_column
        values = _apply(values, template, where)
    if values.get("messages") is not None:
        messages = messages_of(_get(values, "messages", where), where)
        return Row("", messages=messages, references=_references(values, where), tools=tools_of(values, where))
    if values.get("choices") is not None:
        choices = _choices(_get(values, "choices", where), where)
        shares = _label_probabilities(values, len(choices), where)
        if shares and values.get(label_column) in (None, ""):
            label = shares.index(max(shares))
        else:
            label = _label(values, label_column, choices, where)
        prompt, second = _texts(values, where)
        counts = _label_counts(values, len(choices), where)
        return Row("", prompt, choices, label, second=second, label_counts=counts, label_probabilities=shares)
    if "completion" in values:
        prompt, completion = (_filled(values, name, where) for name in ("prompt", "completion"))
        return Row("", prompt, completion=completion, references=_references(values, where))
    if score_column in values:
        prompt, second = _texts(values, where)
        score = _number(_get(values, score_column, where), f"{where}: {score_column}")
        return Row("", prompt, second=second, score=score)
    raise ColumnError(
        where, None, f"does not have the columns {SHAPES}, nor those of another form that is known", columns,
        "Map them with data.template (docs/data.md), or rename them; a table without a header line needs data.columns.",
    )


def fill(text: str, values: Mapping[str, Any], where: str) -> str:
    """`text` with every `{column}` (or `{column[0]}`, of a list) replaced by its value; `{{`, `}}` stand for braces.

    A text with `{{` or `{%` is Jinja, unless it names a column in single braces as well: the short form came first.

    Raises:
        DataError: no such column (those there are get listed), or a value that is no text or number.
    """
    if _may_be_jinja(text) and not any(name in values for name in _single_braces(text)):
        try:
            return whole_text(render(text, values, where), where)
        except UnknownName as error:
            raise ColumnError(
                where, text[:200], f"names what is no column ({error})", values,
                "Rename it, or write {% if column is defined %}…{% endif %} around what some rows lack.",
            ) from error

    def replacement(match: re.Match[str]) -> str:
        if match.group(1) is None:
            return match.group()[0]
        return _as_text(_value(values, match.group(1), where), f"{where}: {match.group(1)}")

    return _COLUMN.sub(replacement, text) if "{" in text or "}" in text else text


def _may_be_jinja(text: str) -> bool:
    return any(mark in text for mark in MARKS)


@lru_cache(maxsize=256)
def _single_braces(text: str) -> tuple[str, ...]:
    """Columns that the short form would find in `text`, entries of lists by their column."""
    names = [name for match in _COLUMN.finditer(text) if (name := match.group(1)) is not None and name[:1] != "%"]
    return tuple(entry.group(1) if (entry := _ENTRY.fullmatch(name)) else name for name in names)


def _list_column(pattern: str) -> tuple[str, str, str]:
    """(text before, column, text behind) of choices that stand in a column, as ` {choices}`. Raises `DataError`."""
    found = re.fullmatch(r"([^{}]*)\{([^{}]+)\}([^{}]*)", pattern)
    if found is None:
        raise DataError(
            "data.template.choices", pattern, "must be a list of texts, or name one column that holds lists",
            'Write choices: [" yes", " no"], or choices: " {column}".',
        )
    return found.group(1), found.group(2), found.group(3)


def _apply(values: Mapping[str, Any], template: TemplateConfig, where: str) -> dict[str, Any]:
    """The record in one of the four shapes. Columns that the template leaves open must be there."""
    mapped = dict(values)
    if template.prompt is not None:
        mapped["prompt"] = _with_content(template.prompt, values, where)
    if template.second is not None:
        mapped["second"] = _with_content(template.second, values, where)
    if template.score is not None:
        _get(values, template.score, where)
        mapped["choices"] = None
        mapped.pop("completion", None)
    if template.completion is not None:
        mapped["completion"], mapped["choices"] = fill(template.completion, values, where), None
    if isinstance(template.choices, str):
        before, named, behind = _list_column(template.choices)
        column = named if named in values else named.removesuffix(BY_NAME)
        texts, names = texts_and_names(_get(values, column, where), f"{where}: {column}")
        mapped["choices"] = [f"{before}{text}{behind}" for text in (texts if column == named else names)]
        label = find_named(_get(values, template.label or "label", where), names)
        if label is not None:
            mapped[template.label or "label"] = label
    elif template.choices is not None:
        mapped["choices"] = [fill(text, values, where) for text in template.choices]
    if template.label is not None and "{" in template.label:
        if template.label not in values:  # else it stands for the answer of a row that has none yet
            mapped[template.label] = fill(template.label, values, where)
    elif template.choices is not None or template.label is not None:
        _get(values, template.label or "label", where)
    if template != TemplateConfig():
        mapped["messages"] = None
    return mapped


def _with_content(text: str, values: Mapping[str, Any], where: str) -> str:
    """`fill`, where not all columns that `text` names in single braces are blank: that is a row without a question."""
    filled, names = fill(text, values, where), [name for name in _single_braces(text) if name in values]
    if names and all(isinstance(values[name], str) and not values[name].strip() for name in names):
        remedy = "Fill in the text, or leave the row out."
        raise DataError(f"{where}: {' and '.join(names)}", values[names[0]], "is empty", remedy)
    return filled


def _value(values: Mapping[str, Any], name: str, where: str) -> Any:
    """A column's value, or an entry of it."""
    entry = _ENTRY.fullmatch(name)
    if name.endswith(LISTED) and name not in values:
        column = name.removesuffix(LISTED)
        texts, names = texts_and_names(_get(values, column, where), f"{where}: {column}")
        return "\n".join(f"{letter}. {text}" for letter, text in zip(names, texts, strict=True))
    if name in values or entry is None:
        return _get(values, name, where)
    column, index = entry.group(1), int(entry.group(2))
    entries = from_json(_get(values, column, where), f"{where}: {column}")
    if not isinstance(entries, list | tuple) or index >= len(entries):
        raise DataError(f"{where}: {name}", entries, "is no entry of a list", "Count from 0, or leave the row out.")
    return entries[index]


def _get(values: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in values:
        raise ColumnError(
            f"{where}: {column}", None, "is not a column", values,
            "Rename the column, or say in data.template which one is meant (literal braces are written {{ and }}).",
        )
    value = values[column]
    if isinstance(value, Unusable):
        raise value.fault(f"{where}: {column}")
    return value


def _as_text(value: Any, field: str) -> str:
    if isinstance(value, str):
        return whole_text(value, field)
    if isinstance(value, Unusable):
        raise value.fault(field)
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(field, value, "is not a number", "Fill in the value, or leave the row out.")
    if isinstance(value, bool | int | float):
        return str(value)
    if value is None:
        raise DataError(field, None, "has no value", "Fill in the value, or leave the row out.")
    raise DataError(field, value, "must be a text or a number", "Flatten the column first.")


def _filled(values: Mapping[str, Any], column: str, where: str) -> str:
    """A text that is more than blanks."""
    text = _as_text(_get(values, column, where), f"{where}: {column}")
    if not text.strip():
        raise DataError(f"{where}: {column}", text, "is empty", "Fill in the text, or leave the row out.")
    return text


def _texts(values: Mapping[str, Any], where: str) -> tuple[str, str | None]:
    """The prompt, and the second text of a pair."""
    pair = values.get("second") is not None
    return _filled(values, "prompt", where), _filled(values, "second", where) if pair else None


def _number(value: Any, field: str) -> float:
    """A finite number; in a CSV it is written as text."""
    try:
        senseless = value is None or isinstance(value, bool | bytes) or len(str(value)) > LONGEST_NUMBER
        number = math.nan if senseless else float(value)
    except (TypeError, ValueError, RecursionError):
        number = math.nan
    except OverflowError:
        number = math.inf
    if math.isnan(number):
        raise DataError(field, value, "is not a number", "Fill in the score, or leave the row out.")
    if abs(number) > LARGEST_SCORE:
        raise DataError(
            field, value, f"is beyond ±{LARGEST_SCORE:g}: squares of scores are summed in 32-bit floats",
            "Scale the scores, or leave the row out.",
        )
    return number


def _choices(value: Any, where: str) -> tuple[str, ...]:
    field = f"{where}: choices"
    value = from_json(value, field)
    if not isinstance(value, list | tuple):
        raise DataError(field, value, "must be a list of texts", "Give the list, or set data.template.choices.")
    choices = tuple(_as_text(choice, field) for choice in value)
    _check_choices(choices, field)
    return choices


def _check_choices(choices: tuple[str, ...], field: str) -> None:
    shown = list(choices)
    if len(choices) < 2:
        raise DataError(field, shown, f"must hold at least 2 texts, not {len(choices)}", "Add the other answers.")
    if not all(choice.strip() for choice in choices):
        raise DataError(field, shown, "holds an empty text", "Give every choice a text.")
    if len(set(choices)) < len(choices):
        raise DataError(field, shown, "holds the same text twice", "Give every choice a text of its own.")


def _label(values: Mapping[str, Any], column: str, choices: tuple[str, ...], where: str) -> int:
    return find_label_or_refuse(_get(values, column, where), choices, f"{where}: {column.strip('{}')}")


def find_label_or_refuse(value: Any, choices: tuple[str, ...], field: str) -> int:
    """Index of the choice that `value` means. Raises `DataError` naming `field` where it means none."""
    label = find_label(value, choices)
    if label is not None:
        return label
    listed = ", ".join(repr(c[:100]) for c in choices[:6]) + (", …" if len(choices) > 6 else "")
    remedy = f"Give the index of one of {listed} (from 0), or its text."
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(field, None, "is missing: the row has no label", remedy)
    if isinstance(value, float) and math.isnan(value):
        raise DataError(field, value, "is not a number", remedy)
    raise DataError(field, value, f"must be 0 to {len(choices) - 1} or the text of a choice", remedy)


def find_label(value: Any, choices: tuple[str, ...]) -> int | None:
    """Index of the choice that `value` means; None where it means none.

    A number is an index. A text is compared with the choices after strip, then without case, and only
    then read as an index: in a CSV, where everything is text, "3" means the choice " 3" if there is one.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if value in range(len(choices)) else None
    if not isinstance(value, str) and (value is None or isinstance(value, Mapping | list | tuple | bytes)):
        return None
    text = str(value).strip()
    for same in (str.strip, lambda choice: choice.strip().casefold()):
        hits = [i for i, choice in enumerate(choices) if same(choice) == same(text)]
        if len(hits) == 1:
            return hits[0]
    return int(text) if text.isdecimal() and len(text) < 19 and int(text) < len(choices) else None


def _label_counts(values: Mapping[str, Any], choices: int, where: str) -> tuple[float, ...]:
    """How many people chose each choice; shares will do. Empty where the row does not say."""
    what = "not all 0: how many people chose each choice"
    return _number_per_choice(values, "label_counts", choices, where, what)


def _label_probabilities(values: Mapping[str, Any], choices: int, where: str) -> tuple[float, ...]:
    """How probable each choice is, scaled to 1 exactly. Empty where the row does not say."""
    what = f"together 1 (but for {ROUNDING:g}): how probable each choice is"
    found = _number_per_choice(values, "label_probabilities", choices, where, what, ROUNDING)
    return tuple(one / math.fsum(found) for one in found)


def _number_per_choice(
    values: Mapping[str, Any], column: str, choices: int, where: str, what: str, apart: float = math.inf
) -> tuple[float, ...]:
    """A number from 0 of each choice; empty where the row does not say.

    Args:
        what: they are, for errors.
        apart: how far their sum may be from 1; it is never 0.
    """
    given = values.get(column)
    if given is None or given == "":
        return ()
    field = f"{where}: {column}"
    value = from_json(_get(values, column, where), field)
    found = tuple(_number(one, field) for one in value) if isinstance(value, list | tuple) else ()
    if len(found) != choices or min(found) < 0.0 or sum(found) == 0.0 or abs(sum(found) - 1.0) > apart:
        raise DataError(
            field, value, f"must be {choices} numbers from 0, {what}",
            "Give a number per choice, or leave it out (rename the column where it means something else).",
        )
    return found


def _references(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if values.get("references") is None:
        return ()
    field = f"{where}: references"
    value = from_json(_get(values, "references", where), field)
    if value == "":
        return ()
    return tuple(_as_text(text, field) for text in (value if isinstance(value, list | tuple) else [value]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") or "none"
