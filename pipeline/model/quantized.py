"""Bases that have been quantized before: transformers' own 4-bit checkpoints, in the cache folder.

Quantizing on a CPU takes longer than all else at a start, and every process does it. A checkpoint that transformers
saves of the result is read in a tenth of the time and holds the same bits: packed weights, scales, scales of scales.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.model import ModelConfig
from pipeline.errors import DiskFull, SetupError
from pipeline.fetch import alone, cache_folder
from pipeline.files import manifest_faults, publish_folder, remove_folder
from pipeline.model.kind import MODEL_FAULTS

FOLDER = "quantized"
LEAST_BYTES = 32 * 1024**2
"""Of a base's files: smaller ones are quantized in no time."""
MOST_BYTES = 4 * 1024**3
"""Of one checkpoint, and of all of them together: those used longest ago go first."""
VERSIONS = ("torch", "transformers", "bitsandbytes")


def cached_folder(config: ModelConfig, resolved: str, dtype: torch.dtype, device: torch.device) -> Path | None:
    """Where the quantized base is kept, named by all that it depends on; None for what is not kept.

    Kept are NF4 bases of local folders (and embedded ones), quantized on a CPU, without code of their own. The files of
    a folder are known by name, size and time.
    """
    source = Path(resolved)
    if config.quantization != "nf4" or device.type != "cpu" or config.trust_remote_code or not source.is_dir():
        return None
    files = sorted(path for path in source.iterdir() if path.suffix in (".safetensors", ".bin", ".json"))
    states = [(path.name, status.st_size, status.st_mtime_ns) for path in files for status in (path.stat(),)]
    if not LEAST_BYTES <= sum(size for _, size, _ in states) <= MOST_BYTES:
        return None
    versions = [metadata.version(name) for name in VERSIONS]
    key = json.dumps([str(source.resolve()), states, config.double_quantization, str(dtype), versions])
    return cache_folder() / FOLDER / hashlib.sha256(key.encode()).hexdigest()[:32]


def load_or_quantize(target: Path, read: Callable[[Path], Any], quantize: Callable[[], Any]) -> Any:
    """The model that `read` finds in `target`, or else that of `quantize`, kept there for the next time.

    One process quantizes, the others of the run wait for it. A damaged folder is made again; where nothing can be kept
    every process quantizes for itself.
    """
    if (model := _read(target, read)) is not None:
        return model
    with contextlib.suppress(SetupError), alone(target):
        if (model := _read(target, read)) is None:
            model = quantize()
            _keep(target, model, read)
        return model
    return quantize()


def _read(target: Path, read: Callable[[Path], Any]) -> Any:
    """None where there is no such folder, or a damaged one."""
    if not target.is_dir() or manifest_faults(target):
        return None
    with contextlib.suppress(OSError):  # the time of its last use; a cache may be read-only
        os.utime(target)
    try:
        return read(target)
    except MODEL_FAULTS:  # removed meanwhile
        return None


def _keep(target: Path, model: Any, read: Callable[[Path], Any]) -> None:
    """Save the model, and read it again: a family whose checkpoint does not give back the same bits is not kept."""
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with contextlib.suppress(DiskFull, NotImplementedError, RuntimeError, *MODEL_FAULTS):
        _make_room(target.parent, MOST_BYTES - size)
        publish_folder(target, model.save_pretrained, needed=2 * size)
        again = _read(target, read)
        if again is None or not same_bits(model, again):
            remove_folder(target)


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters, buffers and quantization states."""
    first, second = _tensors(one), _tensors(other)
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return found


def _make_room(folder: Path, most: int) -> None:
    """Remove the checkpoints used longest ago until the others take at most so many bytes. A process that reads one has
    it open."""
    kept = sorted((path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")),
                  key=lambda path: path.stat().st_mtime, reverse=True)
    for path in kept:
        most -= sum(file.stat().st_size for file in path.iterdir())
        if most < 0:
            shutil.rmtree(path)
