"""What ZeRO-3 asks of the model: one precision, an output head outside, and passes in lockstep.

Under ZeRO-3 every module gathers its parameters when it is called, a collective of all processes. So all processes
must call the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

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


def sharding_text(model: nn.Module, world_size: int) -> str:
    """For people: what each process holds of the base at rest, and what of it is whole in each."""
    state = [tensor for parameter in model.parameters() for tensor in _quantization_constants(parameter)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = _megabytes(list(head.parameters()) if head is not None else [])
    sharded = sum(distributed.numel(p) * p.element_size() for p in model.parameters()) / 1e6
    return (
        f"{sharded:.1f} MB in {world_size} shards; whole in every process: output head {whole:.1f} MB,"
        f" quantization constants {_megabytes(state):.1f} MB"
    )


def _quantization_constants(parameter: nn.Parameter) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    second = getattr(state, "state2", None)
    found = [getattr(state, "absmax", None), getattr(second, "absmax", None)]
    return [tensor for tensor in found if tensor is not None]


def _megabytes(tensors: Sequence[Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def lockstep(chunks: Sequence[list[int]], model: nn.Module) -> Iterator[tuple[list[int], bool]]:
    """Each chunk and whether it counts; under ZeRO-3, the last one again until all processes had as many.

    Forward passes of a sharded model are collectives: a process that has fewer chunks keeps the others company.
    """
    # Asked before the first pass: later some processes would ask while others still run theirs.
    most = distributed.largest(len(chunks)) if distributed.is_sharded(model) else len(chunks)
    yield from ((chunk, True) for chunk in chunks)
    for _ in range(most - len(chunks)):
        yield chunks[-1], False
