"""Makes `.venv` where it is missing, then becomes the command. Runs as a script before anything is installed.

Standard library only; launch.sh starts it with -I, apart from any PYTHONPATH. When everything is in place it costs
one hash and one `exec`; everything else is in pipeline/installation.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

MINIMUM_PYTHON = (3, 11)
EXIT_USER = 2
EXIT_INTERRUPTED = 130

ROOT = Path(__file__).resolve().parent.parent


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

    def is_ready(self) -> bool:
        """True where the environment is complete and made from today's files."""
        return self.recorded() == self.fingerprint() and self.python.exists()

    def mark_complete(self) -> None:
        """Write the marker aside and rename it."""
        aside = self.marker.with_suffix(".new")
        aside.write_text(json.dumps(self.fingerprint()) + "\n", encoding="utf-8")
        os.replace(aside, self.marker)


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Prepare `.venv` where needed, then replace this process by the command. Returns (an exit code) only on failure.

    Questions about the command itself (--help, --version) are answered by the interpreter at hand.
    """
    if sys.version_info < MINIMUM_PYTHON:
        print(f"loradrop: Python = {sys.version.split()[0]}: at least 3.11 is needed.", file=sys.stderr)
        return EXIT_USER
    environment = Environment(root)
    if {"-h", "--help", "--version"} & set(arguments):
        run_command(sys.executable, arguments, root)
    if not environment.is_ready():
        sys.path.insert(0, str(root))
        from pipeline.errors import LoradropError
        from pipeline.installation import prepare

        try:
            prepare(environment)
        except LoradropError as error:
            print(f"loradrop: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("\nloradrop: interrupted; the same command starts the set-up again.", file=sys.stderr)
            return EXIT_INTERRUPTED
    run_command(str(environment.python), arguments, root, environment.folder)


def run_command(python: str, arguments: list[str], root: Path, venv: Path | None = None) -> NoReturn:
    """Become `python -m pipeline.cli ARGUMENTS` in the caller's working directory.

    The variables are those of an activated `.venv` (torch finds `ninja` through PATH), and neither a foreign
    PYTHONPATH nor a folder named `pipeline` in the working directory can shadow what was installed.
    """
    variables = dict(os.environ, PYTHONPATH=str(root), PYTHONSAFEPATH="1")
    variables.pop("PYTHONHOME", None)
    if venv is not None:
        variables["VIRTUAL_ENV"] = str(venv)
        variables["PATH"] = os.pathsep.join([str(venv / "bin"), os.environ.get("PATH", os.defpath)])
    os.execve(python, [python, "-m", "pipeline.cli", *arguments], variables)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
