"""What stands above the table: date, versions, the machine, and whether anything else runs on it."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.setting import Setting
from pipeline.distributed.devices import machine_memory

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")
QUIET = 0.3
"""Load average of the last minute from which on the machine does not count as quiet."""


def facts(setting: Setting, scale: str) -> dict[str, Any]:
    """For JSON; `scale`: the name of the setting's. The load average is that of now: ask before measuring."""
    import torch

    processor = _processor()
    known = (processor.get("flags") or processor.get("Features") or "").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": setting.here.name,
        "against": None if setting.against is None else setting.against.name,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {
            "processor": processor.get("model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "flags": [flag for flag in FLAGS if flag in known],
            "memory_gib": round(machine_memory() / 2**30, 1),
            "device": torch.cuda.get_device_name() if setting.device.startswith("cuda") else "cpu",
        },
        "load_average": list(os.getloadavg()),
        "quiet": os.getloadavg()[0] < QUIET,
        "clock": setting.clock,
        "scale": scale,
        "overrides": list(setting.overrides),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    machine, load = found["machine"], found["load_average"]
    said = [
        f"{found['date']}, commit {found['commit']}" + (f", against {found['against']}" if found["against"] else ""),
        ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads,"
        f" {', '.join(machine['flags']) or 'no known flags'}, {machine['memory_gib']} GiB, {machine['device']}",
        f"load average at the start {', '.join(f'{one:.2f}' for one in load)}"
        + ("" if found["quiet"] else ": NOT A QUIET MACHINE, these figures decide nothing"),
    ]
    if found["clock"] == "cpu":
        said.append("times of works in this process are processor time on all its threads, not what a clock says")
    if found["scale"] != "full" or found["overrides"]:
        given = " ".join([f"scale {found['scale']}", *found["overrides"]])
        said.append(f"{given}: not what the targets are for")
    return said


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> dict[str, str]:
    """The first processor's fields; empty where the system has no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
