"""Members at test time, their scores, and what is exported."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.config.section import NonNegative, Positive, Section


class EnsembleConfig(Section):
    """Members at test time."""

    size: NonNegative = 8
    """N mask draws of the adapter that are predicted and cached (arXiv 2404.09610, eq. 8)."""
    average: Literal["probability", "logit"] = "probability"
    """Space in which members are averaged; the paper leaves it open."""
    seed: NonNegative = 1000
    """Seed of the test-time masks."""


class EvaluateConfig(Section):
    """Predictions and scores."""

    batch_tokens: Positive = 4096
    """Tokens (rows × members × padded length) in one forward pass."""
    ece_bins: Positive = 15
    """Equal-mass bins of the expected calibration error."""
    bootstrap_samples: Positive = 2000
    """Resamples behind each 95 % interval."""


class ExportConfig(Section):
    """What is deployed."""

    forms: tuple[Literal["adapter", "members"], ...] = ("adapter", "members")
    """`adapter`: the mean-field adapter; `members`: one PEFT folder per mask draw."""
    members: NonNegative | None = None
    """Mask draws to export; None = the ensemble size chosen on validation."""

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("forms"), list):
            values = {**values, "forms": tuple(values["forms"])}
        return values
