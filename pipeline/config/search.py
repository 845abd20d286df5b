"""What a search tries, and what a comparison of methods varies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.section import NonNegative, Positive, Section


class NamedMethod(Section):
    """A method under a name of its own."""

    name: Annotated[str, Field(min_length=1)]
    """In tables, and in the names of its trainings' folders."""
    adapter: dict[str, Any]
    """Keys of the section `adapter`, such as {method: lora_dropout, rates: {lora_B: 0.0}}."""


class CompareConfig(Section):
    """Several methods, each at several settings, on the same base, data and budget."""

    methods: Annotated[tuple[str | NamedMethod, ...], Field(min_length=1)] = (
        "none", "input_dropout", "lora_dropout", "hiddenkey_minus", "hiddenkey", "lora_dropout+hiddenkey",
    )  # fmt: skip
    """Presets (and sums of them) by name with their own rates, or {name, adapter}. `none` is plain LoRA, which the
    others are compared with."""
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] = (5e-4, 2e-3)
    """`train.learning_rate` of every method; validation chooses one for each, because no single rate is fair to all."""
    vary: dict[str, tuple[Any, ...]] = {}
    """Further keys of `adapter` and `train` with their values: every combination is trained."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """`train.seed` of the repetitions of every training; empty = `train.seed` alone."""

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        vary = values.get("vary")
        return _tuples(values) | ({"vary": _tuples(vary)} if isinstance(vary, dict) else {})


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


class SearchConfig(Section):
    """Ray Tune."""

    space: str = "default"
    """Name of a file in tune/spaces/ or a path to a YAML of search dimensions."""
    trials: Positive = 6
    """Configurations tried."""
    max_steps: Positive = 40
    """Optimizer steps of a trial that is not stopped early."""
    concurrent: NonNegative = 0
    """Trials at once; 0 = as many as the devices (or cores) carry."""
    workers_per_trial: Positive = 1
    """Processes of one trial; above 1 a trial is a DeepSpeed TorchTrainer."""
    adapters: Positive = 3
    """Best trials whose adapters form the adapter ensemble."""
    seed: NonNegative = 0
    """Seed of the sampler."""
