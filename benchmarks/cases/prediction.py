"""Prediction of rows of the default task under 13 members, as the evaluation stage does it, within this process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.passes import config_of, prompt_tokens
from benchmarks.products import Products, limit_of
from benchmarks.setting import Setting
from benchmarks.table import Row
from benchmarks.timing import Spread, Work
from pipeline.adapters.build import attach_adapter
from pipeline.adapters.members import Member
from pipeline.data.splits import load_splits
from pipeline.prediction.task import open_task

MEMBERS = (Member(None), Member(0), *(Member(0, draw) for draw in range(11)))


def rows(setting: Setting) -> Iterator[Row]:
    """Prompt tokens × members per second in every dtype, and the share of their products.

    A share above 100 % is possible: what rows have in common at their beginning need not be computed for each.
    """
    for dtype in setting.dtypes:
        config = config_of(setting, dtype, *setting.scale.rows)
        splits = load_splits(config.data)
        task = open_task(config, splits, torch.device(setting.device))
        adapters = attach_adapter(config.adapter, task.base, config.train.max_steps, config.train.seed)
        chosen = splits.validation[: setting.scale.predicted]
        vectors = len(MEMBERS) * prompt_tokens(config, chosen, task.base.tokenizer)
        products = Products(config, setting.device)
        part = min(vectors, config.evaluate.batch_tokens)
        predict: Work = partial(task.predict, adapters, chosen, MEMBERS)
        times = setting.alternate({"predict": predict, "products": products.work(part, backward=False)})
        yield Row(
            "prediction", f"{len(chosen)} rows under {len(MEMBERS)} members, {dtype}",
            value=Spread.of([vectors / seconds for seconds in times["predict"]]), unit="tokens/s",
            limit=limit_of(times, "products", "predict", products.operations(part, backward=False), vectors / part),
            seconds=(Spread.of(times["predict"]).median,),
        )
