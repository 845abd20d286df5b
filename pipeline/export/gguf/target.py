"""`gguf`: the adapter for llama.cpp, of the embedded model the merged one too; both compared with llama.cpp itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.adapters.members import Member
from pipeline.errors import ConfigError
from pipeline.export.gguf.adapter import check_adapter, write_adapter_gguf
from pipeline.export.gguf.model import PRE_TOKENIZERS, base_weights, merged, write_model_gguf
from pipeline.export.gguf.names import Shape
from pipeline.export.order import Exported, Loaded, Order, ParityError, Target
from pipeline.export.parity import in_clean_process, judged, our_log_probs, probe_prompts
from pipeline.export.peft import mean_field
from pipeline.files import write_text
from pipeline.model.load import load_skeleton
from pipeline.terminal import say

ADAPTER, MERGED, COMMAND = "adapter.gguf", "merged.gguf", "serve.txt"
TOOL = "xllamacpp"
"""The package that carries llama.cpp."""
VERIFY = 'pip install "loradrop[gguf]", and loradrop export --run-dir RUN once more'
PROMPTS = 4
"""Of the calibration rows that are compared: each is answered with the whole vocabulary, in JSON."""
TEXT_GAP = 1e-3
"""Nats: what batches of other sizes may differ by; another token differs by far more."""
LONGEST_TEXT = 64
"""Tokens."""
ODD_TEXTS = (
    "It cost  12.50 €,\n\n\twasn't that   1000000?", "naïve — 你好 🙂 don't", "<|im_start|>user\nHi<|im_end|>\n",
    " a\r\nb ",
)
"""What tokenizers disagree about."""


def plan_gguf(order: Order) -> list[Exported]:
    """One folder, gguf/.

    Raises:
        ConfigError: a model, an adapter or a quantization that has no such file.
    """
    if order.model_kind != "causal":
        what = "files for llama.cpp hold language models, and this is a classifier"
        raise ConfigError("export.forms", "gguf", what, "Leave gguf out.")
    if order.config.model.quantization == "int8":
        what = "an int8 base rounds what goes through it, too, and has no weights that another tool could multiply by"
        raise ConfigError("export.forms", "gguf", what, "Leave gguf out, or train with model.quantization=nf4 or none.")
    config = load_skeleton(order.config.model).model.config
    shape = Shape.of(config)
    check_adapter(order.plain, bool(config.tie_word_embeddings))  # type: ignore[union-attr]
    for module in order.plain.matrices:
        shape.stored_name(f"{module}.weight")
    return [Exported("gguf", Member(0))]


def write_gguf(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> None:
    """adapter.gguf in fp32; of a model whose tokenizer is known merged.gguf in fp16; how they are served."""
    model: Any = loaded.task.base.model
    for one in exported:
        target = folder / one.folder
        target.mkdir(parents=True)
        write_adapter_gguf(target / ADAPTER, mean_field(loaded), Shape.of(model.config), "loradrop adapter")
        rules = PRE_TOKENIZERS.get(loaded.identity.path)
        if rules is not None:
            weights = merged(base_weights(model), mean_field(loaded))
            tokenizer = (Path(loaded.identity.resolved), rules)
            write_model_gguf(target / MERGED, weights, model.config, torch.float16, "loradrop merged", tokenizer)
        write_text(target / COMMAND, "\n".join(_commands(loaded, rules is not None)) + "\n")


def verify_gguf(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """Log-probabilities of the next token, llama.cpp's against ours, over the base as it was trained against.

    Where llama.cpp is not installed, the entry says that nothing was compared, and by which command it will be.

    Raises:
        ParityError: beyond the tolerance, an adapter without effect, or files that llama.cpp does not read.
    """
    prompts = probe_prompts(loaded)[:PROMPTS]
    base, tuned = our_log_probs(loaded, prompts, [Member(None), Member(0)])
    if np.array_equal(base, tuned):
        raise ParityError(f"{exported[0].folder}: the adapter has no effect")
    if importlib.util.find_spec(TOOL) is None:
        say(f"gguf: written, but not verified, because llama.cpp is not installed. To verify it: {VERIFY}")
        return [{"verified": False, "reason": f"{TOOL} is not installed", "verify": VERIFY} for _ in exported]
    say("loading the GGUF files with llama.cpp in a clean process")
    return [_compared(loaded, folder / one.folder, prompts, base, tuned) for one in exported]


def _compared(
    loaded: Loaded, target: Path, prompts: Sequence[list[int]], base: NDArray[Any], tuned: NDArray[Any]
) -> dict[str, Any]:
    size = base.shape[-1]
    bare, theirs = _beside_base(loaded, prompts, size, torch.float32, [None, str(target / ADAPTER)])
    entry: dict[str, Any] = {"verified": True, "tool": f"{TOOL} {importlib.metadata.version(TOOL)}"}
    entry |= _judged(f"{target.name}/{ADAPTER}", tuned, base, theirs, bare)
    if not (target / MERGED).exists():
        return entry
    tokenizer = loaded.task.base.tokenizer
    texts = [*ODD_TEXTS, *(tokenizer.decode(ids[-LONGEST_TEXT:]) for ids in prompts)]
    cut = [(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    whole = llama_cpp(target / MERGED, [None], prompts, size, cut)
    if float(whole["text_gaps"].max()) > TEXT_GAP:
        worst = texts[int(whole["text_gaps"].argmax())]
        raise ParityError(f"{target.name}/{MERGED}: llama.cpp makes other tokens of {worst!r} than the tokenizer")
    (rounded,) = _beside_base(loaded, prompts, size, torch.float16, [None])  # what fp16 alone changes
    return entry | {"merged": _judged(f"{target.name}/{MERGED}", tuned, base, whole["log_probabilities"][0], rounded)}


def _beside_base(
    loaded: Loaded, prompts: Sequence[list[int]], size: int, dtype: torch.dtype, adapters: Sequence[str | None]
) -> NDArray[Any]:
    """(K, N, V) log-probabilities over the base as it was trained against, dequantized, its matrices in `dtype`."""
    model: Any = loaded.task.base.model
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "base.gguf"
        write_model_gguf(file, base_weights(model), model.config, dtype, "loradrop base")
        return llama_cpp(file, adapters, prompts, size)["log_probabilities"]


def _judged(
    file: str, tuned: NDArray[Any], base: NDArray[Any], theirs: NDArray[Any], their_base: NDArray[Any]
) -> dict[str, Any]:
    return judged(f"{file}: llama.cpp", tuned, base, theirs, their_base, float(np.abs(their_base - base).max()))


def llama_cpp(
    model: Path, adapters: Sequence[str | None], prompts: Sequence[list[int]], vocabulary: int,
    texts: Sequence[tuple[str, list[int]]] = (),
) -> Mapping[str, NDArray[Any]]:
    """What llama.cpp says, in a clean process: `log_probabilities` (K, N, V) of the token behind each prompt, with each
    adapter; `text_gaps`: how far what it says behind a text is from what it says behind the tokens that it should be.

    Raises:
        ParityError: it does not read the files.
    """
    longest = max(len(ids) for ids in [*prompts, *(ids for _, ids in texts)])
    return in_clean_process(Path(__file__).with_name("stock.py"), {
        "model": str(model), "adapters": list(adapters), "input_ids": list(prompts), "texts": list(texts),
        "context": 64 * (longest // 64 + 2), "vocabulary": vocabulary, "threads": torch.get_num_threads(),
    }, "llama.cpp cannot load the export")


def _commands(loaded: Loaded, whole: bool) -> list[str]:
    base = loaded.identity
    precision = base.quantization if base.quantization != "none" else base.compute_dtype
    lines = [
        "# llama.cpp: the adapter beside a base of your own, made by its convert_hf_to_gguf.py.",
        f"# Base: {loaded.content['name']}. {loaded.content['get']}",
        f"# Trained against in {precision}: scores and temperature hold for these values. Others (16 bits in place of",
        "# nf4, another quantization) give other probabilities.",
        "llama-server -m BASE.gguf --lora adapter.gguf",
    ]
    if whole:
        lines += ["# The same with the base in it, dequantized, in fp16:", "llama-server -m merged.gguf"]
    return lines


def _loading(loaded: Loaded, exported: Sequence[Exported]) -> str:
    lines = _commands(loaded, loaded.identity.path in PRE_TOKENIZERS)
    return "As `serve.txt` says:\n\n```\n" + "\n".join(lines) + "\n```"


GGUF = Target(
    "gguf", "the adapter, and of the embedded model the merged one, for llama.cpp", plan_gguf, write_gguf, verify_gguf,
    use=False, loading=_loading,
)  # fmt: skip
