"""Members at test time, their scores, and what is exported."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.config.section import NonNegative, Positive, Section
from pipeline.errors import ConfigError


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


class EvaluateConfig(Section):
    """Predictions and scores."""

    batch_tokens: Positive = 4096
    """Tokens (rows × members × padded length) in one forward pass, at most. Where there are passes enough, a half and a
    quarter are tried at the start too, and the fastest is kept."""
    ece_bins: Positive = 15
    """Equal-mass bins of the debiased calibration error; the plug-in one has 15 of equal width, as the literature."""
    bootstrap_samples: Positive = 2000
    """Resamples behind each 95 % interval."""


class ExportConfig(Section):
    """What is deployed."""

    forms: tuple[
        Literal["adapter", "draws", "merged", "merged_dequantized", "gguf", "vllm", "sglang"], ...
    ] = ("adapter", "draws")
    """`adapter`: the mean-field adapter; `draws`: one PEFT folder per mask draw. `merged`: the adapter merged into the
    base's own 16-bit weights (scores and temperature are measured again on them); `merged_dequantized`: into the 4-bit
    weights that it was trained on, dequantized. Both are whole models for stock transformers. `gguf`: the adapter for
    llama.cpp, and of the embedded model the merged one, too. `vllm`, `sglang`: folders as these engines take them, with
    the command that serves them."""
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
