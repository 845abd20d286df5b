"""Rows: where they come from, how columns become rows, and who owns which of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from pipeline.config.section import Name, NonNegative, Positive, Section

EMBEDDED_DATA = "embedded:movie-reviews"
EMBEDDED_SETS = (EMBEDDED_DATA, "embedded:amazon-reviews", "embedded:news-editorials", "embedded:tweets")
"""The sentences of one study, of four domains."""


class TemplateConfig(Section):
    """Maps columns to rows. `{column}` in the texts is replaced by the column's value; a text with `{{` or `{%` is a
    Jinja template (sandboxed, undefined names are errors)."""

    prompt: str | None = None
    """Text before the answer."""
    second: str | None = None
    """Second text of a pair (premise and hypothesis): encoders read it behind the separator, as its own segment."""
    choices: tuple[str, ...] | str | None = None
    """Answer texts, in label order (a leading space is part of the text). Where every row has its own: one text such as
    " {choices}", which names the column that holds them (a list, or {text, label} as in ARC). " {choices.label}"
    answers with their letters, of which "{choices.listed}" in the prompt writes a line each, `A. text`."""
    label: str | None = None
    """Column with the index, or with the text, of the right choice; "{column}" takes its numbers for texts."""
    score: str | None = None
    """Column with the number to be predicted (regression): for models with a head."""
    completion: str | None = None
    """Answer text for rows that are generated rather than chosen."""


Split = Literal["train", "validation", "calibration", "test"]

Columns = Annotated[tuple[Name, ...], Field(min_length=1)]
"""Names of the columns of a .csv or .tsv file that has no header line, from left to right."""


class SourceConfig(Section):
    """One of several sources that are trained on together."""

    path: Name
    """As `data.path`."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """How often an epoch has each training row of the source: 2.5 = all rows twice and half of them once more."""
    template: TemplateConfig | None = None
    """As `data.template`, whose place it takes."""
    columns: Columns | None = None
    """As `data.columns`."""


class EvaluationDataConfig(Section):
    """Another source for validation, calibration and test: what is trained on one task may be tested on another."""

    path: Name
    """As `data.path`."""
    splits: dict[Split, str]
    """Which split of the source is our validation, calibration and test; all three are named."""
    template: TemplateConfig | None = None
    """As `data.template`."""
    columns: Columns | None = None
    """As `data.columns`."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return _without(dump(self), "columns")

    @model_validator(mode="after")
    def _check_splits(self) -> EvaluationDataConfig:
        if set(self.splits) != {"validation", "calibration", "test"}:
            raise ValueError("data.evaluation.splits must name validation, calibration and test, and no train")
        return self


class DataConfig(Section):
    """Rows and how they are divided among their owners."""

    path: Name = EMBEDDED_DATA
    """A local .jsonl/.json/.csv/.tsv/.parquet file, several (`parts/*.jsonl`), a folder with
    train/validation/calibration/test files, a hub data set, a file behind a protocol (hf://, https://), or embedded:
    movie-reviews (the default), amazon-reviews, news-editorials, tweets."""
    sources: tuple[SourceConfig, ...] = ()
    """Several sources in place of `path`: [{path, weight, template, columns}, ...]. Rows of all are pooled, then
    divided; weights count in the training split."""
    columns: Columns | None = None
    """Names of the columns of a .csv or .tsv file without a header line, such as [source, label, mark, sentence]."""
    train_path: Name | None = None
    """A file whose rows {prompt, choices, label, …} are trained on in place of those of the train split, such as
    `distill` writes with a probability per choice. The other splits stay what they are without it."""
    template: TemplateConfig | None = None
    """How columns become rows. Needed only where the columns' names do not say it: docs/data.md lists what is read
    without one. What is left out here is filled in by what the columns say."""
    splits: dict[Split, str] | None = None
    """Our split -> the split of the hub data set (or file name without suffix, of a folder) that it is taken from, such
    as {train: train, test: validation} where the published test split has no labels. What is not named is drawn from
    train. None: splits are named as ours are."""
    evaluation: EvaluationDataConfig | None = None
    """Where validation, calibration and test come from, if not from `path`."""
    train_rows: Positive | None = None
    """Rows of the train split; None = what the other splits leave."""
    validation_rows: Positive | None = None
    """Rows for early stopping, search and selection; None = all of a split of its own, else a tenth of the rows that it
    is drawn from, at most 200."""
    calibration_rows: Positive | None = None
    """Rows on which the temperature is fitted; None = as for validation_rows."""
    test_rows: Positive | None = None
    """Rows of the final report; None = all of a split of its own, else a fifth of the rows that it is drawn from, at
    most 400."""
    max_tokens: Positive = 512
    """Longest row in tokens; a longer prompt is cut from its beginning, the answer never."""
    choice_score: Literal["sum", "per_token", "per_character"] = "sum"
    """What a choice is scored by: the log-probability of its text given the prompt, as it is (`sum`; accuracy is acc of
    lm-evaluation-harness), or divided by its number of tokens (`per_token`) or of characters without the blanks around
    them (`per_character`; its acc_norm). Probabilities, temperature and ensembles are made of these scores. Training
    raises the log-probability of the right choice's tokens under every rule; the best step is chosen by the rule."""
    cache: bool = True
    """Keep the tokens of the training rows for the next start, memory-mapped, in tokens/ of the cache folder."""
    streaming: bool = False
    """Read the training rows again in every epoch instead of holding them in memory, in blocks of `shuffle_rows`.
    Splits without a file of their own are then drawn from the first rows. `train_rows` ends an epoch early."""
    shuffle_rows: Positive = 10_000
    """Rows of a streamed block, which is held in memory and shuffled; larger: closer to a full shuffle."""
    seed: NonNegative = 0
    """Seed of the split."""

    @model_validator(mode="before")
    @classmethod
    def _name_sources(cls, values: object) -> object:
        """`path` says what `sources` are, for tables and reports."""
        if not isinstance(values, dict) or not isinstance(values.get("sources"), list | tuple):
            return values
        paths = [one.get("path") if isinstance(one, dict) else getattr(one, "path", None) for one in values["sources"]]
        joined = " + ".join(map(str, paths))
        if paths and values.get("path", EMBEDDED_DATA) not in (EMBEDDED_DATA, joined):
            raise ValueError("data.path and data.sources both say where rows come from; keep one of them")
        return {**values, "path": joined} if paths else values

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Keys that came later are left out where they say nothing: older runs keep their identity."""
        return _without(dump(self), "sources", "columns", "train_path")

    @model_validator(mode="after")
    def _check_splits(self) -> DataConfig:
        if self.train_path is not None and self.streaming:
            raise ValueError("data.streaming reads data.path; leave data.train_path out, or set data.streaming=false")
        if self.splits is not None and "train" not in self.splits:
            raise ValueError("data.splits must name train: what is not named is drawn from it")
        if self.sources and self.streaming:
            raise ValueError("data.streaming reads one source; keep data.path, or set data.streaming=false")
        if self.sources and self.columns is not None:
            raise ValueError("data.columns belongs to data.path; give each of data.sources its own")
        return self


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value or name not in names}
