"""POST /v1/classify: rows as clients give them, and what they are told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from pipeline.config import TemplateConfig
from pipeline.data.rows import Row
from pipeline.ensemble.rows import RowForm, checked
from pipeline.errors import DataError
from pipeline.serving.openai import Body

_COLUMN = re.compile(r"\{\{?\s*(\w+)\s*\}?\}")
"""`{text}`, and Jinja's `{{ text }}`."""


class ClassifyBody(Body):
    """Rows by their columns, as `predict` reads them; or texts, where one column is all that a row needs."""

    rows: dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    text: str | Annotated[list[str], Field(min_length=1)] | None = None
    members: bool = False
    """Whether each member's own probabilities are told, too."""

    def records(self, column: str | None) -> list[dict[str, Any]]:
        """The rows.

        Args:
            column: that of a text.

        Raises:
            DataError: neither rows nor texts, or both; texts where a row needs several columns.
        """
        if (self.rows is None) == (self.text is None):
            raise DataError("rows", None, "are given in one way: as rows, or as text", 'Send {"text": "…"}.')
        if self.rows is not None:
            return [self.rows] if isinstance(self.rows, dict) else self.rows
        if column is None:
            what = "stands for a row that needs one column; these need several, or others"
            raise DataError("text", None, what, 'Send {"rows": [{column: value, …}]}.')
        return [{column: text} for text in ([self.text] if isinstance(self.text, str) else self.text or [])]


def text_column(form: RowForm) -> str | None:
    """The one column that a row of this form needs; None where there are several."""
    template = form.template or TemplateConfig()
    if template.second is not None or not (form.choices or template.choices or form.kind == "regression"):
        return None
    found = ["prompt"] if template.prompt is None else sorted(set(_COLUMN.findall(template.prompt)))
    return found[0] if len(found) == 1 else None


def read_rows(form: RowForm, records: Sequence[dict[str, Any]]) -> list[Row]:
    """Rows with the ids that they have in a data file. Raises `DataError` naming the faults."""
    return list(checked(form.read((f"row {n}", record) for n, record in enumerate(records, start=1)), "rows"))
