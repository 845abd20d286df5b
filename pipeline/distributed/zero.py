"""All that names DeepSpeed: the process group, the engine, whole values of what ZeRO keeps in parts, ZeRO-3's demands.

Under ZeRO-3 every module gathers its parameters when it is called, a collective of all processes. So all processes
must call the same modules in the same order, the parameters have one precision, and the output head stays outside.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.distributed.rendezvous import MEETING_PLACE
from pipeline.errors import LoradropError


def join_process_group() -> None:
    """torch's process group as DeepSpeed makes it, from the launcher's environment, on the address that it names.

    DeepSpeed's shared-memory all-reduce for CPUs is kept out. Only its inference engine calls it; it is compiled at the
    first start (25 s, and again for each environment that shares the user's cache), and every run would leave 69 MB per
    process behind in /dev/shm.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Longer than DeepSpeed's 10 minutes: loading differs among nodes, and the lifeline sees who is dead.
    minutes = int(os.environ.get("DEEPSPEED_TIMEOUT", "60"))
    deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=minutes), init_method=MEETING_PLACE)


def build_engine(model: nn.Module, optimizer: torch.optim.Optimizer, ds_config: dict[str, Any]) -> Any:
    """DeepSpeed engine around an optimizer of the run's (with its own learning rates: no DeepSpeed scheduler)."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return engine


def is_sharded(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters: then every forward pass is a collective of all processes."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, sharded or not."""
    return int(_shape(parameter).numel())


def full_fp32(parameter: nn.Parameter) -> torch.Tensor:
    """The whole fp32 value of a trained parameter, whatever the ZeRO stage (a collective under ZeRO)."""
    from deepspeed.utils import safe_get_full_fp32_param

    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        value = safe_get_full_fp32_param(parameter)
        if value is not None:
            return value.detach().to("cpu", torch.float32).reshape(_shape(parameter)).clone()
    return parameter.detach().to("cpu", torch.float32).clone()


def full_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """The whole reduced gradient between the last backward pass and the step (a collective under ZeRO)."""
    value = parameter.grad
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_grad

        value = safe_get_full_grad(parameter)
    return None if value is None else value.detach()


def squared_gradient_norm(engine: Any) -> float:
    """This process's addend of the squared global gradient norm, after the last backward pass, before the step.

    Summed over processes it is the square of the norm before clipping. Under ZeRO a process holds the reduced
    gradients of its own partition only; under ZeRO-0 all of them, of which it counts its share.
    """
    parts: list[torch.Tensor] = []
    for group in (getattr(engine.optimizer, "averaged_gradients", None) or {}).values():
        parts += [group] if isinstance(group, torch.Tensor) else [part for part in group or () if part is not None]
    for group in engine.optimizer.param_groups:  # ZeRO-0, and partitions that are offloaded
        parts += [parameter.grad for parameter in group["params"] if parameter.grad is not None]
    if not parts:  # ZeRO-3 with an offloaded optimizer
        flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())
        parts = [flat.grad for flat in flats if flat.grad is not None]
    norms = [norm.double() for norm in torch._foreach_norm(parts)] if parts else []
    squares = sum(float(total) for total in _sums_of_squares(norms))
    return squares / torch.distributed.get_world_size() if _is_plain(engine) else squares


def _sums_of_squares(norms: list[torch.Tensor]) -> list[torch.Tensor]:
    """One number per device."""
    devices = {norm.device for norm in norms}
    return [torch.stack([norm for norm in norms if norm.device == device]).square().sum() for device in devices]


def full_moment(engine: Any, parameter: nn.Parameter, name: str) -> torch.Tensor | None:
    """`exp_avg` or `exp_avg_sq` of a parameter, or what else a plain optimizer keeps; None before the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if not hasattr(parameter, "_hp_mapping") and not hasattr(parameter, "ds_id"):  # ZeRO-0 keeps the plain optimizer
        value = engine.optimizer.state.get(parameter, {}).get(name)
        return None if value is None else value.detach().to("cpu").clone()
    _link_moments(engine, parameter, name)
    value = safe_get_full_optimizer_state(parameter, name)
    return None if value is None else value.detach().to("cpu", torch.float32).reshape(_shape(parameter)).clone()


def _link_moments(engine: Any, parameter: nn.Parameter, name: str) -> None:
    """Under ZeRO-1 and 2 DeepSpeed finds parameters their moments when the first group has stepped, and others have
    none yet: with LoRA+, lora_B."""
    optimizer, mapping = engine.optimizer, getattr(parameter, "_hp_mapping", None)
    linked = getattr(optimizer, "_hp_optimizer_states_linked", False)
    if linked and mapping is not None and name not in (mapping.optim_fragment or {}):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def set_full_fp32(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Overwrite a parameter and its fp32 master."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        safe_set_local_fp32_param(parameter, _own_part(parameter, value))
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value.to(parameter.device).reshape(_shape(parameter)))
    with _whole(parameter), torch.no_grad():  # the master alone would reach the parameter with the next step only
        parameter.copy_(value)


def _own_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's part under ZeRO-3, padded: DeepSpeed's own cut fails where sizes do not divide by processes."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    flat = value.flatten()
    padded = torch.nn.functional.pad(flat, (0, size * torch.distributed.get_world_size() - flat.numel()))
    return padded.narrow(0, size * torch.distributed.get_rank(), size)


def _whole(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """Within the block a sharded parameter is whole; what the main process writes to it is kept (a collective)."""
    import deepspeed

    sharded = hasattr(parameter, "ds_id")
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if sharded else nullcontext()


def restore_moments(engine: Any, step: int, moments: dict[nn.Parameter, dict[str, torch.Tensor]]) -> None:
    """Put AdamW's moments and step count back, before the first step of a resumed engine.

    DeepSpeed creates the inner optimizer's state lazily; here it is created first, then filled fragment by fragment.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    inner = getattr(engine.optimizer, "optimizer", None)
    if inner is None or _is_plain(engine):  # ZeRO-0 keeps the plain torch optimizer
        for parameter, values in moments.items():
            state = {"step": torch.tensor(float(step))}
            state.update(
                {name: value.to(parameter.device).view_as(parameter).clone() for name, value in values.items()}
            )
            engine.optimizer.state[parameter] = state
        return
    flats = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if flats is None:
        flats = [parameter for group in inner.param_groups for parameter in group["params"]]
    for flat in flats:
        inner.state[flat] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.zeros_like(flat.data),
            "exp_avg_sq": torch.zeros_like(flat.data),
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for parameter, values in moments.items():
        for name, value in values.items():
            if hasattr(parameter, "ds_id"):
                safe_set_local_optimizer_state(parameter, _own_part(parameter, value), name)
            else:
                safe_set_full_optimizer_state(parameter, value.to(parameter.device).reshape(_shape(parameter)), name)


def _is_plain(engine: Any) -> bool:
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


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
    sharded = sum(numel(p) * p.element_size() for p in model.parameters()) / 1e6
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
