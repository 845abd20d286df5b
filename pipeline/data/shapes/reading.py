"""The configured sources with a template for each: the user's, completed by what the columns say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.formats.record import Record
from pipeline.data.shapes.detect import detect
from pipeline.data.shapes.table import Shape, Table
from pipeline.data.sources import EMBEDDED, Source, head_rows, open_records, sources_of
from pipeline.data.template import check_template
from pipeline.errors import DataError, one_line

SEEN = 50
"""First records that a shape is recognised by."""


def read_sources(config: DataConfig, classifier: bool = False) -> list[Source]:
    """`sources_of`, and for each what it is read as; a template that says all that is needed is left alone.

    Args:
        classifier: a model with a head will read them: pairs of texts stay pairs.

    Raises:
        DataError: nothing under that name, or rows of a form that cannot be trained on.
    """
    return [as_read(source, config, classifier) for source in sources_of(config)]


def as_read(source: Source, config: DataConfig, classifier: bool = False) -> Source:
    """One source with the template and the name of its shape."""
    check_template(source.template)
    if source.path.startswith(EMBEDDED):
        return replace(source, shape=Shape("choices"))
    if source.template is not None and _says_all(source.template):
        return replace(source, shape=Shape("what data.template says"))
    limit = head_rows(config) if config.streaming else None

    def records() -> Iterator[Mapping[str, Any]]:
        """All that classes are taken from; a fault ends them, the reader names it."""
        with suppress(DataError):
            yield from (values for _, values in islice(_main_split(source, config), limit) if isinstance(values, dict))

    head = list(islice(records(), SEEN))
    if not head:
        return source
    own = source.template or TemplateConfig()
    classes = getattr(_main_split(source, config), "classes", {})
    table = Table(head, _column_of(records), source.field, source.path, classifier, classes, own)
    shape = detect(table)
    if shape is None or shape.template is None:
        return replace(source, shape=shape)
    template = completed(own, shape.template)
    check_template(template)
    return replace(source, template=template, shape=replace(shape, template=template))


def with_templates(config: DataConfig, sources: Sequence[Source]) -> DataConfig:
    """`config` with the templates that its sources are read by."""
    by_field = {source.field: source.template for source in sources}
    changes: dict[str, Any] = {"template": by_field.get("data.path", config.template)}
    if config.sources:
        found = [by_field[f"data.sources.{place}.path"] for place in range(len(config.sources))]
        changes["sources"] = tuple(
            one.model_copy(update={"template": template})
            for one, template in zip(config.sources, found, strict=True)
        )
        if all(template == found[0] for template in found):
            changes["template"] = found[0]  # what new rows are read by
    if config.evaluation is not None:
        changes["evaluation"] = config.evaluation.model_copy(update={"template": by_field["data.evaluation.path"]})
    return config.model_copy(update=changes)


def said_of(source: Source, rows: int | None = None) -> str:
    """For people: what a source is read as, on one line."""
    shape = source.shape or Shape("unknown")
    count = "" if rows is None else f", {rows:,} rows"
    notes = f"; {shape.note}" if shape.note else ""
    parts = ", ".join(f"{name}: {_shown(value)}" for name, value in shape.template or () if value is not None)
    template = f"; template {{{parts}}}" if parts else ""
    return one_line(f"{source.path}: read as: {shape.name}{count}{template}{notes}")


def _shown(value: str | Sequence[str]) -> str:
    texts = [json.dumps(text, ensure_ascii=False) for text in ([value] if isinstance(value, str) else value)]
    return texts[0] if isinstance(value, str) else f"[{', '.join(texts[:6])}{', …' if len(texts) > 6 else ''}]"


def completed(own: TemplateConfig, found: TemplateConfig) -> TemplateConfig:
    """What the user wrote, and from `found` what it leaves open and does not contradict."""
    given = {name: value for name, value in own if value is not None}
    kinds = ({"choices", "label"}, {"completion"}, {"score"})
    answers = next((kind for kind in kinds if kind & given.keys()), set().union(*kinds))
    taken = {name: value for name, value in found if value is not None and name in answers | {"prompt", "second"}}
    if "prompt" in given:
        taken.pop("second", None)
    return TemplateConfig(**{**taken, **given})


def _says_all(template: TemplateConfig) -> bool:
    """Prompt and answer are both given: nothing is left to be found."""
    classes = template.choices is not None and template.label is not None
    return template.prompt is not None and (template.completion is not None or template.score is not None or classes)


def _main_split(source: Source, config: DataConfig) -> Iterable[Record]:
    """Records of the split that is trained on, or of the first there is."""
    found = open_records(source, config.streaming)
    return found["train"] if "train" in found else next(iter(found.values()))


def _column_of(records: Callable[[], Iterator[Mapping[str, Any]]]) -> Callable[[str], Iterable[Any]]:
    return lambda column: (record.get(column) for record in records())
