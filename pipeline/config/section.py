"""What every configuration section shares."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.config.names.faults import in_our_words

LARGEST = 2**63 - 1
"""What fits everywhere a whole number goes: tensors, generators, JSON readers of other languages."""

Positive = Annotated[int, Field(ge=1, le=LARGEST)]

NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Name = Annotated[str, Field(min_length=1)]
"""Of a file, a folder, a model: an empty one would be the current folder."""


def _check_line(text: str) -> str:
    if any(unicodedata.category(character) == "Cc" for character in text):
        raise ValueError("must be one line without control characters")
    return text


Line = Annotated[str, AfterValidator(_check_line)]
"""Shown in tables and on terminals."""


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass as SectionType
else:

    class SectionType(type(BaseModel)):
        """Who writes `AdapterConfig(rank=0)` in Python reads what the command would say.

        Not in `__init__`, which pydantic would then call for sections within sections and lose where a fault is.
        """

        def __call__(cls, *arguments: Any, **values: Any) -> Any:
            """A section. Raises `ConfigError` (an `ErrorList` where several values are wrong)."""
            try:
                return super().__call__(*arguments, **values)
            except ValidationError as error:
                complaint = error
            raise in_our_words(cls, complaint)


class Section(BaseModel, metaclass=SectionType):
    """A typed, frozen group of settings. Unknown keys, silently converted types, NaN and infinity are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: object) -> object:
        """What is frozen holds tuples; YAML gives lists."""
        return {key: _frozen(value) for key, value in values.items()} if isinstance(values, dict) else values


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_frozen, value))
    return {key: _frozen(part) for key, part in value.items()} if isinstance(value, dict) else value
