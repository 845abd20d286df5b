"""The scratch folder of a search's own Ray, and the note by which the next search finds what a killed one left."""

from __future__ import annotations

import shutil
from pathlib import Path

from tune.cluster import MADE_FOR, NOISE, SCRATCH, _make_scratch


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
