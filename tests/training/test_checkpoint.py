"""Checkpoints: pointers, retention, size, damage of every kind, a disk without room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.errors import DiskFull
from pipeline.files import manifest_faults, publish_folder, read_json, read_json_lines, sha256_file, write_json
from pipeline.run_folder.metrics import Metrics
from pipeline.training.checkpoint import (
    Counters,
    checkpoint_bytes,
    find_checkpoint,
    published_checkpoints,
    save_checkpoint,
    tidy,
)

COUNTERS = Counters(1, 0, "hash", "rows")
PARAMETERS = {"a.lora_A": torch.nn.Parameter(torch.randn(4, 64)), "a.lora_B": torch.nn.Parameter(torch.randn(64, 4))}
STATE: dict[str, Tensor] = {
    f"{prefix}{name}": value.detach().clone()
    for name, value in PARAMETERS.items()
    for prefix in ("", "exp_avg/", "exp_avg_sq/")
}


def save(folder: Path, step: int, best: int | None = None, keep: int = 2, budget: int | None = None) -> None:
    nll = None if best is None else 1.0 / best
    counters = replace(COUNTERS, step=step, best_step=best, best_validation_nll=nll)
    save_checkpoint(folder, STATE, counters, keep, budget)


def names(folder: Path) -> list[str]:
    return [path.name for path in published_checkpoints(folder)]


def test_the_newest_and_the_best_are_kept_and_pointed_to(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        save(tmp_path, step, best)
    assert names(tmp_path) == ["step_000002", "step_000004", "step_000005"]
    latest, best_entry = read_json(tmp_path / "latest.json"), read_json(tmp_path / "best.json")
    assert latest["name"] == "step_000005" and latest["validation_nll"] is None
    assert best_entry["name"] == "step_000002" and best_entry["validation_nll"] == 0.5
    assert best_entry["sha256"] == sha256_file(tmp_path / "step_000002" / "state.safetensors")
    save(tmp_path, 6, 6)
    assert names(tmp_path) == ["step_000005", "step_000006"]
    assert read_json(tmp_path / "best.json")["step"] == 6


def test_a_byte_budget_takes_the_oldest_but_never_the_newest_or_the_best(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, 1, keep=4)
    size = sum(file.stat().st_size for file in (tmp_path / "step_000005").iterdir())
    assert len(names(tmp_path)) == 5
    save(tmp_path, 6, 1, keep=4, budget=3 * size + size // 2)
    assert names(tmp_path) == ["step_000001", "step_000005", "step_000006"]
    save(tmp_path, 7, 1, keep=4, budget=1)
    assert names(tmp_path) == ["step_000001", "step_000007"]


def test_only_published_ones_count_and_what_a_killed_save_left_goes(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    for left in (".step_000003.x1y2", ".step_000001.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "state.safetensors").write_text("half")
    (tmp_path / ".latest.json.abc").write_text("{")
    other = tmp_path / ".nfs0001"
    other.write_text("not ours")
    save(tmp_path, 3)
    assert names(tmp_path) == ["step_000002", "step_000003"]
    tidy(tmp_path, tmp_path / "step_000003")
    assert {p.name for p in tmp_path.iterdir()} == {"step_000002", "step_000003", "latest.json", ".nfs0001"}


def test_a_checkpoint_is_three_times_what_is_trained(tmp_path: Path) -> None:
    save(tmp_path, 1)
    trained = sum(parameter.numel() for parameter in PARAMETERS.values()) * 4
    assert checkpoint_bytes(PARAMETERS) == 3 * trained
    written = sum(file.stat().st_size for file in (tmp_path / "step_000001").iterdir())
    assert 3 * trained <= written < 3 * trained + 4096


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path) -> None:
    """In every other byte of the small files, in a sample of the large one; what is not found must not matter."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    for path in sorted((tmp_path / "step_000002").iterdir()):
        whole = path.read_bytes()
        expected = {file.name: sha256_file(file) for file in path.parent.iterdir() if file.name != "manifest.json"}
        places = range(0, len(whole), 2 if len(whole) < 1000 else 199)
        for place in places:
            for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]):
                path.write_bytes(content)
                found, faults = find_checkpoint(tmp_path)
                assert found is not None
                if found.name == "step_000001":
                    assert "step_000002 is damaged" in faults[0]
                else:  # white space of the manifest, or a digit after which it says the same
                    assert path.name == "manifest.json"
                    entries = read_json(path)["files"]
                    assert {name: entry["sha256"] for name, entry in entries.items()} == expected
        path.write_bytes(whole)
    assert find_checkpoint(tmp_path) == (tmp_path / "step_000002", [])


def test_damaged_ones_make_room_under_their_own_name(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    for step in (2, 3):
        (tmp_path / f"step_00000{step}" / "counters.json").write_text("{")
    found, faults = find_checkpoint(tmp_path)
    assert found == tmp_path / "step_000001" and len(faults) == 2
    tidy(tmp_path, found)
    assert names(tmp_path) == ["step_000001"]
    assert (tmp_path / "damaged_step_000003").is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free."""
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - leave))


def test_a_full_disk_keeps_the_checkpoint_before_and_names_the_way_out(small_disk: Path) -> None:
    save(small_disk / "checkpoints", 1)
    fill(small_disk, 2 * 4096)
    text = r"no space left on the device: 7\d,\d{3} bytes are needed, 8,192 are free"
    with pytest.raises(DiskFull, match=text) as caught:
        save(small_disk / "checkpoints", 2)
    assert "the same command continues" in str(caught.value) and caught.value.exit_code == 1
    assert find_checkpoint(small_disk / "checkpoints") == (small_disk / "checkpoints" / "step_000001", [])
    assert {p.name for p in (small_disk / "checkpoints").iterdir()} == {"step_000001", "latest.json"}

    def too_much(folder: Path) -> None:  # found out only while it is written, by a library with errors of its own
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(100_000)}, folder / "x.safetensors")

    with pytest.raises(DiskFull, match="no space left"):
        publish_folder(small_disk / "adapter", too_much)
    assert not (small_disk / "adapter").exists()
    (small_disk / "ballast").unlink()
    save(small_disk / "checkpoints", 2)
    assert not manifest_faults(small_disk / "checkpoints" / "step_000002")


def test_a_full_disk_cuts_no_line_in_two(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    metrics = Metrics(path, enabled=True)
    metrics.write("train", step=1, text="x" * 4000)
    write_json(small_disk / "status.json", {"train": 1})
    fill(small_disk, 0)
    with pytest.raises(DiskFull):
        metrics.write("train", step=2, text="x" * 200)  # the file's last page has room for a part of it
    with pytest.raises(DiskFull):
        write_json(small_disk / "status.json", {"train": 2})
    assert read_json(small_disk / "status.json") == {"train": 1}
    (small_disk / "ballast").unlink()
    metrics.write("train", step=3)
    assert [row["step"] for row in read_json_lines(path)] == [1, 3]
