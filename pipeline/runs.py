"""The run folder: the interface between stages. Nothing in it is ever half-written.

runs/NAME/
  config.yaml  environment.json  status.json  metrics.jsonl
  checkpoints/step_000123/    resumable; published by rename, with a manifest of sizes and hashes
  adapter/                    the result, PEFT format
  members.json                other adapters that evaluation compares with, by name, path and hash
  predictions/SPLIT.npz       per-member log-probabilities, no test labels
  result.json  report.html
  diagnosis/step_000124/      only after a step that was not finite: its batch, and the first bad module
  export/                     what is deployed: manifest.json with measured parity
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RunFolderError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class RunPaths:
    """Where each artefact of one run lies."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, base model and data identity."""
        return self.root / "environment.json"

    @property
    def status(self) -> Path:
        """Stage -> state, and the reason of the last failure."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of published checkpoints."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT format."""
        return self.root / "adapter"

    @property
    def members(self) -> Path:
        """Adapters of other runs that evaluation compares with."""
        return self.root / "members.json"

    @property
    def comparison(self) -> Path:
        """Trainings of other run folders that make this folder a comparison of methods."""
        return self.root / "compare.json"

    @property
    def predictions(self) -> Path:
        """Folder of cached predictions."""
        return self.root / "predictions"

    @property
    def result(self) -> Path:
        """Scores, machine-readable."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """Scores, for people."""
        return self.root / "report.html"

    @property
    def export(self) -> Path:
        """What is deployed."""
        return self.root / "export"

    @property
    def diagnosis(self) -> Path:
        """Batches that were not finite, one folder per step."""
        return self.root / "diagnosis"

    @property
    def stop_request(self) -> Path:
        """Present while a stop is asked for; all ranks agree on it at the next boundary."""
        return self.root / "stop_request.json"


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON, written aside and renamed. NaN is refused: other readers cannot parse it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "") -> Any:
    """Parsed JSON. Raises `RunFolderError` where the file is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(str(path), None, "does not exist", remedy) from error
    except json.JSONDecodeError as error:
        raise RunFolderError(str(path), None, f"is damaged ({error})", remedy) from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a line cut off by a crash at the end is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a folder aside, add sizes and hashes to its manifest.json, fsync, rename to `target`.

    An existing `target` is replaced only once the new folder is complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        fill(aside)
        _write_manifest(aside)
        os.chmod(aside, 0o755)
        old = None
        if target.exists():
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        os.rename(aside, target)
        _fsync_folder(target.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def manifest_faults(folder: Path) -> list[str]:
    """What is wrong with a published folder; empty when it is whole."""
    try:
        files = read_json(folder / MANIFEST)["files"]
    except (RunFolderError, KeyError, TypeError) as error:
        return [f"{folder.name}: no readable {MANIFEST} ({error})"]
    faults = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        elif sha256_file(path) != entry["sha256"]:
            faults.append(f"{name} does not have the recorded hash")
    return faults


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes: proves integrity, not origin."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def update_status(paths: RunPaths, stage: str, state: str, detail: str = "") -> None:
    """Record `state` (running, done, stopped, failed) of a stage in status.json."""
    status = read_json(paths.status) if paths.status.exists() else {}
    status[stage] = {"state": state, **({"detail": detail} if detail else {})}
    write_json(paths.status, status)


def _write_manifest(folder: Path) -> None:
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / MANIFEST, {**manifest, "files": files})


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
