"""How many runs one process can hold at once, by the memory plan of one of them."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.plan.memory import CONTEXT, NoPlan, plan_memory
from pipeline.plan.memory_table import expected_batch

PER_PARAMETER = 16
"""Bytes: the fp32 value, its gradient and two moments."""


def runs_that_fit(config: RunConfig, processes: int = 1) -> int | None:
    """Runs like this one that share a base in one of so many processes, 1 at least; None where no plan can be made.

    The base is there once. Each run adds its parameters, their gradients and moments, and its own micro-batch to a
    shared pass: passes may stay smaller than that (`pipeline.training.packed.budget`), which is not known beforehand.
    """
    train = config.train.model_copy(update={"deepspeed": "zero0"})  # as in a pack: nothing is sharded
    try:
        batch, _ = expected_batch(config.data, config.model, train.packing)
        plan = plan_memory(config.model, config.adapter, train, 1, batch)
    except NoPlan:
        return None
    once = plan.base + plan.weights.largest + plan.overhead + (CONTEXT if plan.device == "cuda" else 0)
    each = PER_PARAMETER * plan.weights.trained + plan.holes + max(plan.passes.forward, plan.passes.backward)
    return max(1, int((plan.capacity / processes - once) // each))
