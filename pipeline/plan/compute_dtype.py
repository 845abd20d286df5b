"""`model.compute_dtype: auto` on CPUs: measured once per machine, decided before anything starts, and then kept.

All processes of a run, its later stages and its continuation on another machine compute in one precision, so what is
decided becomes a value of the configuration. A folder that exists has decided. On accelerators `auto` stays: the device
that trains answers, which need not be in this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.load import read_yaml
from pipeline.distributed.launcher import has_accelerator, launcher_environment
from pipeline.errors import DiskFull, RunFolderError, UserError
from pipeline.fetch import cache_folder
from pipeline.files import read_json, write_json
from pipeline.model.kind import base_sizes
from pipeline.terminal import say

DTYPES = ("auto", "float32", "bfloat16", "float16")
WIN = 1.15
"""float32's time over bfloat16's from which on bfloat16 is taken."""
USUAL_SIZES = (576, 1536)
"""Hidden and MLP size where the base's are not at hand yet: those of the embedded default."""
LARGEST = (8, 32, 1024, 2048)
"""Rows, tokens of each, hidden and MLP size up to which passes are timed: under a second, and the ratio of larger ones
is that of these."""
LEAST_WORK = 2**25
"""Tokens × hidden × MLP size of a pass below which its products are not what takes time: float32, unmeasured."""
PATIENCE = 120.0
"""Seconds until a measurement counts as failed, on a machine however busy."""
SCRIPT = Path(__file__).parents[1] / "model" / "measure_dtype.py"


def with_compute_dtype(config: RunConfig, folders: Sequence[Path]) -> RunConfig:
    """`config` with what its `auto` stands for on this machine's CPUs.

    Args:
        folders: what the stage writes into; a configuration saved there has decided before.
    """
    if config.model.compute_dtype != "auto" or has_accelerator() or config.launch.nodes > 1:
        return config  # nodes that start themselves could measure differently
    chosen = saved_choice(folders) or measured_choice(config)
    return config.model_copy(update={"model": config.model.model_copy(update={"compute_dtype": chosen})})


def saved_choice(folders: Sequence[Path]) -> str | None:
    """What the first configuration found in `folders` says; None where there is none that can be read."""
    for path in (folder / name for folder in folders for name in ("requested.yaml", "config.yaml")):
        with contextlib.suppress(UserError, OSError):
            model = read_yaml(path).get("model") if path.is_file() else None
            if isinstance(model, dict) and (found := model.get("compute_dtype")) in DTYPES:
                return str(found)
    return None


def measured_choice(config: RunConfig) -> str:
    """bfloat16 where a layer's training pass in the run's shapes is `WIN` times as fast as in float32, else float32.

    A whole step gains less: on two cores with AVX512-BF16 a layer of SmolLM2-135M 1.9 ×, its training pass 1.3 ×.
    """
    shapes, threads = pass_shapes(config), launcher_environment(config.launch).get("OMP_NUM_THREADS", "1")
    if math.prod(shapes) < LEAST_WORK:
        return "float32"
    seconds = measured_seconds(shapes, threads)
    if seconds is None:
        return "float32"
    ratio = seconds["float32"] / seconds["bfloat16"]
    chosen = "bfloat16" if ratio >= WIN else "float32"
    say(f"model.compute_dtype auto -> {chosen}: in bfloat16 this CPU trains a layer of the base {ratio:.2f} × as fast"
        " as in float32")
    return chosen


def pass_shapes(config: RunConfig) -> tuple[int, ...]:
    """(rows, tokens of each, hidden size, MLP size) of a training pass, as powers of two. Rows fill half of
    data.max_tokens, which cuts off the longest."""
    train, length = config.train, max(1, config.data.max_tokens // 2)
    rows = train.micro_batch if train.micro_tokens is None else max(1, train.micro_tokens // length)
    sizes = (rows, length, *(base_sizes(config.model) or USUAL_SIZES))
    return tuple(min(2 ** round(math.log2(size)), most) for size, most in zip(sizes, LARGEST, strict=True))


def measured_seconds(shapes: Sequence[int], threads: str) -> dict[str, float] | None:
    """dtype -> seconds, from the cache or the processor; None where they cannot be had."""
    key = json.dumps([_processor(), metadata.version("torch"), threads, *shapes])
    kept = cache_folder() / "compute_dtype" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(RunFolderError):
        if found := _seconds_in(read_json(kept)):
            return found
    command = [sys.executable, "-P", str(SCRIPT), *map(str, shapes)]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=PATIENCE, check=True)
        seconds = _seconds_in(json.loads(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        say(f"model.compute_dtype auto -> float32: bfloat16 could not be timed ({str(error).splitlines()[0][:160]})")
        return None
    if seconds is not None:
        with contextlib.suppress(OSError, DiskFull):  # measured again the next time; what was chosen is in the folder
            write_json(kept, seconds)
    return seconds


def _seconds_in(read: Any) -> dict[str, float] | None:
    """What a measurement or a file of the cache says; None where it is none."""
    names = ("float32", "bfloat16")
    if not isinstance(read, dict) or not all(isinstance(read.get(n), float) and 0 < read[n] < 1e6 for n in names):
        return None
    return {name: read[name] for name in names}


def _processor() -> str:
    """Model and instructions of the processor: virtual machines hide some of a model's."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        own = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
        return "\n".join(dict.fromkeys(own))
    return f"{platform.machine()} {platform.processor()}"
