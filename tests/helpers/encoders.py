"""Tiny encoders with heads and adapters, their rows, and the weights of their members."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from helpers.families import CPU, PRECISIONS
from helpers.reference import dense_update
from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.members import Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.model import ModelConfig
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.model.load import BaseModel, load_base
from pipeline.support.tiny import write_encoder

ENCODERS = ("bert", "bert-mlm", "roberta", "electra", "mpnet", "distilbert", "deberta", "deberta-v3")
"""Encoders that most tests go through."""
EAGER = ("mpnet", "deberta", "deberta-v3")
"""Families without scaled_dot_product_attention in transformers."""


def load_encoder(folder: Path, family: str = "bert", precision: str = "fp32", classes: int = 3) -> BaseModel:
    """A tiny encoder as the product loads it (written to `folder` first)."""
    if not (folder / "config.json").exists():
        write_encoder(folder, family)
    quantization, dtype = PRECISIONS.get(precision, (precision, "float32"))
    attention = "eager" if family in EAGER else "sdpa"
    config = ModelConfig(
        path=str(folder), quantization=quantization, compute_dtype=dtype, attention=attention,
        hold="quantized" if quantization == "nf4" else "auto",
    )
    return load_base(config, CPU, classes)


def attach_encoder(
    base: BaseModel, *specs: AdapterSpec, targets: str | list[str] = "all-linear", seed: int = 0
) -> Adapters:
    """Adapters with a head each."""
    return attach(base.model, list(specs), targets, seed, base.heads)


def trained_encoder(base: BaseModel, *specs: AdapterSpec, seed: int = 1) -> Adapters:
    """Adapters and heads moved away from their start."""
    adapters = attach_encoder(base, *specs)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapters.model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    return adapters


def texts(lengths: list[int], seed: int = 3) -> list[Encoded]:
    """Random rows between [CLS] and [SEP], of three classes in turn."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        body = torch.randint(4, 60, (length,), generator=random).tolist()
        rows.append(Encoded(f"row-{i}", (2, *body, 3), (i % 3, *[IGNORE_INDEX] * (length + 1))))
    return rows


def weights_of(adapters: Adapters, stock: nn.Module, member: Member, masks: dict, m: int) -> dict[str, Tensor]:
    """float64 weights of a stock model that is this member: W + ΔW, and the member's own head."""
    weights = {}
    for name, head in adapters.heads.items():
        module = head.start if member.adapter is None else head.copies[member.adapter]
        weights |= {f"{name}.{leaf}": parameter.double() for leaf, parameter in module.named_parameters()}
    if member.adapter is None:
        return weights
    for name, layer in adapters.layers.items():
        bucket = next(b for b in layer.buckets if member.adapter in b.slot)
        slot = bucket.slot[member.adapter]
        spec = adapters.specs[member.adapter]
        scaling = spec.alpha / spec.rank
        if member.draw is None:
            scaling *= np.prod([1 - site.rate for site in spec.sites if site.compensation == "none"])
        mine = {axis: mask[m] for axis, mask in masks.get(name, {}).items()} if member.draw is not None else {}
        r = mine["lora_rank"][: spec.rank] if "lora_rank" in mine else None
        A, B = bucket.lora_A[slot], bucket.lora_B[slot]
        update = dense_update(A, B, scaling, mine.get("lora_A"), mine.get("lora_B"), r)
        weights[f"{name}.weight"] = stock.get_submodule(name).weight + update
    return weights
