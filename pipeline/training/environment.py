"""What a run ran on, recorded beside its results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from pipeline.config import extensions

PACKAGES = ("loradrop", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "datasets", "ray", "numpy")


def describe_environment(base: dict[str, Any], data_fingerprint: str, world_size: int) -> dict[str, Any]:
    """Versions, machine, base model and data identity, as plain values."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: version for name in PACKAGES if (version := _version(name))} | extensions.packages(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "threads_per_process": torch.get_num_threads(),
        "processes": world_size,
        "base_model": base,
        "data_fingerprint": data_fingerprint,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
