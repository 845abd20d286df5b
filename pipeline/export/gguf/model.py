"""A whole model as llama.cpp reads it: the base as it was trained against, or merged with its adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.adapters.attach import base_modules
from pipeline.adapters.peft_format import StoredAdapter
from pipeline.export.gguf.adapter import finish
from pipeline.export.gguf.names import Shape, model_hyperparameters

PRE_TOKENIZERS = {"embedded:smollm2-135m-instruct": "smollm"}
"""model.path -> what llama.cpp calls the rules by which its texts are cut before the merges. A wrong one is not noticed
by any reader, so that whole models are written for those alone whose rules are known."""
FILE_TYPES = {torch.float32: gguf.LlamaFileType.ALL_F32, torch.float16: gguf.LlamaFileType.MOSTLY_F16}


def base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(transformers' name, fp32 values) of the base's tensors, dequantized; adapters on it play no part.

    A head that is the embedding (tied) is not named again.
    """
    seen: set[int] = set()
    for name, module in base_modules(model).items():
        tensors: dict[str, Tensor] = {**module._parameters, **module._buffers}  # type: ignore[dict-item]
        for kind in ("weight", "bias"):
            value = tensors.get(kind)
            if value is None or id(value) in seen:
                continue
            seen.add(id(value))
            yield f"{name}.{kind}", _dequantized(value).to("cpu", torch.float32)


def _dequantized(value: Tensor) -> Tensor:
    state = getattr(value, "quant_state", None)
    if state is None:
        return value.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(value.data, state)


def merged(weights: Iterator[tuple[str, Tensor]], stored: StoredAdapter) -> Iterator[tuple[str, Tensor]]:
    """W + s · B A of the adapted modules, in fp32; the others as they are."""
    for name, value in weights:
        module = name.removesuffix(".weight")
        if module in stored.matrices and name != module:
            A, B, *_ = stored.matrices[module]
            value = value + stored.spec.scaling_of(module) * (B @ A)
        yield name, value


def write_model_gguf(
    path: Path, weights: Iterator[tuple[str, Tensor]], config: Any, dtype: torch.dtype, name: str,
    tokenizer: tuple[Path, str] | None = None,
) -> None:
    """Write a model.

    Args:
        weights: transformers' names and fp32 values.
        config: transformers' configuration.
        dtype: of matrices, float32 or float16; vectors stay in fp32.
        name: for people.
        tokenizer: folder of the tokenizer and llama.cpp's name of its pre-tokenizer; without it the tokens are numbers,
            and the model understands token ids alone.

    Raises:
        ConfigError: a model or a tensor that llama.cpp does not have.
    """
    shape = Shape.of(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[shape.architecture.kind])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    model_hyperparameters(writer, config, config.vocab_size)
    if tokenizer is None:
        _numbers_as_tokens(writer, config.vocab_size)
    else:
        _byte_level_tokenizer(writer, config.vocab_size, *tokenizer)
    for tensor_name, value in weights:
        stored = shape.stored_rows(tensor_name, value)
        kept = stored.to(dtype if stored.dim() > 1 else torch.float32)
        writer.add_tensor(shape.stored_name(tensor_name), np.ascontiguousarray(kept.numpy()))
    finish(writer)


def _numbers_as_tokens(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["< 0"])  # a tokenizer without merges is refused
    writer.add_add_bos_token(False)


def _byte_level_tokenizer(writer: gguf.GGUFWriter, size: int, folder: Path, rules: str) -> None:
    """Tokens, their kinds, merges and special tokens of a byte-level BPE tokenizer, and its chat template."""
    said: Mapping[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [gguf.TokenType.UNUSED] * size
    for text, number in said["model"]["vocab"].items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for added in said["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rules)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special_tokens = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special_tokens.add_special_token = {"bos": False}  # rows are read without one, whatever transformers says of chats
    special_tokens.add_to_gguf(writer, quiet=True)
