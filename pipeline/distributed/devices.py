"""What machines have: peak rates of accelerators, and memory. No torch: --dry-run and the launcher ask, too."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pipeline.errors import ConfigError

PEAK_TFLOPS: dict[str, float] = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}
"""Part of the device's name -> dense bfloat16 and float16 tensor TFLOP/s, float32 accumulation, without sparsity:
the vendors' product data sheets (where these print the rate with sparsity, half of it). The first match wins."""
PEAK_TFLOPS_FLOAT16: dict[str, float] = {"V100 PCIE": 112.0, "V100": 125.0, "T4": 65.0}
"""Devices without bfloat16."""


def peak_flops(device_name: str, compute_dtype: str) -> float | None:
    """Operations per second of the device in this precision; None where no data sheet is at hand."""
    tables = {"bfloat16": PEAK_TFLOPS, "float16": {**PEAK_TFLOPS, **PEAK_TFLOPS_FLOAT16}}
    for part, teraflops in tables.get(compute_dtype, {}).items():
        if f" {part} " in f" {device_name.replace('-', ' ')} ":
            return teraflops * 1e12
    return None


def resident_high_water() -> int:
    """Bytes: the most memory this process has had resident since it was started.

    Linux: VmHWM, which a new program starts at 0; `ru_maxrss` would be inherited from the process that forked it.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine_memory() -> int:
    """Bytes of main memory that may be used: the machine's, or the control group's limit where it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def accelerator_memory() -> list[tuple[str, int]]:
    """(name, bytes) of every NVIDIA device as nvidia-smi lists them; none without it."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    fields = [line.rpartition(",") for line in answer.splitlines() if "," in line]
    return [(name.strip(), int(mib) * 1024**2) for name, _, mib in fields if mib.strip().isdigit()]


def visible_devices() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names; empty where it is not set, or names nothing."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def check_processes(processes: int) -> None:
    """Refuse more processes on this machine than NVIDIA devices that are visible; without any, CPUs are shared.

    Raises:
        ConfigError: NCCL does not let two processes use one device; or devices are not named by number.
    """
    devices, visible = len(accelerator_memory()), visible_devices()
    if devices and not all(name.isdigit() for name in visible):
        constraint = "must be numbers: DeepSpeed's launcher reads no UUIDs"
        raise ConfigError("CUDA_VISIBLE_DEVICES", ",".join(visible), constraint, "Give the indices of nvidia-smi -L.")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        devices = min(devices, len(visible))
    if 0 < devices < processes:
        gpus = f"{devices} visible GPU{'s' if devices > 1 else ''}"
        constraint = f"must not exceed the {gpus}: processes cannot share one"
        raise ConfigError("launch.processes", processes, constraint, "Leave it at 0: one process per visible GPU.")
