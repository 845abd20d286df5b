"""`python -m tune.probe FILE`: whether Ray starts on this machine as a search starts it, runs a task and ends.

For `loradrop doctor`, which reads the exit code; FILE, where others write more, stays unwritten.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipeline import EXIT_OK
from tune.cluster import CONTROLLER_CPUS, NOISE, cluster
from tune.stopping import Stopping

SECONDS = 120.0
"""For one task: its process imports Ray."""


def main() -> int:
    """Raises what Ray raises."""
    with tempfile.TemporaryDirectory(prefix="loradrop-") as folder, cluster(Path(folder) / ".ray", Stopping()):
        import ray

        doubled = ray.remote(num_cpus=CONTROLLER_CPUS)(lambda number: 2 * number)
        if ray.get(doubled.remote(21), timeout=SECONDS) != 42:
            raise RuntimeError(f"a task gave another answer; see {NOISE}")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
