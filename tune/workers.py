"""A trial of several processes: a TorchTrainer starts them, and they meet as the processes of a training do.

Ray's own way, torch's store on every interface, would let anyone who reaches the machine into the group.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ray.train._internal.utils import get_address_and_port
from ray.train.torch.config import TorchConfig, _set_torch_distributed_env_vars, _TorchBackend


@dataclass
class OwnRendezvous(TorchConfig):
    """Tells the processes who and where they are; the group is made by `train_run` (pipeline/distributed/world)."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray calls when the processes have started."""
        return _OwnRendezvousBackend


class _OwnRendezvousBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_tell, address, port)


def _tell(address: str, port: int) -> None:
    """In a worker: the environment that `start_world` reads."""
    _set_torch_distributed_env_vars()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
