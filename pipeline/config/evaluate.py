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

    forms: tuple[Literal["adapter", "draws"], ...] = ("adapter", "draws")
    """`adapter`: the mean-field adapter; `draws`: one PEFT folder per mask draw."""
    draws: NonNegative | None = None
    """Mask draws to export; None = the ensemble size chosen on validation."""

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
