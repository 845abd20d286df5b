"""What a search tries, and what a comparison of methods varies."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Line, NonNegative, Positive, Section

LEARNING_RATE = "train.learning_rate"
MOST_TRAININGS = 1000
"""Of a comparison: all of them are planned before the first one starts."""


class NamedMethod(Section):
    """A method under a name of its own."""

    name: Annotated[Line, Field(min_length=1)]
    """In tables, and in the names of its trainings' folders."""
    adapter: dict[str, Any]
    """Keys of the section `adapter`, such as {method: lora_dropout, rates: {lora_B: 0.0}}."""
    train: dict[str, Any] = {}
    """Keys of the section `train` in which it differs, such as {max_steps: 64}: the table says what it costs."""
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    """Keys of `adapter` and `train` with their values, of this method alone, such as {adapter.consistency.weight: [0.1,
    1.0]}; on top of compare.vary, and with train.learning_rate in the place of compare.learning_rates."""


class CompareConfig(Section):
    """Several methods, each at several settings, on the same base, data and budget."""

    methods: Annotated[tuple[str | NamedMethod, ...], Field(min_length=1)] = (
        "none", "input_dropout", "lora_dropout", "hiddenkey_minus", "hiddenkey", "lora_dropout+hiddenkey",
    )  # fmt: skip
    """Presets (and sums of them) by name with their own rates, or {name, adapter, train, vary}. `none` is plain LoRA,
    which the others are compared with."""
    learning_rates: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] = (5e-4, 2e-3)
    """`train.learning_rate` of every method; validation chooses one for each, because no single rate is fair to all."""
    vary: dict[str, tuple[Any, ...]] = {}
    """Further keys of `adapter` and `train` with their values: every combination is trained."""
    seeds: tuple[NonNegative, ...] = ()
    """`train.seed` of the repetitions of every training; empty = `train.seed` alone."""
    evaluate: Literal["chosen", "all"] = "chosen"
    """Settings whose adapters the evaluation has predict rows: of every method those that validation chose while it was
    trained, or all. Scores of the others on test rows are nothing to choose by, and cost as much again."""

    @model_validator(mode="after")
    def _check_size(self) -> CompareConfig:
        settings = sum(math.prod(map(len, self.settings_of(method).values())) for method in self.methods)
        count = settings * len(self.seeds or (0,))
        if not 0 < count <= MOST_TRAININGS:
            raise ValueError(
                f"compare asks for {count:,} trainings; it must be 1 to {MOST_TRAININGS:,}: methods × learning_rates ×"
                " seeds × every value of vary"
            )
        return self

    def settings_of(self, method: str | NamedMethod) -> dict[str, tuple[Any, ...]]:
        """Dotted key -> the values of which every combination is trained; a method's own `vary` goes before the
        shared one."""
        own = {} if isinstance(method, str) else method.vary
        return {LEARNING_RATE: self.learning_rates, **self.vary, **own}


class EarlyExitConfig(Section):
    """Ends a trial that overfits; the best adapter that it had counts as that of a whole trial."""

    factor: Annotated[float, Field(gt=1.0)] | None = None
    """A validation NLL above so many times the smoothed training loss is a sign of overfitting; empty = no early exit.
    Under dropout the training loss, being that of masked passes, is higher, and signs are rarer."""
    validations: Positive = 3
    """Signs in a row, none of them a new best, that end a trial."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Weight of the past, per step, in the smoothed training loss."""


class SearchConfig(Section):
    """Ray Tune."""

    space: str = "default"
    """Name of a file in tune/spaces/ or a path to a YAML of search dimensions (pipeline/config/space.py)."""
    trials: Positive = 6
    """Configurations tried, and as many of plain LoRA where `plain` is on."""
    plain: bool = True
    """Tune plain LoRA beside the method: the same space without what is of dropout, the same number of trials, the same
    rule. Off: `run` trains it with the method's settings, which favours the method."""
    max_steps: Positive = 40
    """Optimizer steps of a trial that is not stopped early."""
    concurrent: NonNegative = 0
    """Trials at once; 0 = as many as the devices (or cores, or packs) carry."""
    pack: Literal["auto", "off"] | Positive = "auto"
    """Trials of one process are trained together over one base, one worker per device: at most so many in each, auto =
    8 on a GPU, 4 on CPUs, fewer where the memory plan says so. Off, and where no pack trains the method (AdaLoRA):
    every trial loads the base for itself."""
    workers_per_trial: Positive = 1
    """Processes of one trial; above 1 a trial is a DeepSpeed TorchTrainer."""
    early_exit: EarlyExitConfig = EarlyExitConfig()
    """Beside successive halving, which always ends trials that lag behind others."""
    adapters: Positive = 3
    """Best trials whose adapters form the adapter ensemble."""
    seed: NonNegative = 0
    """Seed of the sampler."""

    @field_validator("pack", mode="before")
    @classmethod
    def _read_off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML 1.1 reads off as false
