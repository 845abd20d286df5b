"""4-bit weights that are dequantized once, where they are loaded, instead of in every pass.

bitsandbytes dequantizes a layer before each of its products, forwards and backwards: about a tenth of a training pass
on CPUs. Held in the compute dtype, the same values enter the same products, so every result is the same to the bit; the
base is still the quantized one. It takes 4 (bfloat16: 2) bytes per weight in each process, instead of half a byte.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.model import ModelConfig

SHARE = 0.25
"""Of the available memory that `auto` lets the base take: passes need room, too."""
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
)
"""Of control groups, version 2 and 1: limit, use, and where the part of it stands that is given back on demand."""


class HeldLinear(nn.Linear):
    """A frozen linear layer. Its weight is a buffer: processes neither send it to each other nor compare it."""

    def __init__(self, weight_OI: Tensor, bias_O: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight_OI.shape
        self.register_buffer("weight", weight_OI, persistent=False)
        self.bias = bias_O


def is_held_dequantized(config: ModelConfig, device: str, needed: int, processes: int) -> bool:
    """Whether the base's 4-bit weights are held in the compute dtype.

    Args:
        device: "cpu" or another type.
        needed: bytes that they then take.
        processes: of this machine, which share its memory.
    """
    if config.quantization != "nf4" or config.hold != "auto":
        return config.hold == "dequantized"
    return device == "cpu" and needed <= SHARE * available_memory() / processes


def held_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What `hold_dequantized` will take."""
    return sum(layer.in_features * layer.out_features for _, _, layer in _quantized(model)) * dtype.itemsize


def hold_dequantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Put a `HeldLinear` in `dtype` in the place of every bitsandbytes 4-bit linear of `model`."""
    from bitsandbytes.functional import dequantize_4bit

    for parent, name, layer in _quantized(model):
        weight = layer.weight
        held = HeldLinear(dequantize_4bit(weight.data, weight.quant_state).to(dtype), layer.bias)  # type: ignore
        setattr(parent, name, held.train(layer.training))


def _quantized(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, its name for the layer, layer) of every 4-bit linear."""
    return [
        (parent, name, layer) for parent in model.modules() for name, layer in parent.named_children()
        if type(layer).__name__ == "Linear4bit" and isinstance(layer, nn.Linear)
    ]


def local_processes() -> int:
    """Processes of the launcher on this machine: DeepSpeed's says LOCAL_SIZE, torch's and Ray's LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)


def available_memory() -> int:
    """Bytes that could be allocated now: the machine's, or the control group's where those are fewer; 0 if unknown."""
    free = 0
    with contextlib.suppress(OSError):
        free = 1024 * _entry(Path("/proc/meminfo"), "MemAvailable:")
    for limit, used, statistics, reclaimable in _GROUPS:
        with contextlib.suppress(OSError, ValueError):  # no such version, or no limit ("max")
            room = int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii"))
            free = min(free, room + _entry(Path(statistics), reclaimable))
    return max(0, free)


def _entry(path: Path, name: str) -> int:
    fields = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return next((int(words[1]) for words in fields if words and words[0] == name), 0)
