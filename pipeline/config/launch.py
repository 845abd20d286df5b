"""The processes of a stage, and where a run's numbers go beside metrics.jsonl."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Line, Name, NonNegative, Positive, Section


class WandbConfig(Section):
    """Weights & Biases."""

    project: Line = "loradrop"
    """Project that the run appears in."""
    name: Line | None = None
    """Name of the run; None = that of the run folder."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes into the run folder, for `wandb sync` later: for nodes without a network."""


class LoggingConfig(Section):
    """metrics.jsonl is always written; the main process alone writes to what is switched on here."""

    tensorboard: bool = False
    """Event files in the run folder's tensorboard/. Needs `pip install tensorboard`."""
    wandb: WandbConfig | None = None
    """Weights & Biases, e.g. `logging.wandb.project=mine`. Needs `pip install wandb` and, online, `wandb login`."""


class LaunchConfig(Section):
    """Processes of the stages that work in several: training and evaluation."""

    processes: NonNegative = 0
    """Per node; 0 = one per accelerator, or one per core up to 2 on a CPU-only machine."""
    hostfile: Name | None = None
    """DeepSpeed hostfile, a line `NAME slots=PROCESSES` per node: they are reached by ssh from here."""
    nodes: Positive = 1
    """Nodes that each start the same command themselves, without ssh, with NODE_RANK (or SLURM_NODEID) saying which
    they are. Needs launch.processes, launch.master_addr and launch.master_port."""
    master_addr: Name | None = None
    """Address of the first node as the others reach it; with `hostfile` by itself the one that ssh reaches it by."""
    master_port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Rendezvous port; 0 = a free one."""
    warning_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = "SIGUSR1"
    """Asks to save and stop, as SIGTERM and SIGINT do. SLURM's `--signal=USR1@120` sends it 120 s ahead of the end."""
    grace_seconds: Annotated[float, Field(ge=0.0, le=25.0)] = 10.0
    """After the failure of one process the others may finish a save for so long. DeepSpeed's launcher kills at 30."""
    restarts: NonNegative = 0
    """Starts after a crash, each from the newest checkpoint. An error with a message for the user is no crash."""

    @model_validator(mode="after")
    def _check_nodes(self) -> LaunchConfig:
        if self.nodes == 1:  # an address left over from a training on several nodes says nothing
            return self
        if self.hostfile is not None:
            raise ValueError("launch.hostfile is for ssh and launch.nodes for nodes that start themselves: set one")
        missing = [name for name in ("processes", "master_addr", "master_port") if not getattr(self, name)]
        if missing:
            named = ", ".join(f"launch.{name}" for name in missing)
            raise ValueError(f"launch.nodes = {self.nodes} needs {named} too, the same on every node")
        return self
