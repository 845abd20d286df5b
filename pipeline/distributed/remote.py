"""`python -m pipeline.distributed.remote`: a node of several that were reached by ssh (`distributed/hosts`).

It does for its node what the command does for its own machine: DeepSpeed's launcher gets no signals, ends with the
connection (as when the command was killed), and a rank that was killed is recorded, so that its peers leave.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from pipeline.distributed import ranks
from pipeline.distributed.lifeline import GRACE, WARNING, stop_signals
from pipeline.distributed.nodes import NODE_RANK_VARIABLES


def main(words: Sequence[str]) -> int:
    """Run DeepSpeed's launcher of this node; its exit code.

    Args:
        words: number of the node; JSON of host -> its processes, in order; where all meet: address, port; run folder;
            the module that is run, and its words.
    """
    node, world, address, port, folder, *program = words
    run_dir, patience = Path(folder), float(os.environ.get(GRACE, 10.0)) + ranks.LEAVING_SECONDS
    processes = len(list(json.loads(world).values())[int(node)])
    os.environ[NODE_RANK_VARIABLES[0]] = node  # several may be one machine
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    ranks.wait_for_orphans(run_dir, patience)
    ranks.clear(run_dir)
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals(os.environ.get(WARNING)))  # a rank opens itself to them
    coded = base64.urlsafe_b64encode(world.encode()).decode()
    command = [
        sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={coded}", f"--node_rank={node}",
        f"--master_addr={address}", f"--master_port={port}", "--module", *program, "--run-dir", folder,
    ]  # fmt: skip
    launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_connection, args=(launcher,), daemon=True).start()
    code = launcher.wait()
    if code:
        ranks.record_lost(run_dir)
    return code & 255


def _end_with_connection(launcher: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):  # nobody writes: it ends with the connection
        pass
    launcher.kill()  # the ranks notice, save and leave (lifeline)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
