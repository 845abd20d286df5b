"""A script of this folder as both processes of a world of two."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers import ROOT
from pipeline.distributed.launcher import free_port


def two_ranks(script: str, *words: str, timeout: float) -> list[str]:
    """What each of them printed; both have to end well."""
    tests = ROOT / "tests"
    command = [sys.executable, str(tests / "helpers" / script), *words]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tests}"}
    workers = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for r in range(2)
    ]
    texts = [worker.communicate(timeout=timeout)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], texts
    return texts
