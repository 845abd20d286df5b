"""Makes `.venv` where it is missing, then becomes the command. Runs as a script before anything is installed.

Standard library only; launch.sh starts it with -I, apart from any PYTHONPATH. When everything is in place it costs
one hash and one `exec`; everything else is in pipeline/setup/install.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # -I leaves out the script's own folder

from pipeline.errors import EXIT_USER, LoradropError  # noqa: E402
from pipeline.setup.venv import Environment  # noqa: E402

MINIMUM_PYTHON = (3, 11)
EXIT_INTERRUPTED = 130


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Prepare `.venv` where needed, then replace this process by the command. Returns (an exit code) only on failure.

    Questions about the command itself (--help, --version) are answered by the interpreter at hand, and so is `doctor`
    where `.venv` cannot be made. `test` alone needs the test tools.
    """
    if sys.version_info < MINIMUM_PYTHON:
        print(f"loradrop: Python = {sys.version.split()[0]}: at least 3.11 is needed.", file=sys.stderr)
        return EXIT_USER
    environment = Environment(root)
    if {"-h", "--help", "--version"} & set(arguments):
        run_command(sys.executable, arguments, root)
    test_tools = "test" in arguments  # elsewhere than as the stage, too: a few packages more do no harm
    if not environment.is_ready(test_tools):
        from pipeline.setup.install import prepare

        try:
            prepare(environment, test_tools)
        except LoradropError as error:
            print(f"loradrop: {error}", file=sys.stderr)
            if "doctor" in arguments:  # what is wrong beside that can be seen without an environment
                run_command(sys.executable, arguments, root)
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
