"""The only importer of torch.distributed and deepspeed. Every helper works in a world of one."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import lifeline
from pipeline.errors import LoradropError, SetupError
from pipeline.launch import LAUNCHER_VARIABLES, free_port


@dataclass(frozen=True)
class World:
    """This process among all."""

    process_rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.process_rank == 0


def start() -> World:
    """Join the process group that the launcher's environment describes; a world of one without a launcher."""
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        # Its backward pass is NaN where all logits of a query are low, as where all its keys are dropped
        # (pytorch issue 196678, H100 and H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
    if not torch.distributed.is_initialized():
        _leave_out_shared_memory_op()
        # Longer than DeepSpeed's 10 minutes: loading differs among nodes, and the lifeline sees who is dead.
        minutes = int(os.environ.get("DEEPSPEED_TIMEOUT", "60"))
        deepspeed.init_distributed(verbose=False, timeout=timedelta(minutes=minutes))
    lifeline.watch_peers()
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device)


def _leave_out_shared_memory_op() -> None:
    """Keep DeepSpeed's shared-memory all-reduce for CPUs out.

    Only its inference engine calls it; it is compiled at the first start (25 s, and again for each environment that
    shares the user's cache), and every run would leave 69 MB per process behind in /dev/shm.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def stop() -> None:
    """Leave the process group. A world of one takes its address out of the environment, which children inherit."""
    if not torch.distributed.is_initialized():
        return
    alone = torch.distributed.get_world_size() == 1
    torch.distributed.destroy_process_group()
    for name in LAUNCHER_VARIABLES if alone else ():
        os.environ.pop(name, None)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum in float64 (float32 on devices without it)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total]


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in rank order, on every process."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered


def largest(value: int) -> int:
    """The largest value of any process."""
    return max(gather_objects(value))


def agree(flag: bool, device: torch.device) -> bool:
    """True on all processes where any of them says so."""
    return sum_over_processes([float(flag)], device)[0] > 0


def barrier() -> None:
    """Wait for all processes."""
    torch.distributed.barrier()


def require_equal(what: str, value: str) -> None:
    """Fail on every process where processes hold different values of `what`."""
    values = gather_objects(value)
    if len(set(values)) > 1:
        raise LoradropError(f"processes disagree about {what}: {dict(enumerate(values))}; start all of them alike")


def require_shared_folder(folder: Path) -> None:
    """Fail on every process where some cannot see a file that the main process has just written into `folder`.

    Raises:
        SetupError: naming the hosts that see another folder of that name.
    """
    token = gather_objects(secrets.token_hex(8))[0]
    mark = folder / f".shared_{token}"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier()
    seen = gather_objects((socket.gethostname(), mark.exists()))
    if torch.distributed.get_rank() == 0:
        mark.unlink()
    blind = sorted({host for host, sees in seen if not sees})
    if blind:
        raise SetupError(
            "--run-dir", str(folder), f"is not the same folder on {', '.join(blind)}",
            "Give a folder on a file system that all nodes share.",
        )


def build_engine(model: nn.Module, groups: list[dict[str, Any]], ds_config: dict[str, Any], weight_decay: float) -> Any:
    """DeepSpeed engine with torch's AdamW over `groups` (own learning rates, no DeepSpeed scheduler)."""
    import deepspeed

    optimizer = torch.optim.AdamW(groups, lr=groups[0]["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
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
    """`exp_avg` or `exp_avg_sq` of a parameter; None before the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        value = safe_get_full_optimizer_state(parameter, name)
    else:  # ZeRO-0 keeps the plain torch optimizer
        value = engine.optimizer.state.get(parameter, {}).get(name)
    return None if value is None else value.detach().to("cpu", torch.float32).reshape(_shape(parameter)).clone()


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
