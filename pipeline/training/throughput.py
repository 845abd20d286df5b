"""How much of a step was work: padding, memory, and the share of the device's peak.

Operations per token of LoRA on a frozen dense base with N weights in its linear layers and n in the adapter:

    model     = 2N forward + 2N backward (gradients of activations; the base has none of its weights) + 6n
    hardware  = model + 2N + 2n where the forward pass is recomputed (activation checkpointing)

The output head counts 4 · its weights per supervised token: it sees no others. Attention scores (4 · T · D per token
and layer forward, twice that backward) and dequantization are left out, padding and filler rows too: MFU counts what
had to be done. So is the forward without gradient of a consistency term.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import is_linear, linear_shape
from pipeline.distributed.devices import peak_flops, resident_high_water

GIB = 1024**3


@dataclass(frozen=True)
class Work:
    """Weights that take part in a pass."""

    base: int
    """N, in linear layers other than the output head."""
    adapter: int
    """n, everything that is trained."""
    head: int
    """Weights of the output head (0 for a classifier, whose head is trained)."""
    recomputed: bool
    """Activation checkpointing."""

    def model_flops(self, tokens: float, supervised: float) -> float:
        """Operations that the step needs."""
        return (4 * self.base + 6 * self.adapter) * tokens + 4 * self.head * supervised

    def hardware_flops(self, tokens: float, supervised: float) -> float:
        """Operations that are done, recomputation included."""
        again = 2 * (self.base + self.adapter) * tokens if self.recomputed else 0.0
        return self.model_flops(tokens, supervised) + again


def work_of(base: nn.Module, trained: int, recomputed: bool) -> Work:
    """What takes part in a pass of a base model with an adapter of `trained` numbers."""
    head = getattr(base, "get_output_embeddings", lambda: None)()
    linears = [module for module in base.modules() if is_linear(module) and module is not head]
    return Work(
        base=sum(math.prod(linear_shape(linear)) for linear in linears),
        adapter=trained,
        head=math.prod(linear_shape(head)) if head is not None else 0,
        recomputed=recomputed,
    )


class Meter:
    """Counts the rows of one process's step."""

    def __init__(self, work: Work, device: torch.device, compute_dtype: str) -> None:
        self._work, self._device = work, device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self._peak = peak_flops(name, compute_dtype)
        self._rows: list[tuple[int, Tensor, Tensor]] = []

    def add(self, tensors: dict[str, Tensor], weights: Tensor) -> None:
        """Note the rows of one micro-batch. Nothing is read from the device yet."""
        rows = tensors.get("token_rows")  # of rows laid end to end
        kept = (weights > 0).unsqueeze(1) if rows is None else weights[rows] > 0
        real = (tensors["attention_mask"].bool() & kept).sum()
        supervised = ((tensors["labels"] >= 0) & kept).sum()
        self._rows.append((tensors["input_ids"].numel(), real, supervised))

    def clear(self) -> None:
        """Counting starts anew."""
        self._rows.clear()

    def read(self, seconds: float) -> dict[str, float | None]:
        """The numbers of the step that took `seconds`; counting starts anew.

        padding_share: positions of this process without a token that counts, as all layers but attention see them:
        attention sorts rows that are laid end to end into padded ones of similar length, which are not counted.
        memory_gib: the most that this process
        has held since its start, GiB: of an accelerator what torch has allocated there (without the CUDA context, and
        without what its allocator keeps free); without one all that was resident, imports, loading, validation and the
        free blocks in the C library's heap included. mfu, hfu: None where the peak is not known.
        """
        positions = sum(size for size, _, _ in self._rows)
        real = float(sum(int(count) for _, count, _ in self._rows))
        supervised = float(sum(int(count) for _, _, count in self._rows))
        self.clear()
        available = self._peak * seconds if self._peak else None
        return {
            "padding_share": round(1.0 - real / positions, 4) if positions else None,
            "memory_gib": round(self._memory() / GIB, 3),
            "mfu": round(self._work.model_flops(real, supervised) / available, 4) if available else None,
            "hfu": round(self._work.hardware_flops(real, supervised) / available, 4) if available else None,
        }

    def _memory(self) -> int:
        on_device = self._device.type == "cuda"
        return torch.cuda.max_memory_allocated(self._device) if on_device else resident_high_water()
