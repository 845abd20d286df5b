"""The processes of a stage together: joining them, and what they agree on.

Every helper works in a world of one, also in one without a process group.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.distributed import lifeline, zero
from pipeline.distributed.launcher import LAUNCHER_VARIABLES, free_port
from pipeline.errors import LoradropError, SetupError


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


def start_world() -> World:
    """Join the process group that the launcher's environment describes; a world of one without a launcher."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = _open_device(local_rank)
    if not torch.distributed.is_initialized():
        zero.join_process_group()
    lifeline.watch_peers()
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device)


def lone_world() -> World:
    """A world of this process alone, without a process group."""
    return World(0, 1, 0, _open_device(0))


def _open_device(local_rank: int) -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        # Its backward pass is NaN where all logits of a query are low, as where all its keys are dropped
        # (pytorch issue 196678, H100 and H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def leave_world() -> None:
    """Leave the process group. A world of one takes its address out of the environment, which children inherit."""
    if not torch.distributed.is_initialized():
        return
    alone = torch.distributed.get_world_size() == 1
    torch.distributed.destroy_process_group()
    for name in LAUNCHER_VARIABLES if alone else ():
        os.environ.pop(name, None)


def sum_over_processes(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum in float64 (float32 on devices without it)."""
    if not torch.distributed.is_initialized():
        return [float(value) for value in values]
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(list(values), dtype=dtype, device=device)
    torch.distributed.all_reduce(total)
    return [float(value) for value in total]


def gather_objects(value: Any) -> list[Any]:
    """Every process's value, in rank order, on every process."""
    if not torch.distributed.is_initialized():
        return [value]
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
    if torch.distributed.is_initialized():
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
