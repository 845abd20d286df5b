"""Fetching pinned distributions: real pip, an index in a local folder, no network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.errors import EXIT_USER, SetupError
from pipeline.fetch import alone, cache_folder, fetch_distribution

WHEEL = "toy_assets-1.0-py3-none-any.whl"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel that needs a package nobody has."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "toy_assets-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.writestr("toy_assets/weights.bin", os.urandom(1000))
        about = "Metadata-Version: 2.1\nName: toy-assets\nVersion: 1.0\nRequires-Dist: none-such\n"
        wheel.writestr(f"{info}/METADATA", about)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(digest: str) -> Path:
    return fetch_distribution("toy-assets", "1.0", digest, "wheel", WHEEL)


def test_fetched_once_then_taken_from_the_cache(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digest = sha256(index / WHEEL)
    path = fetch(digest)
    assert path == cache_folder() / "downloads" / WHEEL and sha256(path) == digest
    assert "toy-assets==1.0" in capfd.readouterr().err
    (index / WHEEL).unlink()
    assert fetch(digest) == path
    assert capfd.readouterr().err == "", "nothing to report the second time"
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith("-lock")] == [WHEEL]


def test_another_file_under_the_same_name_is_refused(index: Path) -> None:
    with pytest.raises(SetupError, match="could not be fetched") as caught:
        fetch("0" * 64)
    assert caught.value.exit_code == EXIT_USER
    assert not (cache_folder() / "downloads" / WHEEL).exists()


def test_a_damaged_file_in_the_cache_is_fetched_again(index: Path) -> None:
    digest = sha256(index / WHEEL)
    path = fetch(digest)
    path.write_bytes(path.read_bytes()[:-1])
    assert sha256(fetch(digest)) == digest


def test_without_a_connection_the_way_out_works(index: Path) -> None:
    content, digest = (index / WHEEL).read_bytes(), sha256(index / WHEEL)
    (index / WHEEL).unlink()
    with pytest.raises(SetupError) as caught:
        fetch(digest)
    folder = cache_folder() / "downloads"
    assert f"copy {WHEEL} (sha256 {digest})" in str(caught.value) and f"to {folder}/" in str(caught.value)
    (folder / WHEEL).write_bytes(content)  # what the message says
    assert fetch(digest) == folder / WHEEL


def test_processes_that_want_the_same_file_fetch_it_once(index: Path) -> None:
    code = f"from tests.test_fetch import fetch; print(fetch({sha256(index / WHEEL)!r}))"
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

    def one(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(one, range(3)))
    assert len({result.stdout for result in results}) == 1
    assert sum("fetching" in result.stderr for result in results) == 1


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.abc").mkdir()
    (tmp_path / ".file.abc" / "half").touch()
    (tmp_path / ".file.def").touch()
    (tmp_path / "file.other").touch()
    with alone(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".file-lock", "file.other"]


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LORADROP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "loradrop"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/void")
    assert cache_folder() == tmp_path / ".cache" / "loradrop"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "loradrop"
    monkeypatch.setenv("LORADROP_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORADROP_CACHE", "mine")
    assert cache_folder() == tmp_path / "mine"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="LORADROP_CACHE"):
        fetch("0" * 64)
