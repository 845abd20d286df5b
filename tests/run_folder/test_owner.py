"""One owner of a folder at a time: locks within a machine, signs of life between machines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.cli import main
from pipeline.config import dump_config, load_config
from pipeline.config.launch import LaunchConfig
from pipeline.distributed.nodes import owned_folders
from pipeline.errors import RunFolderError
from pipeline.files import write_json, write_text
from pipeline.run_folder import owner
from pipeline.run_folder.mark import claim, refuse_foreign
from pipeline.run_folder.owner import OWNER, Owner, held, owned, read_owner
from pipeline.run_folder.paths import RunPaths

HOLDER = """
import sys
from pathlib import Path
from pipeline.run_folder.owner import owned
with owned(Path(sys.argv[1]), "loradrop train"):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_command(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT", 0.05)
    monkeypatch.setattr(owner, "PATIENCE", 0.0)


def elsewhere(folder: Path, age: float = 0.0, name: str = OWNER) -> Path:
    """The file of an owner on another machine, last touched `age` seconds ago; no lock of it reaches us."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    said = Owner(4711, "faraway", "another-boot", "loradrop train", "2026-01-01 10:00:00")
    path.write_text(json.dumps(asdict(said)))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize("stage", ["train", "evaluate", "report", "export", "run", "search", "compare"])
def test_the_second_command_is_told_who_has_the_folder_and_touches_nothing(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    run = tmp_path / "x"
    folder = tmp_path / {"search": "x-search", "compare": "x-compare"}.get(stage, "x")
    claim(run, "run")
    for name in ("config.yaml", *(["requested.yaml"] if stage == "run" else [])):
        write_text(run / name, dump_config(load_config(None, tiny_settings)))
    write_json(RunPaths(run).status, {"train": {"state": "running"}})
    write_json(RunPaths(run).stop_request, {"signal": "SIGTERM"})
    write_json(run / "logs" / "ranks" / "rank_0.json", {})
    words = tiny_settings if stage in ("run", "search", "train", "compare") else []
    with another_command(folder) as process:
        before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
        assert main([stage, "--run-dir", str(run), *words]) == 2
        said = capsys.readouterr().err
        assert f"loradrop train (pid {process.pid} on " in said and "since 20" in said and "--run-dir" in said
        after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before


def test_a_killed_owner_blocks_nobody_and_a_stopped_one_is_the_owner(tmp_path: Path) -> None:
    with another_command(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(RunFolderError, match="is in use"), owned(tmp_path, "second"):
            pass
        process.kill()
        process.wait()
        assert (tmp_path / OWNER).exists()
        with owned(tmp_path, "second"):
            found = read_owner(tmp_path / OWNER)
            assert found is not None and (found.pid, found.command) == (os.getpid(), "second")
            with pytest.raises(RunFolderError, match="is in use"), held(tmp_path / OWNER, "third"):
                pass
            with owned(tmp_path, "a stage of the second"):
                pass
            assert read_owner(tmp_path / OWNER) == found
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_made_and_goes_again_where_nothing_was_written(tmp_path: Path) -> None:
    with owned(tmp_path / "a" / "b", "first"):
        assert (tmp_path / "a" / "b" / OWNER).exists()
    assert not (tmp_path / "a" / "b").exists()
    with owned(tmp_path / "c", "first"):
        (tmp_path / "c" / "file").touch()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["file"]


@pytest.mark.parametrize("age", [0.0, 30.0, -30.0])
def test_an_owner_on_another_machine_lives_while_its_file_is_touched(tmp_path: Path, age: float) -> None:
    elsewhere(tmp_path, age)
    with pytest.raises(RunFolderError, match=r"pid 4711 on faraway.*free 60 s after"), owned(tmp_path, "second"):
        pass


@pytest.mark.parametrize("age", [3600.0, -3600.0])
def test_and_is_gone_a_minute_later_unless_a_clock_was_set(tmp_path: Path, age: float) -> None:
    path = elsewhere(tmp_path, age)
    with owned(tmp_path, "second"):
        assert getattr(read_owner(path), "pid", None) == os.getpid()
    path = elsewhere(tmp_path, age)
    ended = threading.Event()

    def touch() -> None:
        for n in range(1000):
            os.utime(path, (time.time() - age + n, time.time() - age + n))
            if ended.wait(0.01):
                return

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(RunFolderError, match="faraway"), owned(tmp_path, "second"):
            pass
    finally:
        ended.set()
        thread.join()


def test_the_owner_touches_its_file(tmp_path: Path) -> None:
    with owned(tmp_path, "first"):
        os.utime(tmp_path / OWNER, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / OWNER).stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_nodes_of_one_job_share_a_folder_and_nobody_else_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = LaunchConfig(nodes=2, processes=1, master_addr="10.0.0.1", master_port=29500)

    def node(number: int, launch: LaunchConfig | None = launch) -> contextlib.AbstractContextManager[None]:
        monkeypatch.setenv("NODE_RANK", str(number))
        return owned_folders([tmp_path], "train", launch)

    another = launch.model_copy(update={"master_port": 29501})
    with node(0):
        monkeypatch.setattr(owner, "_held", set())  # as another process would see it
        with node(1):
            for number, other in ((0, launch), (1, launch), (1, another), (0, None)):
                monkeypatch.setattr(owner, "_held", set())
                with pytest.raises(RunFolderError, match="is in use"), node(number, other):
                    pass
    with node(1):
        monkeypatch.setattr(owner, "_held", set())
        for number, other in ((0, None), (0, another)):
            with pytest.raises(RunFolderError, match="is in use"), node(number, other):
                pass
    assert not list(tmp_path.iterdir())


def test_who_was_taken_for_dead_leaves_at_once(tmp_path: Path) -> None:
    code = HOLDER.replace("with owned", "from pipeline.run_folder import owner; owner.BEAT = 0.05\nwith owned")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        now = read_owner(tmp_path / OWNER)
        assert now is not None
        (tmp_path / OWNER).write_text(json.dumps(asdict(replace(now, host="faraway", kernel="another-boot"))))
        assert process.wait(20) == 1
        assert process.stderr is not None and "on faraway" in process.stderr.read()
        assert (tmp_path / OWNER).exists()  # it is no longer its own
    finally:
        process.kill()
        process.communicate()


def test_what_cannot_be_held_is_named(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / OWNER).symlink_to(tmp_path / "victim")
    with pytest.raises(RunFolderError, match="is a link"), owned(tmp_path, "first"):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
    (tmp_path / OWNER).unlink()
    os.mkfifo(tmp_path / OWNER)
    with pytest.raises(RunFolderError, match="no ordinary file"), owned(tmp_path, "first"):
        pass
    with pytest.raises(RunFolderError, match="cannot be written"), owned(tmp_path / "victim" / "below", "first"):
        pass


def test_names_in_the_file_cannot_write_lines(tmp_path: Path) -> None:
    said = asdict(Owner(1, "a\x1b[2J", "another-boot", "b\nc", "d"))
    (tmp_path / OWNER).write_text(json.dumps(said))
    with pytest.raises(RunFolderError) as caught, owned(tmp_path, "second"):
        pass
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_folder_whose_owner_was_killed_before_it_was_marked_is_no_foreign_one(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text("{}")
    refuse_foreign(tmp_path, "run")
    with owned(tmp_path, "second"):
        claim(tmp_path, "run")
    assert not (tmp_path / OWNER).exists()
