"""Tiny decoders with adapters, the precisions that they are tested in, and their rows."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.config.model import ModelConfig
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.model.load import load_base
from pipeline.support.tiny import tiny_llama, write_tiny_model

CPU = torch.device("cpu")
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
"""Decoders that most tests go through."""
PRECISIONS = {"fp32": ("none", "float32"), "bf16": ("none", "bfloat16"), "nf4": ("nf4", "float32")}
"""name -> (quantization, compute dtype)."""
SITES: dict[str, tuple[Site, ...]] = {
    "lora_A": (Site(position="lora_A", rate=0.4),),
    "lora_B": (Site(position="lora_B", rate=0.4),),
    "lora_rank": (Site(position="lora_rank", rate=0.4),),
    "lora_input": (Site(position="lora_input", rate=0.4),),
}
"""Every LoRA-matrix site on its own."""
LORA_DROPOUT = (Site(position="lora_A", rate=0.5), Site(position="lora_B", rate=0.25))
"""Both sides, at different rates."""


def load_tiny(folder: Path, family: str = "llama", precision: str = "nf4") -> nn.Module:
    """A tiny model as the product loads it (written to `folder` first), its 4-bit layers left as they are."""
    write_tiny_model(folder, family)
    quantization, dtype = PRECISIONS.get(precision, (precision, "float32"))
    hold = "quantized" if quantization == "nf4" else "auto"
    config = ModelConfig(path=str(folder), quantization=quantization, compute_dtype=dtype, hold=hold)
    return load_base(config, CPU).model


def trained_start(adapters: Adapters, seed: int = 1, size: float = 0.1) -> Adapters:
    """Move every adapter away from the identity: random B. The same numbers for the same seed."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters.layers.values():
            for bucket in layer.buckets:
                bucket.lora_B.copy_(torch.randn(bucket.lora_B.shape, generator=random) * size)
    return adapters


def adapted_llama(*specs: AdapterSpec, layers: int = 1, targets: str | list[str] = "all-linear") -> Adapters:
    """A tiny float32 Llama with trained-looking adapters."""
    return trained_start(attach(tiny_llama(layers=layers), list(specs), targets, seed=0))


def stock_double(model: nn.Module) -> nn.Module:
    """A float64 copy of a model that has no adapters yet."""
    return copy.deepcopy(model).double()


def gradients(adapters: Adapters) -> dict[str, torch.Tensor]:
    """name -> gradient of every adapter parameter; the gradients are taken away from the parameters."""
    found = {}
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name], parameter.grad = parameter.grad, None
    return found


def assert_close_gradients(
    ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Every gradient within `tolerance` of the largest entry of its tensor."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = max(float(theirs[name].abs().max()), 1e-3)
        worst = float((gradient.double() - theirs[name].double()).abs().max()) / scale
        assert worst <= tolerance, f"{name}: {worst:.2e} relative to the largest entry"


def examples(lengths: list[int], seed: int = 3, supervised: int = 3) -> list[Encoded]:
    """Random rows of the given lengths with the last tokens supervised."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(3, 60, (length,), generator=random).tolist()
        labels = [IGNORE_INDEX] * (length - supervised) + ids[length - supervised :]
        rows.append(Encoded(f"row-{i}", tuple(ids), tuple(labels)))
    return rows
