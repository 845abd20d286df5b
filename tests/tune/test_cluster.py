"""The scratch folder of a search's own Ray, and the note by which the next search finds what a killed one left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tune.cluster import MADE_FOR, NOISE, SCRATCH, _make_scratch
from tune.watch import TOKEN


def test_the_scratch_of_a_killed_search_goes_and_nothing_else_that_a_note_names(tmp_path: Path) -> None:
    folder, checkout = tmp_path / "search" / ".ray", tmp_path / "loradrop-main"
    left = _make_scratch(folder)
    assert left.is_dir()
    again = _make_scratch(folder)
    assert not left.exists()

    checkout.mkdir()
    (folder / SCRATCH).write_text(f"{checkout}\n")
    third = _make_scratch(folder)
    assert checkout.exists(), "a note in a search folder from elsewhere may name anything"
    (checkout / MADE_FOR).write_text("another search")
    (folder / SCRATCH).write_text(f"{checkout}\n")
    fourth = _make_scratch(folder)
    assert checkout.exists()
    for scratch in (again, third, fourth):
        shutil.rmtree(scratch)


def test_processes_of_a_killed_search_are_ended_by_the_next_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was starting when the search was killed finds no Ray to be ended by."""
    folder, sleep = tmp_path / "search" / ".ray", [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setenv(TOKEN, "of the killed search")
    _make_scratch(folder)
    left = subprocess.Popen(sleep)
    others = [subprocess.Popen(sleep, env={**os.environ, TOKEN: token}) for token in ("of another search", "")]
    monkeypatch.setenv(TOKEN, "of the next search")
    scratch = _make_scratch(folder)
    try:
        assert not psutil.pid_exists(left.pid)
        assert [process.poll() for process in others] == [None, None]
    finally:
        for process in (left, *others):
            process.kill()
            process.wait()
        shutil.rmtree(scratch)


def test_links_in_rays_folder_of_a_search_are_not_written_through(tmp_path: Path) -> None:
    folder, mine = tmp_path / "search" / ".ray", tmp_path / "mine"
    folder.mkdir(parents=True)
    mine.write_text("as it was")
    for name in (SCRATCH, NOISE):
        (folder / name).symlink_to(mine)
    scratch = _make_scratch(folder)
    (folder / NOISE).write_text("what Ray prints")
    assert mine.read_text() == "as it was"
    shutil.rmtree(scratch)
