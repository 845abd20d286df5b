"""New rows, read as the run reads its own: the same columns and template, but nobody knows their answers yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pipeline.config import RunConfig, TemplateConfig
from pipeline.data.formats.record import Record
from pipeline.data.rows import IdRegister, Row
from pipeline.data.sources import MOST_ERRORS
from pipeline.data.splits import Splits
from pipeline.data.template import ColumnError, to_row
from pipeline.errors import DataError, UserError, joined
from pipeline.model.kind import model_kind


@dataclass(frozen=True)
class RowForm:
    """What rows must look like to be answered by a run."""

    kind: str
    """choice or regression; completion or chat where rows have nothing that could be predicted for others."""
    template: TemplateConfig | None
    choices: tuple[str, ...] | None
    """Those that all rows of the run have, in their order; None where each row has its own."""
    fixed: bool
    """Whether rows may have no other choices: the model has an output for each."""

    @classmethod
    def of_run(cls, config: RunConfig, splits: Splits) -> RowForm:
        """That of the rows that a run evaluates."""
        data, rows = config.data, [*splits.validation, *splits.calibration, *splits.test]
        template = data.template if data.evaluation is None else data.evaluation.template
        shared = {row.choices for row in rows}
        choices = shared.pop() or None if len(shared) == 1 else None
        return cls(rows[0].kind, template, choices, model_kind(config.model) == "classifier")

    def example(self) -> Row:
        """A row of this form."""
        if self.kind == "regression":
            return Row("example", "text", score=0.0)
        return Row("example", "text", self.choices or ("yes", "no"), 0)

    def read(self, records: Iterable[Record]) -> Iterator[Row | DataError]:
        """Rows with the ids that they have in a data file; what is wrong with one comes in its place."""
        ids = IdRegister()
        for where, values in records:
            try:
                if isinstance(values, DataError):
                    raise values
                yield ids.name(self._row(values, where), values.get("id"), where, values.get("unit"))
            except DataError as error:
                yield error

    def _row(self, given: Mapping[str, Any], where: str) -> Row:
        """A row whose answer may be missing: an answer that is there is kept, and changes nothing but its id."""
        template = self.template or TemplateConfig()
        answer = (template.score or "score") if self.kind == "regression" else (template.label or "label")
        known = given.get(answer) not in (None, "")
        values = {**given, answer: given[answer] if known else 0}
        if self.kind == "choice" and self.choices and template.choices is None and values.get("choices") in (None, ""):
            values["choices"] = list(self.choices)
        try:
            row = to_row(values, self.template, where)
        except ColumnError as error:
            raise error.among(given) from None
        if row.kind != self.kind:
            raise DataError(where, None, f"is a {row.kind} row; the run answers {self.kind} rows", "Leave it out.")
        if self.fixed and self.choices is not None and row.choices != self.choices:
            what = f"differ from {list(self.choices)}, of which the model has an output each"
            raise DataError(f"{where}: choices", list(row.choices), what, "Leave the column out, or the row.")
        return row if known or self.kind == "regression" else replace(row, label=None)


def checked(rows: Iterable[Row | DataError], name: str) -> Iterator[Row]:
    """Rows without faults.

    Raises:
        DataError: the first faults, up to `MOST_ERRORS` (as an `ErrorList` where several), or no row.
    """
    faults: list[UserError] = []
    count = 0
    for row in rows:
        if not isinstance(row, Row):
            faults.append(row)
            if len(faults) == MOST_ERRORS or isinstance(row, ColumnError) and not count:  # of every row, that is
                break
        elif not faults:
            count += 1
            yield row
    if faults:
        raise joined(faults)
    if not count:
        raise DataError(name, None, "holds no rows", "Give at least one.")


def chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    """Up to `size` rows at a time."""
    while chunk := list(islice(rows, size)):
        yield chunk
