from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkout
from benchmarks.checkout import Checkout, CommandFailed, open_checkout
from pipeline.errors import UserError

PACKAGE = {
    "pipeline/__init__.py": "", "pipeline/config.py": (
        "class RunConfig: pass\ndef dump_config(config): return 'train:\\n  max_steps: 3\\nlabel: x\\n'\n"
    ),
    "pipeline/cli.py": (
        "import pathlib, sys\nplace = pathlib.Path(sys.argv[sys.argv.index('--run-dir') + 1])\n"
        "print(pathlib.Path.cwd(), *sys.argv[1:])\nsys.exit(3 * (sys.argv[1] == 'search'))\n"
    ),
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit of a stub of the product."""
    root = tmp_path / "repository"
    for name, text in PACKAGE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), (*author, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)
    return root


def test_a_commit_is_unpacked_for_as_long_as_it_is_used(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkout, "ROOT", repository)
    (repository / "pipeline" / "cli.py").write_text("changed since")
    with open_checkout("HEAD") as found:
        assert found is not None and found.root != repository
        assert (found.root / "pipeline/cli.py").read_text() == PACKAGE["pipeline/cli.py"]
        assert found.knows("train.max_steps") and found.knows("label") and not found.knows("search.pack")
        assert checkout.commit_of(repository) == f"{found.name} with changes"
    assert not found.root.exists()


def test_a_folder_is_taken_as_it_is_and_none_is_none(repository: Path) -> None:
    with open_checkout(str(repository)) as found:
        assert found is not None and found.root == repository.resolve()
    with open_checkout(None) as nothing:
        assert nothing is None


def test_a_folder_without_the_product_is_refused_though_it_is_installed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its code does not answer"):
        Checkout(tmp_path, "there").knows("train.max_steps")


def test_commands_run_its_own_code_and_leave_a_log(repository: Path, tmp_path: Path) -> None:
    found, run_dir = Checkout(repository, "there"), tmp_path / "runs" / "one"
    found.run("train", run_dir, ["train.max_steps=1"])
    said = run_dir.with_name("one.log").read_text()
    assert said == f"{repository} train --config default --run-dir {run_dir} train.max_steps=1\n"
    assert found.command("evaluate", run_dir, []) == [
        sys.executable, "-m", "pipeline.cli", "evaluate", "--run-dir", str(run_dir),
    ]
    with pytest.raises(CommandFailed, match=r"(?s)there: .* search .* ended with 3:\n.*search"):
        found.run("search", run_dir)
