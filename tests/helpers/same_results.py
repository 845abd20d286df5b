"""`python tests/helpers/same_results.py OLD NEW`: whether two folders of runs hold the same results.

For changes that must change nothing: the same commands are run before and after, into OLD and NEW. Compared are, in
every run folder below them, adapters and checkpoints byte for byte, metrics but for times and memory, predictions,
result.json, the export, and what a search and a comparison record. Hashes of configurations, times and the folders'
own paths are left out; `RENAMED` says what had another name before version 0.2. Exit code 1 where anything differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TIMES = {
    "seconds", "tokens_per_second", "evaluate_seconds", "step_seconds", "memory_gib", "mfu", "hfu", "started", "ended",
    "time", "at", "minutes", "train_seconds", "cost",
}
HASHES = {"config_sha256", "files", "space_sha256", "identity"}
"""Of configurations (whose keys have other names), and of files that are compared themselves."""
RENAMED = {"members/draw_": "draws/draw_", "export.members": "export.draws"}
RENAMED_FILES = {"members.json": "related.json"}
"""In the root of a run folder."""
COMPARED = {".safetensors", ".npz", ".json", ".jsonl"}


def comparable(value: Any, root: Path) -> Any:
    """`value` without times, hashes and the root's path, under today's names."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in TIMES | HASHES}
        kept = {k: sorted(v) if k == "target_modules" else v for k, v in kept.items()}  # PEFT writes a set
        return {comparable(k, root): comparable(v, root) for k, v in kept.items()}
    if isinstance(value, list):
        return [comparable(one, root) for one in value]
    if isinstance(value, str):
        value = value.replace(str(root), "ROOT")
        for old, new in RENAMED.items():
            value = value.replace(old, new)
    return value


def content(path: Path, root: Path) -> Any:
    """What is compared of a file."""
    if path.suffix == ".safetensors":
        return path.read_bytes()
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name].tobytes() for name in arrays.files if name not in TIMES}
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [comparable(json.loads(line), root) for line in text.splitlines()]
        return sorted(rows, key=lambda row: row.get("trial", ""))  # trials at once report in any order
    return comparable(json.loads(text), root)


def files_of(root: Path) -> dict[str, Path]:
    """Today's relative name -> file; logs, environment and Ray's own files are no results."""
    found = {}
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.suffix not in COMPARED or {"logs", ".ray", "tensorboard"} & set(parts):
            continue
        if path.name in ("environment.json", "status.json"):
            continue
        name = RENAMED_FILES.get(path.name, path.name) if path.with_name("config.yaml").exists() else path.name
        relative = path.relative_to(root).with_name(name).as_posix()
        for old, new in RENAMED.items():
            relative = relative.replace(old, new)
        found[relative] = path
    return found


def differences(old: Path, new: Path) -> tuple[list[str], int]:
    """(what differs, number of files that were compared)."""
    before, after = files_of(old), files_of(new)
    wrong = [f"only before: {name}" for name in sorted(before.keys() - after.keys())]
    wrong += [f"only after: {name}" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        first, second = content(before[name], old), content(after[name], new)
        if first != second:
            wrong.append(f"differs: {name}{_where(first, second)}")
    return wrong, len(before.keys() & after.keys())


def _where(first: Any, second: Any) -> str:
    """The first place in which two values of plain types differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in [*first, *(second.keys() - first.keys())]:
            if first.get(key) != second.get(key):
                return f".{key}{_where(first.get(key), second.get(key))}"
    if isinstance(first, list) and isinstance(second, list):
        for index, (a, b) in enumerate(zip(first, second, strict=False)):
            if a != b:
                return f"[{index}]{_where(a, b)}"
        return f": {len(first)} and {len(second)} entries"
    return ": other bytes" if isinstance(first, bytes) else f": {first!r} and {second!r}"


def main() -> int:
    """Print what differs."""
    wrong, compared = differences(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    print("\n".join([*wrong, f"{compared} files compared, {len(wrong)} differences"]))
    return int(bool(wrong) or not compared)


if __name__ == "__main__":
    sys.exit(main())
