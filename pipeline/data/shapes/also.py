"""Data sets that a run is scored on beside its own splits (`evaluate.also`): other domains, rows of no known class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import DataConfig, TemplateConfig
from pipeline.config.evaluate import ALSO, AlsoConfig
from pipeline.data.encode_classifier import refuse_for_causal
from pipeline.data.formats.record import Record
from pipeline.data.read import READERS, SUFFIXES
from pipeline.data.rows import Row
from pipeline.data.shapes.reading import as_read
from pipeline.data.sources import EMBEDDED, SPLITS, Source, check_name, is_local, open_records, parse
from pipeline.data.splits import Splits, sample
from pipeline.errors import DataError, ErrorList, joined

DEFAULT_LABEL = "label"
_UNKNOWN = "Where they have none among the choices, give the set labels: false."


@dataclass(frozen=True)
class AlsoRows:
    """The rows of one of these sets."""

    rows: list[Row]
    """In the order in which they are predicted; without labels, the first choice stands for the right one."""
    fingerprint: str
    """SHA-256 over their ids and texts."""
    labels: bool
    """Whether their right answers are known."""
    shown: int = 0
    """Rows left out because one of the run's own splits asks the same."""


def load_also(also: Mapping[str, AlsoConfig], data: DataConfig, splits: Splits) -> dict[str, AlsoRows]:
    """The split that each set's predictions are kept under -> its rows; no question of the run's own is among them.

    Raises:
        DataError: faults of a set; rows that are answered in another way than those of the run.
    """
    if not also:
        return {}
    own = [row for split in SPLITS for row in getattr(splits, split)]
    asked, found = {row.question for row in own}, {}
    for name, one in also.items():
        every = _read(name, one, data, own)
        new = [row for row in every if row.question not in asked]
        if not new:
            raise DataError(
                f"evaluate.also.{name}", one.path, "holds no row whose question this run does not have in a split",
                "Give rows that it was not made from, or leave the set out.",
            )
        rows, fingerprint = sample(new, one.rows, data.seed)
        found[f"{ALSO}{name}"] = AlsoRows(rows, fingerprint, one.labels, len(every) - len(new))
    return found


def check_also(
    also: Mapping[str, AlsoConfig], data: DataConfig, own: Sequence[Row], classifier: bool | None
) -> dict[str, AlsoConfig]:
    """The sets with the templates that local ones are read by; of others the names alone are checked.

    Args:
        own: rows of the run, as far as they lie here.
        classifier: as `pipeline.data.check.look_at` takes it.

    Raises:
        DataError: as `load_also`.
    """
    checked = {}
    for name, one in also.items():
        source = _source(name, one, data)
        check_name(one.path, source.field)
        if is_local(one.path):
            if one.labels and source.template is None:
                one = one.model_copy(update={"template": as_read(source, data, bool(classifier)).template})
            rows = _read(name, one, data, own)
            if classifier and own and (other := next((row for row in rows if row.choices != own[0].choices), None)):
                raise DataError(
                    source.field, one.path, f"has other choices (row {other.id}: {list(other.choices)[:6]}) than those"
                    " that the model has an output for each of", "Leave such rows out, or the set.",
                )
            if classifier is False:
                refuse_for_causal(rows)
        checked[name] = one
    return checked


def _source(name: str, one: AlsoConfig, data: DataConfig) -> Source:
    """Rows are read as the run's own are, but for what the set says of itself; embedded rows are what they are."""
    of_run = data.template if data.evaluation is None else data.evaluation.template
    template = None if one.path.startswith(EMBEDDED) else one.template or of_run
    return Source(one.path, template, {"train": one.split}, f"evaluate.also.{name}.path", one.columns)


def _read(name: str, one: AlsoConfig, data: DataConfig, own: Sequence[Row]) -> list[Row]:
    """All rows of a set."""
    source = _source(name, one, data)
    folder = Path(one.path).expanduser() if is_local(one.path) else None
    if folder and folder.is_dir() and not any((folder / f"{one.split}{end}").is_file() for end in SUFFIXES):
        what = f"is no file of {one.path} (with one of {', '.join(READERS)})"
        raise DataError(f"evaluate.also.{name}.split", one.split, what, "Name one that is.")
    whole = data.model_copy(update={"streaming": False})
    if one.labels:
        source = as_read(source, whole)
    records: Iterable[Record] = open_records(source)["train"]
    if not one.labels:
        records = _answered(records, source.template or TemplateConfig(), own)
    try:
        rows = parse(records, source.template, one.path)[0]
    except (DataError, ErrorList) as error:
        label = ((source.template or TemplateConfig()).label or DEFAULT_LABEL).strip("{}")
        if f": {label}" not in str(error):
            raise
        hint = DataError(f"evaluate.also.{name}.labels", True, "wants the right answer of every row", _UNKNOWN)
        raise joined([*getattr(error, "errors", [error]), hint]) from error
    kind, known = rows[0].kind, {row.kind for row in own[:1]}
    generated = {"chat", "completion"}
    if known and kind not in known and not {kind, *known} <= generated:
        what = f"holds {kind} rows, and the run has {known.pop()} rows"
        raise DataError(source.field, one.path, what, "Give it a template that makes them so, or leave it out.")
    if not one.labels and kind != "choice":
        what = f"wants rows with choices, not {kind} rows"
        raise DataError(f"evaluate.also.{name}.labels", False, what, "Leave it out, or the set.")
    return rows


def _answered(records: Iterable[Record], template: TemplateConfig, own: Sequence[Row]) -> Iterator[Record]:
    """Records with an answer in place of theirs, and with the choices of the run's rows where they bring none."""
    label = template.label or DEFAULT_LABEL
    shared = {row.choices for row in own}
    choices = list(shared.pop()) if len(shared) == 1 else []
    for where, values in records:
        if not isinstance(values, DataError):
            given = {**values, label: 0}
            if choices and template.choices is None and values.get("choices") in (None, ""):
                given["choices"] = choices
            values = given
        yield where, values
