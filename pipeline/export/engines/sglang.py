"""`sglang`: rules of `sglang/srt/lora/lora.py`, `lora_config.py` and `mem_pool.py`.

Its loader multiplies by lora_alpha / r whatever else adapter_config.json says, and stacks q with v and gate with up: so
rsLoRA and patterns are folded, and half a pair is refused. --lora-strict-loading makes an error of what is skipped.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from pipeline.config.adapter import SERVED_RANKS
from pipeline.export.engines.rules import Engine
from pipeline.model.load import BaseIdentity

VERSION = "0.5.23"


def command(base: str, rank: int, names: Sequence[str], identity: BaseIdentity) -> str:
    """A request names its adapter: "model": "BASE:adapter", or "lora_path": "adapter" at /generate."""
    named = " ".join(f"{name}={name}" for name in names)
    revision = f" --revision {identity.revision}" if identity.revision and base != "BASE" else ""
    quantized = " --quantization bitsandbytes" if identity.quantization == "nf4" else ""
    return (
        f"python -m sglang.launch_server --model-path {shlex.quote(base)}{revision}{quantized} --enable-lora"
        f" --max-lora-rank {rank} --lora-strict-loading --max-loras-per-batch {len(names) + 1} --lora-paths {named}"
    )


ENGINE = Engine(
    "sglang", "SGLang", VERSION, SERVED_RANKS, (("q_proj", "v_proj"), ("gate_proj", "up_proj")), command,
)  # fmt: skip
