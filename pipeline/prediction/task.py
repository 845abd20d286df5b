"""How rows are read by the base model: the one place that tells causal language models, classifiers and regressors.

Stages hold a `Task` and never ask which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import MaskKey, Member
from pipeline.config import DataConfig, RunConfig, TrainConfig
from pipeline.config.deepspeed import shards_parameters
from pipeline.config.extensions import TASKS, load
from pipeline.data.cache import cached_examples
from pipeline.data.encode import Encoded, encode_candidates, encode_training_rows, supervised_share
from pipeline.data.encode_classifier import (
    encode_classification,
    encode_regression,
    encode_text,
    output_count,
    refuse_choice_score,
    refuse_for_causal,
)
from pipeline.data.rows import Row
from pipeline.data.splits import Splits
from pipeline.data.stream import StreamedBatches, open_stream
from pipeline.distributed.zero import is_sharded
from pipeline.errors import ConfigError
from pipeline.loss.objective import SupervisedClassifier, SupervisedLM, SupervisedRegressor
from pipeline.model.classifier import position_limit
from pipeline.model.head import check_halves, head_of, hidden_states
from pipeline.model.kind import model_kind
from pipeline.model.load import BaseModel, load_base
from pipeline.model.shared_keys import may_share
from pipeline.prediction.passes import (
    PassSettings,
    predict_choices,
    predict_classes,
    predict_completions,
    predict_values,
)
from pipeline.run_folder.predictions import ChoicePredictions, CompletionPredictions, Predictions, RegressionPredictions
from pipeline.scores.choices import ChoiceLikelihoods, ChoiceScore

OnChunk = Callable[[int, int], None]


class Task(Protocol):
    """A base model and the way its inputs are made of rows, and answers of its outputs."""

    @property
    def base(self) -> BaseModel:
        """The frozen base."""

    @property
    def padding(self) -> Literal["left", "right"]:
        """The side on which rows are padded while training."""

    @property
    def max_tokens(self) -> int:
        """Tokens of a row, at most."""

    @property
    def can_stream(self) -> bool:
        """Whether rows can be read without having seen all of them."""

    @property
    def passes(self) -> PassSettings:
        """How rows go through the model in predictions, and what their mask draws are keyed by."""

    def examples(self, rows: Sequence[Row]) -> list[Encoded]:
        """Training rows as tokens. Raises `DataError` on rows that the model cannot learn from."""

    def supervision(self, examples: Sequence[Encoded]) -> str:
        """For people: how much of the training rows carries loss."""

    @property
    def label_smoothing(self) -> float:
        """ε of label smoothing: see `pipeline.loss.terms.token_losses`."""

    def objective(self) -> nn.Module:
        """The base as a module that says the loss of every supervised place (see `pipeline.loss.objective`)."""

    def predict(
        self, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], on_chunk: OnChunk | None = None
    ) -> Predictions:
        """Log-probabilities of every answer of `rows` under every member, in this process alone."""

    def probe(self, row: Row) -> list[int]:
        """Token ids of one row as a stock tool is given them, to compare logits."""

    def probe_logits(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids without padding -> (B, V or C): the logits that answer them."""


@dataclass(frozen=True)
class CausalLMTask:
    """Answers are tokens behind the prompt; choice, completion and chat rows."""

    base: BaseModel
    max_tokens: int
    label_smoothing: float
    passes: PassSettings
    """Of predictions."""
    choice_score: ChoiceScore = "sum"
    """Of predictions; what is learnt is the right choice's tokens, whatever the rule."""
    padding: ClassVar[Literal["left", "right"]] = "left"
    can_stream: ClassVar[bool] = True

    def examples(self, rows: Sequence[Row]) -> list[Encoded]:
        """Prompts with their right answers, or with all that `label_probabilities` weigh."""
        return encode_training_rows(rows, self.base.tokenizer, self.max_tokens)

    def supervision(self, examples: Sequence[Encoded]) -> str:
        """The share of supervised tokens."""
        return f"{supervised_share(examples):.1%} supervised"

    def objective(self) -> nn.Module:
        """Next-token loss."""
        return SupervisedLM(self.base.model)

    def predict(
        self, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], on_chunk: OnChunk | None = None
    ) -> Predictions:
        """Choices by the probability of their tokens; completions token by token."""
        candidates = [encode_candidates(row, self.base.tokenizer, self.max_tokens) for row in rows]
        settings = replace(self.passes, on_chunk=on_chunk, shares_keys=self.shares_keys)
        ids = tuple(row.id for row in rows)
        if rows[0].kind == "choice":
            log_likelihoods = predict_choices(adapters, candidates, members, settings)
            return ChoicePredictions.of_texts(ids, with_lengths(log_likelihoods, candidates, rows), self.choice_score)
        flat, offsets = predict_completions(adapters, [answers[0] for answers in candidates], members, settings)
        return CompletionPredictions(ids, flat, offsets)

    @cached_property
    def shares_keys(self) -> bool:
        """Whether sequences share keys and values: tried on a few tokens when the first rows are predicted."""
        return not is_sharded(self.base.model) and may_share(self.base.model)

    def probe(self, row: Row) -> list[int]:
        """The prompt (and what precedes the last token of the first answer)."""
        return list(encode_candidates(row, self.base.tokenizer, self.max_tokens)[0].input_ids[:-1])

    def probe_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        hidden = hidden_states(self.base.model, input_ids, torch.ones_like(input_ids), positions)
        return head_of(self.base.model)(hidden[:, -1])


def with_lengths(
    log_likelihoods: np.ndarray, candidates: Sequence[Sequence[Encoded]], rows: Sequence[Row]
) -> ChoiceLikelihoods:
    """(M, N, C) log-likelihoods beside the lengths of the choices."""
    tokens, characters = np.zeros((2, *log_likelihoods.shape[1:]), dtype=np.int64)
    for n, (answers, row) in enumerate(zip(candidates, rows, strict=True)):
        tokens[n, : len(answers)] = [answer.supervised for answer in answers]
        characters[n, : len(answers)] = [len(choice.strip()) for choice in row.choices]
    return ChoiceLikelihoods(log_likelihoods, tokens, characters)


@dataclass(frozen=True)
class ClassificationTask:
    """The text, or pair of texts, is read; a trained head gives one logit per choice. Rows share their choices."""

    base: BaseModel
    max_tokens: int
    """data.max_tokens, or the positions that the encoder has where they are fewer."""
    label_smoothing: float
    passes: PassSettings
    """Of predictions."""
    padding: ClassVar[Literal["left", "right"]] = "right"
    can_stream: ClassVar[bool] = False

    def examples(self, rows: Sequence[Row]) -> list[Encoded]:
        """Texts with their class."""
        return [encode_classification(row, self.base.tokenizer, self.max_tokens) for row in rows]

    def supervision(self, examples: Sequence[Encoded]) -> str:
        """One label per row."""
        return f"supervised by one of {self.base.identity.classes} classes per row"

    def objective(self) -> nn.Module:
        """Cross-entropy over the classes."""
        return SupervisedClassifier(self.base.model)

    def predict(
        self, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], on_chunk: OnChunk | None = None
    ) -> Predictions:
        """Log-softmax over the classes."""
        texts = [encode_text(row, self.base.tokenizer, self.max_tokens) for row in rows]
        settings = replace(self.passes, on_chunk=on_chunk)
        return ChoicePredictions(tuple(row.id for row in rows), predict_classes(adapters, texts, members, settings))

    def probe(self, row: Row) -> list[int]:
        """The text with its special tokens."""
        return list(encode_text(row, self.base.tokenizer, self.max_tokens).input_ids)

    def probe_logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.base.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


@dataclass(frozen=True)
class RegressionTask(ClassificationTask):
    """The head has one output: the row's score."""

    def examples(self, rows: Sequence[Row]) -> list[Encoded]:
        """Texts with their score."""
        return [encode_regression(row, self.base.tokenizer, self.max_tokens) for row in rows]

    def supervision(self, examples: Sequence[Encoded]) -> str:
        """One number per row."""
        return "supervised by one number per row"

    def objective(self) -> nn.Module:
        """Mean squared error. Raises `ConfigError` where labels are to be smoothed: there are none."""
        if self.label_smoothing:
            raise ConfigError(
                "train.label_smoothing", self.label_smoothing, "has no meaning for rows with a score",
                "Set train.label_smoothing=0.",
            )
        return SupervisedRegressor(self.base.model)

    def predict(
        self, adapters: Adapters, rows: Sequence[Row], members: Sequence[Member], on_chunk: OnChunk | None = None
    ) -> Predictions:
        """Predicted numbers."""
        texts = [encode_text(row, self.base.tokenizer, self.max_tokens) for row in rows]
        settings = replace(self.passes, on_chunk=on_chunk)
        return RegressionPredictions(tuple(row.id for row in rows), predict_values(adapters, texts, members, settings))


def open_task(config: RunConfig, splits: Splits, device: torch.device) -> Task:
    """Load the base model as `model.kind` says. A task of an installed package is made as the one in whose place it
    comes: of a base, a row's tokens at most, the label smoothing, `PassSettings` and, of a causal model, the rule for
    choices.

    Raises:
        ConfigError: the package's task cannot be imported; the model cannot be loaded, or not as this kind; a rule for
            choices that it has no use for.
        DataError: a classifier, and rows that share neither choices nor a score; a causal model, and rows that only a
            model with a head reads.
    """
    sharded, longest = shards_parameters(config.train.deepspeed), config.data.max_tokens
    rows = [row for split in (splits.train, splits.validation, splits.calibration, splits.test) for row in split]
    smoothing, named = config.train.label_smoothing, config.model.kind.partition(":")[2]
    own: Callable[..., Task] | None = load(TASKS, named) if named else None  # before any weight is read
    if model_kind(config.model) == "classifier":
        refuse_choice_score(config.data)
        base = load_base(config.model, device, output_count(rows), sharded)
        longest = min(longest, position_limit(base.model) or longest)
        head = own or (RegressionTask if rows[0].kind == "regression" else ClassificationTask)
        return head(base, longest, smoothing, _passes(config, base))
    refuse_for_causal(rows)
    base = load_base(config.model, device, sharded=sharded)
    check_halves(base.model, device)
    return (own or CausalLMTask)(base, longest, smoothing, _passes(config, base), config.data.choice_score)


def _passes(config: RunConfig, base: BaseModel) -> PassSettings:
    key = MaskKey(config.ensemble.seed, "test")
    return PassSettings(base.tokenizer.pad_token_id, config.evaluate.batch_tokens, key)


def training_examples(task: Task, rows: Sequence[Row], data: DataConfig) -> Sequence[Encoded]:
    """`Task.examples`, kept for the next start where `data.cache` says so; not of a task of an installed package, whose
    next version may read rows otherwise."""
    if not data.cache or type(task).__module__ != __name__:
        return task.examples(rows)
    return cached_examples(rows, task.examples, task.base.tokenizer, f"{type(task).__name__} {task.max_tokens}")


def training_stream(task: Task, splits: Splits, data: DataConfig, train: TrainConfig) -> StreamedBatches | None:
    """Global batches of streamed rows where `data.streaming` says so.

    Raises:
        ConfigError: a classifier, whose rows must be known to share their choices.
    """
    if not data.streaming:
        return None
    if not task.can_stream:
        raise ConfigError(
            "data.streaming", True, "a classifier needs to know that all rows have the same choices",
            "Set data.streaming=false.",
        )
    return StreamedBatches(open_stream(data, splits, train.seed), task.examples, train.global_batch)
