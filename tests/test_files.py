"""Files and folders that are never half-written: damage is found."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.errors import RunFolderError
from pipeline.files import (
    MANIFEST,
    manifest_faults,
    open_append,
    publish_folder,
    read_json,
    read_json_lines,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_failed_publication_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    publish_folder(target, lambda folder: write_text(folder / "x", "old"))

    def fails(folder: Path) -> None:
        write_text(folder / "x", "new")
        raise OSError("disk full")

    with pytest.raises(OSError):
        publish_folder(target, fails)
    assert (target / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    publish_folder(target, lambda folder: write_text(folder / "x", "new"))
    assert (target / "x").read_text() == "new" and not manifest_faults(target)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_every_damage_is_found(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "step"
    publish_folder(target, lambda folder: write_text(folder / "state", "0123456789"))
    if damage == "truncate":
        (target / "state").write_text("01234")
    elif damage == "flip":
        (target / "state").write_text("0123456780")
    elif damage == "remove":
        (target / "state").unlink()
    else:
        (target / MANIFEST).write_text("{")
    assert manifest_faults(target)


def test_a_line_cut_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [row["step"] for row in read_json_lines(path)] == [1, 2]


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="Train first"):
        read_json(tmp_path / "x.json", "Train first.")


def test_what_is_appended_to_is_a_file_of_ours_and_no_link(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    for text in (b"one\n", b"two\n"):
        with open_append(log) as file:
            file.write(text)
    assert log.read_bytes() == b"one\ntwo\n"
    link, dangling, pipe, folder = (tmp_path / name for name in ("link", "dangling", "pipe", "folder"))
    link.symlink_to(log)
    dangling.symlink_to(tmp_path / "made")
    os.mkfifo(pipe)
    folder.mkdir()
    for path, what in ((link, f"link to {log}"), (dangling, "made"), (pipe, "no regular"), (folder, "no regular")):
        with pytest.raises(RunFolderError, match=what):
            open_append(path)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # a pipe somebody listens to can be opened
    with pytest.raises(RunFolderError, match="no regular"):
        open_append(pipe)
    os.close(reader)
    assert not (tmp_path / "made").exists() and log.read_bytes() == b"one\ntwo\n"


def test_a_listed_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"a" * 300: {"bytes": 1, "sha256": ""}}}))
    assert manifest_faults(tmp_path) == [f"{'a' * 300} cannot be read (File name too long)"]
