"""What pydantic complains of, in our words: the key, the value, what it must be, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pipeline.config.names.hints import way_out
from pipeline.errors import ConfigError, UserError, joined

MOST_ERRORS = 10
"""Faults shown at once."""
_UNION_TAG = re.compile(r"str|int|float|Method|\[key\]|(tuple|union|literal|nullable|function-\w+)\[.*\]")


def in_our_words(model: type[BaseModel], complaint: ValidationError) -> UserError:
    """The faults of a `model` (an `ErrorList` where there are several)."""
    faults = complaint.errors(include_url=False, include_context=False)
    errors: list[UserError] = _merge_union_errors([_to_error(model, item) for item in faults[:MOST_ERRORS]])
    if len(faults) > MOST_ERRORS:
        errors.append(ConfigError("configuration", None, f"has {len(faults)} faults; these are the first"))
    return joined(errors)


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration model."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for section in _models_in(field.annotation):
            if section.__name__.endswith("Config"):
                yield from keys_of(section, f"{key}.")


def _to_error(model: type[BaseModel], item: Mapping[str, Any]) -> ConfigError:
    location = [str(part) for part in item["loc"] if not _is_union_tag(part)]
    key = ".".join(location)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        return ConfigError(key, value, "is not a known key", way_out(key, list(keys_of(model))))
    if item["type"] == "model_type" and key in model.model_fields:
        return ConfigError(key, value, "is a section of keys, not a key with a value", f"See loradrop keys {key}.")
    message = str(item["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list, such as [a, b]")
    shown = value if not isinstance(value, dict | BaseModel) else None
    return ConfigError(key or "configuration", shown, message[:1].lower() + message[1:], _meaning(model, location))


def _meaning(model: type[BaseModel], location: Sequence[str]) -> str:
    """What the key at `location` means, from its docstring: the way out of a wrong value."""
    description: str | None = None
    for name in location:
        if name not in model.model_fields:
            return ""
        field = model.model_fields[name]
        description = field.description
        model = next(_models_in(field.annotation), model)
    return f"Its meaning: {' '.join(description.split())}" if description else ""


def _is_union_tag(part: object) -> bool:
    """pydantic names the union branch it tried; that is no part of the user's key."""
    return isinstance(part, str) and _UNION_TAG.fullmatch(part) is not None


def _merge_union_errors(errors: list[ConfigError]) -> list[UserError]:
    """One error per key: a union reports each branch it tried; the last is the most specific."""
    by_key: dict[str, ConfigError] = {}
    for error in errors:
        by_key.setdefault(error.field, error)
    return list(by_key.values())


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
