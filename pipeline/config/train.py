"""Optimization: how long, in which batches, at which rates, under which draws."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import LARGEST, Fraction, Name, NonNegative, Positive, Section

PLACEMENT = (
    "micro_batch",
    "micro_tokens",
    "deepspeed",
    "activation_checkpointing",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "checkpoint_bytes",
)
"""Keys of `train` that do not change what is trained."""


Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip
OF_SCHEDULE = {
    "schedule_cycles": "cosine_with_restarts", "schedule_power": "polynomial", "decay_fraction": "warmup_stable_decay",
}  # fmt: skip
"""Key of `train` -> the schedule that reads it."""
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class SpikeConfig(Section):
    """When a loss counts as a spike: above `factor` times the median and above `floor_nats`. What then happens."""

    factor: Annotated[float, Field(gt=1.0)] = 4.0
    """Loss over the median of the steps before; small batches of short answers vary by 2 or 3."""
    floor_nats: Annotated[float, Field(ge=0.0)] = 0.5
    """A loss up to this is no spike, whatever the median: where nearly all rows are learnt, one that is not makes many
    times a median near zero. In the unit of the loss: of rows with a score, their unit squared. 0 = no floor."""
    window_steps: Annotated[int, Field(ge=2, le=LARGEST)] = 20
    """Steps behind the running median; nothing is judged before half of them are there."""
    action: Literal["warn", "stop"] = "warn"
    """`warn`: a row in metrics.jsonl and a line on the terminal. `stop`: the run ends before the step is applied."""


class TrainConfig(Section):
    """Optimization. Gradient accumulation is derived: global_batch / (micro_batch × processes)."""

    max_steps: Positive = 60
    """Optimizer updates."""
    epochs: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Passes over the training rows, in place of max_steps: steps = ceil(epochs × rows / global_batch), counted once,
    before the training processes start."""
    global_batch: Positive = 16
    """Examples per optimizer update, over all processes."""
    micro_batch: Positive = 8
    """Examples per process in one forward pass."""
    packing: bool = False
    """Put several short examples into one row of at most data.max_tokens tokens; they do not see each other.
    `global_batch` and `micro_batch` then count such rows, and a row has one mask draw."""
    micro_tokens: Positive | None = None
    """Cut the global batch by length into passes of at most so many tokens (rows × longest row, where rows are padded),
    instead of into passes of `micro_batch` examples. Which examples and masks a step has does not change, so neither
    does its loss. (`micro_batch` must still divide the global batch among the processes: DeepSpeed asks for it.)"""
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    """Peak learning rate."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """Learning rate of lora_B over that of lora_A (LoRA+, arXiv 2402.12354)."""
    warmup_fraction: Fraction = 0.1
    """Part of max_steps with a linearly rising learning rate."""
    warmup_steps: NonNegative | None = None
    """The same in steps; takes the place of warmup_fraction."""
    schedule: Schedule = "linear"
    """What becomes of the learning rate after the warm-up, under the names that transformers has for it (`constant` and
    `constant_with_warmup` are the same here: `warmup_fraction: 0` leaves the warm-up out)."""
    schedule_cycles: Positive = 1
    """Waves of `cosine_with_restarts`: each begins at the peak."""
    schedule_power: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0
    """Exponent of `polynomial`: the factor is (part of the steps that is left) ^ power."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Last part of the steps after the warm-up, in which `warmup_stable_decay` falls to 0 as a half cosine."""
    optimizer: Optimizer = "adamw"
    """`adamw`: PyTorch's, with fp32 moments. `adamw_8bit`: that of bitsandbytes, with 8-bit moments in blocks of 256
    (those of parameters below 4,096 numbers stay fp32). `paged_adamw`, `paged_adamw_8bit`: its moments are moved to the
    host where the GPU's memory runs out. All but the first need train.deepspeed=zero0: the others cut moments into
    parts that belong to no parameter."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decoupled weight decay."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Part of the target's probability that is spread evenly over all tokens (or classes); training loss only."""
    max_gradient_norm: Annotated[float, Field(gt=0.0)] = 1.0
    """Global norm at which gradients are clipped."""
    seed: NonNegative = 0
    """Seed of initialisation, row order and masks."""
    draws: Positive = 4
    """S, independent mask draws per optimizer step (arXiv 2404.09610, eq. 7)."""
    draw_layout: Literal["split", "replicate"] = "split"
    """`split`: examples are divided among the draws (cost of plain LoRA); `replicate`: every example
    under every draw (the paper's objective, S times the work)."""
    validate_every_steps: Positive = 20
    """Steps between validations. Where nothing says how many and length is in epochs: 20, or a 20th of all steps."""
    patience: Positive | None = None
    """Validations in a row without a lower validation NLL after which the training ends, done; null = after all steps.
    The learning rate follows its schedule over all steps all the same. Under AdaLoRA they count from the step on at
    which the ranks are settled."""
    checkpoint_every_steps: Positive = 20
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; the best one is kept beside them."""
    checkpoint_bytes: Positive | None = None
    """Bytes that checkpoints/ may take; beyond it the oldest go first, never the newest or the best. None = no limit:
    a checkpoint takes 12 bytes per trained parameter."""
    keep_best: bool = True
    """Publish the adapter with the lowest validation NLL instead of the last one."""
    deepspeed: Name = "zero2"
    """Name of a file in ds_configs/ or a path to a DeepSpeed JSON."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    spike: SpikeConfig = SpikeConfig()
    """Watch for jumps of the loss."""

    @model_validator(mode="after")
    def _check_batch(self) -> TrainConfig:
        if self.global_batch % self.micro_batch:
            raise ValueError(
                f"train.global_batch = {self.global_batch} must be a multiple of train.micro_batch = {self.micro_batch}"
            )
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            raise ValueError(
                f"train.epochs = {self.epochs:g} and train.max_steps = {self.max_steps} both say how long training is;"
                " keep one of them, or set train.epochs=null"
            )
        for key, schedule in OF_SCHEDULE.items():
            if getattr(self, key) != TrainConfig.model_fields[key].default and self.schedule != schedule:
                raise ValueError(
                    f"train.{key} = {getattr(self, key):g} is read by train.schedule = {schedule} alone, and it is"
                    f" {self.schedule}; set train.schedule={schedule}, or leave train.{key} out"
                )
        return self
