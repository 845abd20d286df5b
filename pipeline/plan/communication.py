"""What the processes of a training send each other in one optimizer step: bytes exactly, seconds by a small model.

What is sent. The base is frozen: under ZeRO-0 to 2 the adapter alone is ever sent, A numbers in fp32, whatever the base
is; ZeRO-3 divides the base, too (ds_configs/README.md), and gathers it. With n processes and p passes per step:

    ZeRO-0    all-reduce      gradients                  4 A                    once, at the last pass
    ZeRO-1    all-reduce      gradients                  4 A                    once, at the last pass
              all-gather      parameters                 4 A, padded to 2 n     once, after the step
    ZeRO-2    all-reduce      gradients                  4 A                    p times
              all-gather      parameters                 4 A, padded to 2 n     once, after the step
    ZeRO-3    all-gather      base and adapter           F, then up to B        p times
              reduce-scatter  gradients                  4 A, each padded to n  p times
    each      all-reduce      norms for clipping         4 (ZeRO-3 on its device: 8), under ZeRO-1 to 3 per group
              all-reduce      loss, guards, stops        48 (6 numbers in fp64, in three calls)

DeepSpeed reduces ZeRO-1's and 2's gradients by all-reduce though the files say reduce_scatter: of a bucket that holds
parts of several processes it all-reduces the whole (`use_multi_rank_bucket_allreduce`), and a bucket of 50 million
numbers holds a whole adapter. F is all that is divided, in the compute dtype, each tensor padded to n; B is that
without embeddings, which no gradient passes. What of B is still there when the backward pass begins is not gathered
again: with prefetching about `stage3_max_live_parameters` numbers (it ends somewhere within a module), so nothing where
the model is smaller. What a first layer has before its adapters needs no second gathering either, and is counted all
the same. Offloading moves shards between a device and its host, and changes nothing of this but the norm (4 bytes).

How long it takes. In a ring a process sends, of S bytes, 2 (n-1)/n S for an all-reduce and (n-1)/n S for a
reduce-scatter or an all-gather. Every byte crosses every link of the ring, so the slower kind of link decides; to this
come the hops, of which (nodes - 1) are between nodes, as NCCL counts them (its src/graph/tuning.cc):

    t = sent / rate + calls × rounds × ((n - nodes) × hop within + (nodes - 1) × hop between)

with 2 rounds for an all-reduce, else 1. An all-reduce may take a double binary tree instead, where that is faster:
2 S / rate + calls × 2 × ((n / nodes - 1) × hop within + log2(nodes) × hop between). Nothing overlaps with computing:
the files of ds_configs/ have `overlap_comm: false`, which puts all collectives into the stream that computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.deepspeed import zero_stage

FP32 = 4
ALIGNMENT = 2
"""DeepSpeed pads the flat parameters of ZeRO-1 and 2 to so many numbers per process."""
WHOLE_BUCKET = 500_000_000
"""Numbers in a bucket of ZeRO-0, which no setting changes; `reduce_bucket_size` where a file leaves that out."""
LIVE, PREFETCHED, REUSED = 1_000_000_000, 50_000_000, 1_000_000_000
"""DeepSpeed's defaults of stage3_max_live_parameters, stage3_prefetch_bucket_size and stage3_max_reuse_distance."""
CONTROL = (16, 24, 8)
"""Bytes of our own all-reduces of a step: tokens and supervised tokens; two losses and the gradients' norm; a stop."""
COUNTED = {
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "offload_optimizer", "offload_param", "stage3_param_persistence_threshold", "stage3_max_live_parameters",
    "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
}
"""Keys of zero_optimization that are known here; others may compress what is sent, or divide it in another way."""
Kind = Literal["all-reduce", "reduce-scatter", "all-gather"]


@dataclass(frozen=True)
class Sizes:
    """Numbers (no bytes) in each tensor that a step may move."""

    trained: tuple[tuple[int, ...], ...]
    """Of each parameter group of the optimizer: one, or two under LoRA+."""
    frozen: tuple[int, ...]
    """Of the base, as ZeRO-3 divides it; a 4-bit weight counts the numbers of the compute dtype that hold it."""
    embeddings: tuple[int, ...]
    """Likewise: those that the backward pass does not need."""
    itemsize: int
    """Bytes of a number of the compute dtype."""

    @property
    def adapter(self) -> tuple[int, ...]:
        """All that is trained."""
        return tuple(size for group in self.trained for size in group)


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in one step, all of them together."""

    kind: Kind
    what: str
    size: int
    """Bytes of the whole tensors: what an all-reduce or reduce-scatter is given, what an all-gather makes."""
    calls: int

    def sent(self, processes: int) -> int:
        """Bytes that each process sends in a ring, rounded up."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return -(-rounds * (processes - 1) * self.size // processes)


@dataclass(frozen=True)
class Network:
    """Links in one direction, at their nominal rates: what is measured is slower."""

    name: str
    within: float
    """Bytes per second that a device sends to others of its node."""
    between: float
    """Bytes per second that a node sends to others."""
    hop_within: float
    """Seconds."""
    hop_between: float
    node: int = 8
    """Devices of a node."""

    def seconds(self, collective: Collective, processes: int) -> tuple[float, float]:
        """Of all its calls: sending at the rate, and hops; see the head of this file."""
        nodes = -(-processes // self.node)
        rate = self.within if nodes == 1 else min(self.within, self.between)
        hops = collective.calls * ((processes - nodes) * self.hop_within + (nodes - 1) * self.hop_between)
        sending = collective.sent(processes) / rate
        if collective.kind != "all-reduce":
            return sending, hops
        climbing = (processes / nodes - 1) * self.hop_within + math.log2(nodes) * self.hop_between
        ring, tree = (sending, 2 * hops), (2 * collective.size / rate, 2 * collective.calls * climbing)
        return min(ring, tree, key=sum)


NETWORKS = (
    Network("InfiniBand, 8 × 400 Gb/s a node", 450e9, 400e9, 3.4e-6, 9.6e-6),
    Network("Ethernet, 100 Gb/s a node", 450e9, 12.5e9, 3.4e-6, 30e-6),
)
"""Both with NVLink of the fourth generation in nodes of 8. Hops: NCCL's table (ring, Simple); 30 µs for Ethernet."""


def uncounted(settings: Mapping[str, Any]) -> str | None:
    """What in a DeepSpeed file makes it send something else than is counted below; None: nothing."""
    zero = settings.get("zero_optimization", {})
    sharded = zero_stage(dict(settings)) == 3
    if settings.get("communication_data_type", None if sharded else "fp32") != "fp32":
        return "a communication_data_type that is not fp32"
    if sharded and zero.get("stage3_param_persistence_threshold") != 0:
        return "a stage3_param_persistence_threshold that is not 0"
    if sharded and not zero.get("reduce_scatter", True):
        return "reduce_scatter=false"
    return next(iter(sorted(set(zero) - COUNTED)), None)


def collectives(settings: Mapping[str, Any], sizes: Sizes, processes: int, passes: int) -> list[Collective]:
    """What one optimizer step of so many passes sends.

    Args:
        settings: a DeepSpeed file (`config.deepspeed: read_ds_config`), of which `uncounted` finds nothing.
    """
    zero = settings.get("zero_optimization", {})
    stage, adapter = zero_stage(dict(settings)), sum(sizes.adapter)
    groups = len(sizes.trained) if stage else 1
    norm = 8 if stage == 3 and not zero.get("offload_optimizer") else 4
    control = [
        Collective("all-reduce", "norm", groups * norm, groups),
        Collective("all-reduce", "loss, guards, stops", sum(CONTROL), len(CONTROL)),
    ]
    bucket = zero.get("reduce_bucket_size", WHOLE_BUCKET) if stage else WHOLE_BUCKET
    buckets = -(-adapter // bucket)
    if stage == 3:
        divided = (*sizes.frozen, *sizes.adapter)
        again = gathered_again(zero, padded(divided, processes))
        gathered = padded((*sizes.embeddings, *divided), processes) + again
        calls = len(sizes.embeddings) + (2 if again else 1) * len(divided)  # at the most: some are gathered together
        scattered = FP32 * padded(sizes.adapter, processes)
        return [
            Collective("all-gather", "base and adapter", passes * sizes.itemsize * gathered, passes * calls),
            Collective("reduce-scatter", "gradients", passes * scattered, passes * buckets),
            *control,
        ]
    reductions = passes if stage == 2 else 1
    reduced = Collective("all-reduce", "gradients", reductions * FP32 * adapter, reductions * buckets)
    if stage == 0:
        return [reduced, *control]
    flat = padded([sum(group) for group in sizes.trained], ALIGNMENT * processes)
    return [reduced, Collective("all-gather", "parameters", FP32 * flat, len(sizes.trained)), *control]


def gathered_again(zero: Mapping[str, Any], backward: int) -> int:
    """Of the numbers that a backward pass under ZeRO-3 needs, those that are gathered for it anew."""
    live = zero.get("stage3_max_live_parameters", LIVE) if zero.get("stage3_prefetch_bucket_size", PREFETCHED) else 0
    near = zero.get("stage3_max_reuse_distance", REUSED) // 2  # there and back
    return max(0, backward - max(live, near))


def padded(sizes: Sequence[int], multiple: int) -> int:
    """The sum of `sizes`, each rounded up to a multiple."""
    return sum(-(-size // multiple) * multiple for size in sizes)
