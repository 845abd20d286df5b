"""An adapter as llama.cpp's LoRA file: `llama-server -m BASE.gguf --lora adapter.gguf`.

llama.cpp adds alpha / R · B A x to W x, with one alpha for the file and R from each tensor: where rsLoRA or a pattern
asks for another scaling, the rest of it is folded into B.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from pipeline.adapters.peft_format import StoredAdapter
from pipeline.errors import ConfigError
from pipeline.export.gguf.names import Shape


def check_adapter(stored: StoredAdapter, tied: bool) -> None:
    """Refuse what the file has no place for.

    Args:
        tied: whether the output head is the embedding.

    Raises:
        ConfigError: modules trained whole; an adapted head that llama.cpp finds no tensor for.
    """
    if stored.head.modules:
        raise ConfigError(
            "export.forms", "gguf", f"the adapter trains {', '.join(stored.head.modules)} whole, which llama.cpp's LoRA"
            " files do not hold", "Leave gguf out: classifiers are exported as PEFT folders.",
        )
    if tied and "lm_head" in stored.matrices:
        raise ConfigError(
            "export.forms", "gguf", "lm_head is adapted, and this model has no tensor of its own for it: llama.cpp"
            " drops such an update or refuses the file",
            "Train without lm_head in adapter.target_modules, or leave gguf out.",
        )


def write_adapter_gguf(path: Path, stored: StoredAdapter, shape: Shape, name: str) -> None:
    """Write a plain LoRA in fp32.

    Tensors: NAME.lora_a (R, I) and NAME.lora_b (O, R), named and ordered as the base's own (`Shape`).

    Args:
        name: for people, of the adapter.

    Raises:
        ConfigError: llama.cpp has no name for an adapted module.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[shape.architecture.kind])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = stored.spec.alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (A, B, *_) in sorted(stored.matrices.items()):
        rest = stored.spec.scaling_of(module) * len(A) / alpha  # 1 of a LoRA without patterns
        target = shape.stored_name(f"{module}.weight")
        writer.add_tensor(f"{target}.lora_a", np.ascontiguousarray(A.float().numpy()))
        writer.add_tensor(f"{target}.lora_b", np.ascontiguousarray(shape.stored_rows(module, B * rest).float().numpy()))
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
