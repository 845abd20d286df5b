"""`sglang`: rules of `sglang/srt/lora/lora.py`, `lora_config.py` and `mem_pool.py`.

Its loader multiplies by lora_alpha / r whatever else adapter_config.json says, and stacks q with v and gate with up: so
rsLoRA and patterns are folded, and half a pair is refused. --lora-strict-loading makes an error of what is skipped.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from pipeline.config.adapter import SERVED_RANKS
from pipeline.export.engines.rules import Engine, common_notes, member_notes

VERSION = "0.5.23"


def command(base: str, rank: int, folders: Mapping[str, str], quantization: str) -> list[str]:
    """How it is served."""
    named = " ".join(shlex.quote(f"{name}={folder}") for name, folder in folders.items())
    quantized = " --quantization bitsandbytes" if quantization == "nf4" else ""
    return [
        *common_notes("SGLang", VERSION, base, quantization), *member_notes(folders),
        "# Run in the folder of the export.",
        f"python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank {rank} --lora-strict-loading"
        f" --max-loras-per-batch {len(folders) + 1} --lora-paths {named}{quantized}",
        '# A request names its adapter: "model": "BASE:adapter", or "lora_path": "adapter" at /generate.',
    ]


ENGINE = Engine(
    "sglang", "SGLang", VERSION, SERVED_RANKS, (("q_proj", "v_proj"), ("gate_proj", "up_proj")), command,
)  # fmt: skip
