"""What ZeRO-3 asks of the model: one precision, an output head outside, and passes in lockstep.

Under ZeRO-3 every module gathers its parameters when it is called, a collective of all processes. So all processes
must call the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from pipeline import distributed
from pipeline.errors import LoradropError


def leave_head_outside(model: nn.Module) -> list[str]:
    """Take the output head, and the embedding it is tied to, out of the module tree; returns their names.

    They are called as before but stay whole in every process: the loss calls the head once per chunk of supervised
    tokens, and processes have different numbers of those.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return []
    weights = {id(parameter) for parameter in head.parameters()}
    names = [
        name
        for name, module in model.named_modules()
        if any(id(parameter) in weights for parameter in module.parameters(recurse=False))
    ]
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        parent.__dict__[leaf] = parent._modules.pop(leaf)  # found as an attribute, not as a submodule
    return names


def require_one_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """ZeRO-3's flat buffers hold one precision, and the engine casts what differs: fatal for packed 4-bit weights.

    Raises:
        LoradropError: names a parameter that lies in another precision and cannot be cast.
    """
    for name, parameter in model.named_parameters():
        packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if packed and parameter.dtype != dtype:
            fault = f"ZeRO-3 needs {name} stored as {dtype}, not {parameter.dtype}"
            raise LoradropError(f"{fault}; set train.deepspeed=zero2")


def lockstep(chunks: Sequence[list[int]], model: nn.Module) -> Iterator[tuple[list[int], bool]]:
    """Each chunk and whether it counts; under ZeRO-3, the last one again until all processes had as many.

    Forward passes of a sharded model are collectives: a process that has fewer chunks keeps the others company.
    """
    yield from ((chunk, True) for chunk in chunks)
    if distributed.is_sharded(model):
        for _ in range(distributed.largest(len(chunks)) - len(chunks)):
            yield chunks[-1], False
