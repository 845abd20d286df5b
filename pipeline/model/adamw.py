"""AdamW: PyTorch's, or that of bitsandbytes with 8-bit or paged moments.

The moments of bitsandbytes are kept as they are in a checkpoint, so that a resumed run goes on with the same bits: of a
parameter of 4,096 numbers or more `state1` and `state2` are codes of 8 bits, and `absmax1` and `absmax2` have the scale
of each block of 256; of a smaller one `state1` and `state2` are the fp32 moments, as they are where none has 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.train import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
_OF_BITSANDBYTES = ("state1", "state2", "absmax1", "absmax2")
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


def build_adamw(
    name: Optimizer, groups: list[dict[str, Any]], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer `train.optimizer` over parameter groups, which may have rates of their own."""
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=_BETAS, eps=_EPSILON, weight_decay=weight_decay)
    from bitsandbytes.optim import AdamW, AdamW8bit

    kind = AdamW8bit if name.endswith("8bit") else AdamW
    made: torch.optim.Optimizer = kind(
        groups, lr=learning_rate, betas=_BETAS, eps=_EPSILON, weight_decay=weight_decay,
        is_paged=name.startswith("paged"),
    )
    return made


def moment_names(optimizer: Any) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter; some have only the first two."""
    return _OF_BITSANDBYTES if hasattr(optimizer, "init_state") else MOMENTS


def restore_moments(optimizer: Any, step: int, moments: Mapping[nn.Parameter, Mapping[str, Tensor]]) -> None:
    """Put the moments and the step count of an optimizer of bitsandbytes back, before its first step."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
            state = optimizer.state[parameter]
            state["step"] = step
            for name, value in moments[parameter].items():
                state[name].copy_(value)
