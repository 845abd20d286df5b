"""Single passes over a base: ours, stock PEFT's, and packs of runs. What is timed stands here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.setting import Setting
from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import RowLayout, split_layout
from pipeline.adapters.members import MaskKey, Member, replicate_rows
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig, load_config
from pipeline.data.collate import collate
from pipeline.data.encode import IGNORE_INDEX, Encoded, encode_training_rows
from pipeline.data.rows import Row
from pipeline.loss.objective import SupervisedLM
from pipeline.model.head import hidden_states
from pipeline.model.load import BaseModel, load_base
from pipeline.training.batch import choose_rows, lay_out

DRAWS = 4
KEY = MaskKey(0, 0)


def config_of(setting: Setting, dtype: str, *more: str) -> RunConfig:
    """The default recipe at rank 16 with LoRA Dropout .5, in one compute dtype."""
    fixed = ["adapter.method=lora_dropout", "adapter.rank=16", "adapter.alpha=32", f"model.compute_dtype={dtype}"]
    return load_config("default", [*fixed, *more, *setting.overrides])


def our_adapters(
    setting: Setting, dtype: str, runs: int = 1, ranks: Sequence[int] = (), longest: int | None = None
) -> Adapters:
    """`runs` adapters on a base of their own, or one of each rank; ready to train on rows of `longest` tokens."""
    config = config_of(setting, dtype)
    base = load_base(config.model, torch.device(setting.device))
    chosen = [{"rank": rank, "alpha": 2.0 * rank} for rank in ranks] or [{}] * runs
    of_config = [config.adapter.model_copy(update=one) for one in chosen]
    specs = [AdapterSpec.from_config(one, config.train.max_steps) for one in of_config]
    adapters = attach(base.model, specs, config.adapter.target_modules, config.train.seed, base.heads)
    adapters.model.train()
    if longest is not None:
        choose_rows(adapters, config.model.attention, longest)  # end to end or padded, as training has them
    return adapters


def stock_peft(setting: Setting, dtype: str, dropout: float) -> nn.Module:
    """The same base under stock PEFT, with its defaults but for rank, alpha, dropout and targets; ready to train."""
    from peft import LoraConfig, get_peft_model

    quantized = ["model.hold=quantized"] if setting.here.knows("model.hold") else []  # what a stock user has
    config = config_of(setting, dtype, *quantized)
    base: BaseModel = load_base(config.model, torch.device(setting.device))
    lora = LoraConfig(
        r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), lora_dropout=dropout, target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base.model, lora)
    return model.train().get_base_model()


def random_examples(model: nn.Module, rows: int, tokens: int) -> list[Encoded]:
    """Rows of random ids, all equally long; the last token of each is supervised."""
    chance = torch.Generator().manual_seed(0)
    vocabulary = min(1000, model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    ids = torch.randint(10, vocabulary, (rows, tokens), generator=chance).tolist()
    return [Encoded(str(i), tuple(row), (*[IGNORE_INDEX] * (tokens - 1), row[-1])) for i, row in enumerate(ids)]


def training_step(adapters: Adapters, examples: list[Encoded], layout: RowLayout) -> None:
    """Rows laid out, masks drawn, forward and backward of the loss, gradients cleared. No optimizer."""
    rows = lay_out(adapters, examples, layout, 0, KEY)
    with adapters.axis.active(rows.plan):
        SupervisedLM(adapters.model)(**rows.model_tensors, row_weights=rows.weights).backward()
    adapters.model.zero_grad(set_to_none=True)


def prompt_tokens(config: RunConfig, rows: Sequence[Row], tokenizer: Any) -> int:
    """Tokens of the rows' prompts: what any way of scoring one-token answers has to read."""
    examples = encode_training_rows(rows, tokenizer, config.data.max_tokens)
    return sum(len(example.input_ids) - example.supervised for example in examples)


class StockStep:
    """The same of stock PEFT, whose rows are laid out beforehand."""

    def __init__(self, model: nn.Module, examples: list[Encoded], own_loss: bool) -> None:
        """`own_loss`: as the model computes it, from logits at all positions; else ours, at supervised ones only."""
        device = next(model.parameters()).device
        self._objective, self._model, self._own_loss = SupervisedLM(model), model, own_loss
        self._tensors = collate(examples, 0).tensors(device)
        self._weights = torch.ones(len(examples), device=device)

    def loss(self) -> torch.Tensor:
        """The mean over supervised tokens as the model computes it, or their sum as we do."""
        if self._own_loss:
            found: torch.Tensor = self._model(**self._tensors).loss
            return found
        return self._objective(**self._tensors, row_weights=self._weights)

    def __call__(self) -> None:
        """One step."""
        self.loss().backward()
        self._model.zero_grad(set_to_none=True)


def reading(adapters: Adapters, examples: list[Encoded], members: Sequence[Member]) -> None:
    """Masks drawn, one pass of all `members` without gradient, up to the last hidden states."""
    tensors = collate(examples, 0).tensors(adapters.device)
    plan = adapters.plan(members, len(examples), MaskKey(0, "test"))
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad(), adapters.axis.active(plan):
        hidden_states(adapters.model, *(replicate_rows(tensors[name], len(members)) for name in names))


def packed_layout(runs: int, rows: int) -> RowLayout:
    """`rows` examples of each of `runs` adapters under 4 draws, end to end along the member axis."""
    alone = [split_layout(range(rows), DRAWS, adapter) for adapter in range(runs)]
    return RowLayout(
        tuple(member for layout in alone for member in layout.members),
        alone[0].rows,
        tuple(run * rows + index for run, layout in enumerate(alone) for index in layout.source),
        tuple(weight for layout in alone for weight in layout.weights),
    )
