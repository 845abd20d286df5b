"""Members at test time, their scores, and what is exported."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_serializer, model_validator

from pipeline.config.data import Columns, TemplateConfig
from pipeline.config.extensions import EXPORT_TARGETS, listed, offered
from pipeline.config.section import Fraction, Name, NonNegative, Positive, Section
from pipeline.errors import ConfigError, SetupError


class EnsembleConfig(Section):
    """Members at test time."""

    size: NonNegative = 8
    """N mask draws of the adapter that are predicted and cached (arXiv 2404.09610, eq. 8)."""
    average: Literal["probability", "logit"] = "probability"
    """Space in which members are averaged; the paper leaves it open."""
    seed: NonNegative = 1000
    """Seed of the test-time masks."""
    stop_when_flat: bool = False
    """Draw in rounds of 4, `size` draws at most, and stop after a round whose gain in validation NLL is within one
    paired standard error. The draws made then predict the other splits. A comparison makes all of its draws."""
    adaptive: Fraction | None = None
    """The draws of the chosen ensemble predict two at a time, until a row's answer is settled: this share of rows, at
    most, may get another answer than from all of them, with 95 % confidence by the calibration rows (0: none, for
    certain). None = every draw predicts every row. Weighted members are not chosen then."""

    @model_validator(mode="after")
    def _check_adaptive(self) -> EnsembleConfig:
        if self.adaptive is not None and self.average != "probability":
            raise ConfigError(
                "ensemble.adaptive", self.adaptive, f"cannot be promised where ensemble.average is {self.average}",
                "Average probabilities, or leave it out.",
            )
        return self


class SelectConfig(Section):
    """By what validation rows choose between settings, adapters and ensemble sizes."""

    by: Literal["nll_scaled", "nll", "accuracy", "matthews", "f1", "pearson", "spearman"] = "nll_scaled"
    """`nll_scaled`: NLL under a temperature that the other half of the rows decided, so that what is merely too sharp
    or too flat, which a temperature mends, is not taken for worse (where rows have no temperature: `nll`). The others:
    NLL as predicted, or the score of that name. The best step within a run, and which trials of a search end early, go
    by NLL always."""


SELECTABLE = {
    "choice": ("nll_scaled", "nll", "accuracy", "matthews", "f1"), "completion": ("nll_scaled", "nll"),
    "regression": ("nll_scaled", "nll", "pearson", "spearman"),
}  # fmt: skip
"""Kind of rows -> what they can be selected by."""


def check_selection(by: str, kind: str, choices: int) -> None:
    """Refuse a score that rows of a kind do not have.

    Args:
        kind: choice, completion or regression.
        choices: the most that a row has.

    Raises:
        ConfigError: names the scores that there are.
    """
    fitting = [one for one in SELECTABLE[kind] if choices == 2 or one not in ("matthews", "f1")]
    if by not in fitting:
        what = f"is no score of {kind} rows" + (f" with {choices} choices" if kind == "choice" else "")
        raise ConfigError("select.by", by, what, f"Set select.by to one of {', '.join(fitting)}.")


class AlsoConfig(Section):
    """Another data set that the members of a run are scored on: another domain, or rows of no known class."""

    path: Name
    """As `data.path`."""
    split: Name = "test"
    """Split of a hub data set, or file name without suffix in a folder; a single file is read whole."""
    rows: Positive | None = None
    """Rows, at most; None = all. Which ones follows from data.seed, and fewer are among more."""
    labels: bool = True
    """false: the rows have no right answer among the choices (out-of-domain rows). A label column is not read, and
    confidence, entropy and detection are all that is scored."""
    template: TemplateConfig | None = None
    """As `data.template`, which is taken where this is not given."""
    columns: Columns | None = None
    """As `data.columns`."""

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, values: object) -> object:
        """A path alone is all that most sets need."""
        return {"path": values} if isinstance(values, str) else values


SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
"""Names a file, a table and an entry of result.json."""
ALSO = "also_"
"""Before a set's name: the split that its predictions are kept under."""


class GenerateConfig(Section):
    """Texts that base, adapter and ensemble write for test rows; the report scores them against the references."""

    rows: Positive | None = 100
    """Prompts, at most: the first different ones of the test rows, which stand in a random order. None = all."""
    max_tokens: Positive = 64
    """Longest text, in tokens."""
    beams: Positive = 1
    """Texts that beam search follows at a time; 1 is greedy. E2E in the papers: 10, length_penalty 0.9 (or 0.8),
    no_repeat_ngram 4."""
    length_penalty: float = 1.0
    """A finished text of n tokens is worth its log-probability / n ** length_penalty, as in transformers."""
    no_repeat_ngram: NonNegative = 0
    """No n-gram of so many tokens twice in a text (it may repeat its prompt); 0: any."""


def check_generation(settings: GenerateConfig | None, kind: str) -> None:
    """Refuse texts for rows of a kind that are not answered by one, and scores whose packages are missing.

    Args:
        kind: choice, completion or regression.

    Raises:
        ConfigError: other rows; SetupError: no sacrebleu, or no torchmetrics.
    """
    if settings is None:
        return
    if kind != "completion":
        raise ConfigError(
            "evaluate.generate", None, f"writes texts, and {kind} rows are not answered by one", "Set it to null."
        )
    for package in ("sacrebleu", "torchmetrics"):
        if importlib.util.find_spec(package) is None:
            raise SetupError(
                "evaluate.generate", None, f"is scored by the package {package}, which is not installed",
                'Run `pip install "loradrop[eval]"` in the environment of this command, or set it to null.',
            )


class EvaluateConfig(Section):
    """Predictions and scores."""

    batch_tokens: Positive = 4096
    """Tokens (rows × members × padded length) in one forward pass, at most. Where there are passes enough, a half and a
    quarter are tried at the start too, and the fastest is kept."""
    ece_bins: Positive = 15
    """Equal-mass bins of the debiased calibration error; the plug-in one has 15 of equal width, as the literature."""
    bootstrap_samples: Positive = 2000
    """Resamples behind each 95 % interval."""
    also: dict[SetName, AlsoConfig] = {}
    """More data sets that are predicted and scored, under the temperature of this run's calibration rows: name -> path,
    or {path, split, rows, labels, template, columns}. Each is scored beside the test split, and told apart from it by
    how unsure members are. May be given after the training: only what is missing is predicted."""
    generate: GenerateConfig | None = None
    """Texts for rows that are answered by one (completions, chats), beside the likelihood of their references: `{}`, or
    for example evaluate.generate.rows=200. None = none are written: a text takes a pass per token."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """A key that came later is left out where it says nothing: older runs keep their identity."""
        return {name: value for name, value in dump(self).items() if value or name not in ("also", "generate")}


Form = Literal["adapter", "draws", "merged", "merged_dequantized", "gguf", "vllm", "sglang"]


class ExportConfig(Section):
    """What is deployed."""

    forms: tuple[Form | str, ...] = ("adapter", "draws")
    """`adapter`: the mean-field adapter; `draws`: one PEFT folder per mask draw. `merged`: the adapter merged into the
    base's own 16-bit weights (scores and temperature are measured again on them); `merged_dequantized`: into the 4-bit
    weights that it was trained on, dequantized. Both are whole models for stock transformers. `gguf`: the adapter for
    llama.cpp, and of the embedded model the merged one, too. `vllm`, `sglang`: folders as these engines take them, with
    the command that serves them. Also the names of forms that installed packages add (docs/python.md)."""
    draws: NonNegative | None = None
    """Mask draws to export; None = as many as validation chose (none where it chose the mean-field adapter)."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: object) -> object:
        """Names from before version 0.2 are told the new ones."""
        if not isinstance(values, dict):
            return values
        forms = values.get("forms")
        if "members" in values:
            raise ConfigError("export.members", values["members"], "is now called export.draws", "Rename the key.")
        if isinstance(forms, list | tuple) and "members" in forms:
            raise ConfigError("export.forms", forms, "the form members is now called draws", "Rename the form.")
        return values

    @model_validator(mode="after")
    def _check_forms(self) -> ExportConfig:
        known = get_args(Form)
        for form in self.forms:
            if form not in known and form not in offered(EXPORT_TARGETS):
                said = f"there is no form {form!r}; the forms are {', '.join(known)}; {listed(EXPORT_TARGETS)}"
                raise ValueError(said)
        return self
