"""Templates in Jinja: sandboxed, and what is undefined is an error that names the columns there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipeline.data.formats.record import Unusable
from pipeline.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

MARKS = ("{{", "{%")
"""A text that holds one of them is Jinja."""
_WAY_OUT = "Fill in the value, leave the row out, or write {% if column %}…{% endif %} around it."


class UnknownName(Exception):
    """A name in a template that no column has; its text says which."""


def check_syntax(text: str, field: str) -> None:
    """Refuse a text that Jinja cannot read. Raises `DataError` naming `field`."""
    try:
        _compiled(text)
    except Exception as error:  # Jinja's TemplateError, and what Python's compiler says of the code that Jinja writes
        what = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(
            field, text[:200], f"is not valid Jinja ({what})", "Mend it; {column} in single braces is the short form."
        ) from error


def render(text: str, values: Mapping[str, Any], field: str) -> str:
    """`text` with the columns `values` put in.

    Raises:
        UnknownName: a name that is no column.
        DataError: a value that is no text or number, or what Jinja or its sandbox refuses; names `field`.
    """
    from jinja2 import UndefinedError

    try:
        return _compiled(text).render(values)
    except UndefinedError as error:
        raise UnknownName(str(error)) from error
    except _NoText as error:
        raise DataError(field, error.value, f"{error.what}, in the template {text[:60]!r}", _WAY_OUT) from error
    except Exception as error:  # the sandbox's SecurityError, and whatever filters raise on values of another type
        raise DataError(field, text[:200], f"cannot be filled in ({error})", "Mend the template or the row.") from error


class _NoText(Exception):
    def __init__(self, value: object, what: str) -> None:
        self.value, self.what = value, what
        super().__init__(what)


def _shown(value: Any) -> Any:
    """What `{{ … }}` writes; a missing value is refused where Jinja would write None."""
    if isinstance(value, str) or value is True or value is False:
        return value
    if isinstance(value, Unusable):
        raise _NoText(None, f"holds {value.what}")
    if value is None:
        raise _NoText(None, "has a column without a value")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    from jinja2 import Undefined

    if isinstance(value, Undefined):
        return value  # whose text is the error
    raise _NoText(value, "holds what is neither a text nor a number")


@lru_cache(maxsize=256)
def _compiled(text: str) -> Template:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Bounded(ImmutableSandboxedEnvironment):
        """Without the operators that make something huge of something small: 9 ** 9 ** 9, "x" * 10 ** 9."""

        intercepted_binops = frozenset(("**", "*", "%"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if isinstance(left, int) and isinstance(right, int) and operator != "**":
                return super().call_binop(context, operator, left, right)
            raise SecurityError(f"{operator} is for whole numbers, and ** for none")

    environment = Bounded(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_shown)
    return environment.from_string(text)
