"""AdaLoRA adapters as PEFT has them on disk, and the plain LoRA that one is at inference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.spec import AdapterSpec, RankSchedule
from pipeline.config.adapter import SERVED_RANKS

SvdMatrices = Mapping[str, tuple[Tensor, ...]]
"""layer name -> (A (R, I), B (O, R), E (R,))."""


def peft_adalora(
    spec: AdapterSpec, schedule: RankSchedule, matrices: SvdMatrices, prefix: str, common: Mapping[str, Any]
) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's AdaLoraConfig and tensors: pruned triplets left out, `rank_pattern` saying which they were.

    What has Λ = 0 adds nothing and is left out; the scaling stays alpha / initial rank (PEFT: ranknum). PEFT's AdaLoRA
    has one alpha: where layers differ (rescale `none` on a part of them), Λ takes the factor.
    """
    from peft import AdaLoraConfig

    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for name, (A, B, E) in matrices.items():
        kept = E != 0
        values = E.reshape(-1, 1) * (spec.alpha_of(name) / spec.alpha)
        for part, tensor in (("lora_A", A[kept]), ("lora_B", B[:, kept]), ("lora_E", values[kept])):
            tensors[f"{prefix}{name}.{part}"] = tensor.contiguous()
        pattern[f"{name}.lora_E"] = kept.tolist()
    config = AdaLoraConfig(
        init_r=schedule.initial_rank, target_r=schedule.target_rank, rank_pattern=pattern,
        tinit=schedule.warmup, tfinal=schedule.final, total_step=schedule.total, deltaT=schedule.interval,
        beta1=schedule.beta1, beta2=schedule.beta2, orth_reg_weight=schedule.orthogonality, **common,
    )
    return config, tensors


def with_peft_schedule(spec: AdapterSpec, config: Mapping[str, Any], matrices: SvdMatrices) -> AdapterSpec:
    """`spec` of an AdaLoRA adapter, from PEFT's configuration; the kept ranks are those of the tensors."""
    schedule = RankSchedule(
        int(config["init_r"]), int(config["target_r"]), int(config["tinit"]), int(config["tfinal"]),
        int(config["total_step"]), int(config["deltaT"]), float(config["beta1"]), float(config["beta2"]),
        float(config["orth_reg_weight"]),
    )
    ranks = {f"^{re.escape(name)}": len(A) for name, (A, *_) in matrices.items()}
    return replace(spec, rank=schedule.initial_rank, rank_pattern=ranks, schedule=schedule)


def shown_rank(spec: AdapterSpec) -> int | str:
    """For people: a LoRA's rank; of a stored AdaLoRA target/kept, the average that was asked for and that there is."""
    if spec.schedule is None:
        return spec.rank
    ranks = [spec.rank_of(name) for name in sorted(spec.layers or ())]
    return f"{spec.schedule.target_rank}/{sum(ranks) / len(ranks):.3g}"


def plain_lora(spec: AdapterSpec, matrices: SvdMatrices) -> tuple[AdapterSpec, dict[str, tuple[Tensor, ...]]]:
    """The LoRA with the same update: lora_B = s · P diag(Λ), scaling 1, every layer padded with zeros to one rank.

    The rank is the largest kept one, raised to the next that serving engines have kernels for (`SERVED_RANKS`).
    """
    largest = max(len(A) for A, *_ in matrices.values())
    rank = next((served for served in SERVED_RANKS if served >= largest), largest)
    padded: dict[str, tuple[Tensor, ...]] = {}
    for name, (A, B, E) in matrices.items():
        missing = rank - len(A)
        folded = B * (E * spec.scaling_of(name))
        padded[name] = (torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(folded, (0, missing)))
    return replace(spec, rank=rank, alpha=float(rank), alpha_pattern={}, rank_pattern={}, schedule=None), padded
