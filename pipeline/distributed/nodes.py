"""Several nodes without ssh: every node starts its own processes (SLURM's srun, Kubernetes, two terminals)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from pipeline.config.launch import LaunchConfig
from pipeline.errors import ConfigError, SetupError
from pipeline.files import write_text
from pipeline.run_folder.owner import owned

NODE_RANK_VARIABLES = ("NODE_RANK", "SLURM_NODEID")
"""Where a node reads which of the launch.nodes it is; the first that is set counts."""


def node_rank(launch: LaunchConfig, environment: Mapping[str, str] = os.environ) -> int:
    """Which of the launch.nodes this machine is, from 0.

    Raises:
        SetupError: no variable says so, or it is not below launch.nodes.
    """
    if launch.nodes == 1:
        return 0
    name = next((name for name in NODE_RANK_VARIABLES if environment.get(name)), None)
    if name is None:
        raise SetupError(
            "NODE_RANK", None, f"must say which of the {launch.nodes} nodes this is, from 0",
            f"Start the same command on every node with NODE_RANK=0 to {launch.nodes - 1} before it; srun sets"
            " SLURM_NODEID itself.",
        )
    value = environment[name]
    if not value.isdigit() or int(value) >= launch.nodes:
        raise SetupError(
            name, value, f"must be a number from 0 to {launch.nodes - 1}, as launch.nodes is {launch.nodes}",
            "Number the nodes from 0, or correct launch.nodes.",
        )
    return int(value)


def check_nodes(
    launch: LaunchConfig, stage: str, processes: Literal["all", "one", "none"], shared: Sequence[str]
) -> None:
    """Refuse a stage that starts others, which several nodes cannot share; one process works on any one node.

    Args:
        shared: the stages that all processes share.

    Raises:
        ConfigError, SetupError: where several nodes share a stage, also one that does not know which of them it is.
    """
    if launch.nodes == 1 or processes == "one":
        return
    if processes == "none":
        raise ConfigError(
            "launch.nodes", launch.nodes, f"is for {' and '.join(shared)}, not for {stage}",
            f"Run {stage} with launch.nodes=1 (search spreads over a Ray cluster: set RAY_ADDRESS).",
        )
    node_rank(launch)


@contextmanager
def owned_folders(folders: Sequence[Path], command: str, launch: LaunchConfig | None) -> Iterator[None]:
    """Own folders; together with the other nodes of the same job, where `launch` says that several share them.

    Raises:
        RunFolderError: another command has one of them.
    """
    node, job = 0, ""
    if launch is not None and launch.nodes > 1:
        node, job = node_rank(launch), f"{launch.nodes} nodes at {launch.master_addr}:{launch.master_port}"
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(owned(folder, f"loradrop {command}", node, job))
        yield


def node_arguments(launch: LaunchConfig, run_dir: Path) -> list[str]:
    """The DeepSpeed launcher's arguments for its no-ssh form; writes the hostfile that it wants to read.

    The names in it are never looked up: each node takes the line of its own number.
    """
    hostfile = run_dir / "logs" / f"hostfile.{launch.nodes}x{launch.processes}"
    write_text(hostfile, "".join(f"node{n} slots={launch.processes}\n" for n in range(launch.nodes)))
    return [
        "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node_rank(launch)),
        "--master_addr", str(launch.master_addr),
    ]


def log_name(stage: str, launch: LaunchConfig) -> str:
    """The log of this node: the first has the plain name."""
    rank = node_rank(launch)
    return f"{stage}.log" if rank == 0 else f"{stage}.node{rank}.log"
