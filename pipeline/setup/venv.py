"""The `.venv` of a checkout: whether it is complete, and what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class Environment:
    """The `.venv` of a checkout. It counts as complete only through a marker, which is written last."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.marker = self.folder / "complete.json"

    def fingerprint(self) -> dict[str, Any]:
        """What a complete environment was made from.

        `packages`: hash of what is asked for; when it changes, the environment is brought up to date.
        `place`: repository and interpreter, whose paths are written into it; when they change, it is made anew.
        """
        digest = hashlib.sha256()
        for name in ("pyproject.toml", "constraints.txt"):
            digest.update((self.root / name).read_bytes() + b"\0")
        return {"packages": digest.hexdigest(), "place": [str(self.root), os.path.realpath(self.python)]}

    def recorded(self) -> dict[str, Any]:
        """The fingerprint of the last completed installation; empty where there is none."""
        try:
            return dict(json.loads(self.marker.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def has_test_tools(self) -> bool:
        """Whether the last completed installation brought what only the project's own tests need."""
        return self.recorded().get("test_tools") is True

    def is_ready(self, test_tools: bool = False) -> bool:
        """True where the environment is complete, made from today's files, and has what is asked of it."""
        made_from = {key: value for key, value in self.recorded().items() if key != "test_tools"}
        enough = self.has_test_tools() or not test_tools
        return enough and made_from == self.fingerprint() and self.python.exists()

    def mark_complete(self, test_tools: bool = False) -> None:
        """Write the marker aside and rename it."""
        aside = self.marker.with_suffix(".new")
        aside.write_text(json.dumps({**self.fingerprint(), "test_tools": test_tools}) + "\n", encoding="utf-8")
        os.replace(aside, self.marker)
