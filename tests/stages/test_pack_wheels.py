"""What is carried to a machine with a GPU: parts that are small enough, and are whole again there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu import pack_wheels

SIZES = {"big": 950, "middle": 320, "small": 120, "tiny": 40}


def write_wheel(folder: Path, name: str, size: int = 0, needs: tuple[str, ...] = ()) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as files:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {need}" for need in needs)]
        files.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines))
        files.writestr(f"{name}.py", bytes(size * 1024))
    return path


def test_parts_are_small_enough_and_are_joined_where_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of the parts at once change nothing: what is cut waits for its last piece."""
    def gather(folder: Path, python: str, has: list[str]) -> None:
        for name, size in SIZES.items():
            write_wheel(folder, name, size)

    monkeypatch.setattr(pack_wheels, "gather", gather)
    monkeypatch.setattr(pack_wheels, "MIB", 400 * 1024)
    monkeypatch.setattr("sys.argv", ["pack_wheels", str(tmp_path / "pack"), "--mib", "1"])
    assert pack_wheels.main() == 0
    parts = sorted((tmp_path / "pack").iterdir())
    assert [part.name for part in parts] == ["part-1", "part-2", "part-3", "part-4"]
    assert all(sum(file.stat().st_size for file in part.iterdir()) <= 400 * 1024 for part in parts)
    assert len(list((tmp_path / "pack").rglob("big-*.whl.*"))) == 3

    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\ncase "$2" in\nvenv|import*) exec {sys.executable} "$@";;\nesac\n'
        'echo "$@" > "$RECORD"\nls > "$RECORD.files"\n'
    )
    stub.chmod(0o755)
    record, said = tmp_path / "record", []
    for part in reversed(parts):
        assert not record.exists()
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "RECORD": str(record)}
        command = ["bash", str(part / "install.sh"), str(tmp_path / "env")]
        said.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    own = tmp_path / "env" / "bin" / "python"
    assert all("wheels are in other parts" in line for line in said[:-1])
    assert said[-1] == f"{own} -m pipeline.cli test --gpu\n"
    site, *others = subprocess.run(
        [own, "-I", "-c", "import site, pytest; print(*site.getsitepackages(), pytest.__file__, sep='\\n')"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()
    assert others == [pytest.__file__], "it does not see what the given Python has"
    assert f"--no-index --no-deps --no-compile --upgrade --target {site}" in record.read_text()
    installed = set(Path(f"{record}.files").read_text().split())
    assert installed == {"SHA256SUMS", *(f"{name}-1.0-py3-none-any.whl" for name in SIZES)}
    assert not (tmp_path / "env.wheels").exists()


def test_what_wheels_need_is_followed_without_torch_and_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = {
        "first": ("torch>=2", "second[more]", "nvidia-nccl-cu13", "third; sys_platform == 'win32'", "numpy"),
        "second": ("fourth; extra == 'more'", "fifth; extra == 'other'", "first"), "fourth": (),
    }
    rounds: list[set[str]] = []

    def download(folder: Path, names: set[str], python: str) -> None:
        rounds.append(set(names))
        for name in names:
            write_wheel(folder, name, needs=shelf[name])

    monkeypatch.setattr(pack_wheels, "download", download)
    named = [pack_wheels.Requirement(name) for name in ("first", "torch")]
    monkeypatch.setattr(pack_wheels, "named", lambda: named)
    pack_wheels.gather(tmp_path, "3.12", ["NumPy"])
    assert rounds == [{"first"}, {"second"}, {"fourth"}]


def test_the_project_s_own_list_is_read() -> None:
    names = {one.name for one in pack_wheels.named()}
    assert {"bitsandbytes", "deepspeed", "ray", "datasets", "pydantic", "torch", "pytest"} <= names
