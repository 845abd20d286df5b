"""Rows: where they come from, how columns become rows, and who owns which of them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.config.section import Name, NonNegative, Positive, Section

EMBEDDED_DATA = "embedded:movie-reviews"


class TemplateConfig(Section):
    """Maps columns to rows. `{column}` in the texts is replaced by the column's value."""

    prompt: str | None = None
    """Text before the answer."""
    second: str | None = None
    """Second text of a pair (premise and hypothesis): encoders read it behind the separator, as its own segment."""
    choices: tuple[str, ...] | None = None
    """Answer texts, in label order (a leading space is part of the text)."""
    label: str | None = None
    """Column with the index, or with the text, of the right choice."""
    score: str | None = None
    """Column with the number to be predicted (regression): for models with a head."""
    completion: str | None = None
    """Answer text for rows that are generated rather than chosen."""


Split = Literal["train", "validation", "calibration", "test"]


class EvaluationDataConfig(Section):
    """Another source for validation, calibration and test: what is trained on one task may be tested on another."""

    path: Name
    """As `data.path`."""
    splits: dict[Split, str]
    """Which split of the source is our validation, calibration and test; all three are named."""
    template: TemplateConfig | None = None
    """As `data.template`."""

    @model_validator(mode="after")
    def _check_splits(self) -> EvaluationDataConfig:
        if set(self.splits) != {"validation", "calibration", "test"}:
            raise ValueError("data.evaluation.splits must name validation, calibration and test, and no train")
        return self


class DataConfig(Section):
    """Rows and how they are divided among their owners."""

    path: Name = EMBEDDED_DATA
    """A local .jsonl/.json/.csv/.tsv/.parquet file, a folder with train/validation/calibration/test files,
    a hub data set, or the embedded default."""
    template: TemplateConfig | None = None
    """Needed only where rows are not {prompt, choices, label}, {prompt, score}, {prompt, completion} or {messages}."""
    splits: dict[Split, str] | None = None
    """Our split -> the split of the hub data set (or file name without suffix, of a folder) that it is taken from, such
    as {train: train, test: validation} where the published test split has no labels. What is not named is drawn from
    train. None: splits are named as ours are."""
    evaluation: EvaluationDataConfig | None = None
    """Where validation, calibration and test come from, if not from `path`."""
    train_rows: Positive | None = None
    """Rows of the train split; None = what the other splits leave."""
    validation_rows: Positive | None = 200
    """Rows for early stopping, search and selection; None = all of a split of its own."""
    calibration_rows: Positive | None = 200
    """Rows on which the temperature is fitted; None = all of a split of its own."""
    test_rows: Positive | None = 400
    """Rows of the final report; None = all of a split of its own."""
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

    @model_validator(mode="after")
    def _check_splits(self) -> DataConfig:
        if self.splits is not None and "train" not in self.splits:
            raise ValueError("data.splits must name train: what is not named is drawn from it")
        return self
