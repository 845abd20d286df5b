"""A folder that is not ours is left alone: nothing in it is written, renamed or removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import RunFolderError, UserError
from pipeline.files import read_json, write_json
from pipeline.plan.request import LONGEST_NAME, Request, usable_place
from pipeline.run_folder import mark
from pipeline.run_folder.mark import LAYOUT, MARK, claim, refuse_foreign, require_mark


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A folder of the user's, in which names of ours happen to be."""
    folder = tmp_path / "thesis"
    for name in ("adapter/adapter_model.safetensors", "predictions/validation.npz", "checkpoints/latest", "notes.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize("stage", ["run", "search", "train", "evaluate", "report", "export", "compare"])
@pytest.mark.parametrize("dry", [False, True])
def test_files_of_the_user_are_left_alone(
    thesis: Path, stage: str, dry: bool, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for sibling in ("thesis-search", "thesis-compare", "thesis-plain"):
        (thesis.with_name(sibling)).mkdir()
        (thesis.with_name(sibling) / "notes.md").write_text("mine")
    before = contents(thesis.parent)
    settings = tiny_settings if stage in ("run", "search", "train", "compare") else []
    assert main([stage, "--run-dir", str(thesis), *(["--dry-run"] if dry else []), *settings]) == 2
    said = capsys.readouterr().err
    assert "loradrop has not made what is in it" in said and "new or an empty folder" in said
    assert contents(thesis.parent) == before


@pytest.mark.parametrize("option", ["--run-dir", "--config"])
def test_an_empty_name_is_not_the_current_folder(
    thesis: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(thesis)
    before = contents(thesis)
    for stage in ("train", "evaluate", "report", "export", "compare", "run", "data"):
        assert main([stage, option, ""]) == 2
        assert f"{option} = '': is empty" in capsys.readouterr().err
    assert contents(thesis) == before


def hostile_places(folder: Path) -> dict[str, str]:
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "file" / "below")
    return {
        "a file": str(folder / "file"), "under a file": str(folder / "file" / "run"), "a loop": str(folder / "loop"),
        "under a loop": str(folder / "loop" / "run"), "NUL": f"{folder}/a\0b", "too long": str(folder / ("x" * 300)),
        "too long for its siblings": str(folder / ("x" * (LONGEST_NAME + 1))), "long path": f"{folder}/{'y/' * 3000}",
        "the root": "/", "an escape": f"{folder}/\x1b[2J", "half a character": f"{folder}/\ud83d", "blank": "  ",
        "another user": "~nobody-here/run", "a link to nowhere": str(folder / "dangling"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [
    "a file", "under a file", "a loop", "under a loop", "NUL", "too long", "too long for its siblings", "long path",
    "the root", "an escape", "half a character", "blank", "another user", "a link to nowhere",
])
def test_names_that_can_be_no_run_folder_are_refused(
    tmp_path: Path, kind: str, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = hostile_places(tmp_path)[kind]
    before = sorted(tmp_path.rglob("*"))
    for command in (["train", *tiny_settings], ["train", "--dry-run", *tiny_settings], ["evaluate"], ["verify"]):
        assert main([*command, "--run-dir", place]) == 2
        said = capsys.readouterr().err
        assert said.startswith("loradrop: --run-dir") and "\x1b" not in said and "\0" not in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)  # root may write anywhere
    with pytest.raises(RunFolderError, match="cannot be made: .*locked cannot be written to"):
        refuse_foreign(locked / "run", "run")
    assert not any(locked.iterdir())


def test_a_folder_is_claimed_once_and_known_for_what_it_is(tmp_path: Path) -> None:
    claim(tmp_path / "new" / "run", "run")
    mark = read_json(tmp_path / "new" / "run" / MARK)
    assert mark["made_by"] == "loradrop" and mark["what"] == "run" and mark["layout"] == LAYOUT
    (tmp_path / "new" / "run" / "config.yaml").write_text("")
    claim(tmp_path / "new" / "run", "run")  # the same command again
    with pytest.raises(RunFolderError, match="is a run, not a search"):
        claim(tmp_path / "new" / "run", "search")
    with pytest.raises(RunFolderError, match="is a run, not a comparison"):
        refuse_foreign(tmp_path / "new" / "run", "comparison")
    (tmp_path / "empty").mkdir()
    refuse_foreign(tmp_path / "empty", "run")
    assert not any((tmp_path / "empty").iterdir())
    claim(tmp_path / "empty", "comparison")
    assert require_mark(tmp_path / "empty") == "comparison"


@pytest.mark.parametrize("mark", [
    "[]", "{}", "{", "", '{"made_by": "loradrop"}', '{"made_by": "x", "layout": 2, "what": "run"}', "[" * 99_999,
    '{"made_by": "loradrop", "layout": 2}', '{"made_by": "loradrop", "layout": 2, "what": []}', "9" * 9_999, "\x00",
])
def test_a_damaged_mark_is_no_mark(tmp_path: Path, mark: str) -> None:
    (tmp_path / MARK).write_text(mark)
    with pytest.raises(RunFolderError, match=rf"{MARK}.*is damaged"):
        require_mark(tmp_path)


def test_a_folder_of_a_newer_version_is_left_to_it(tmp_path: Path) -> None:
    write_json(tmp_path / MARK, {"made_by": "loradrop", "what": "run", "layout": LAYOUT + 1, "version": "9.0"})
    with pytest.raises(RunFolderError, match=r"was made by loradrop 9\.0"):
        claim(tmp_path, "run")


def test_links_that_lead_out_of_a_run_folder_are_refused(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    claim(run, "run")
    outside.mkdir()
    (run / "logs").mkdir()
    (run / "logs" / "latest").symlink_to(run / "logs")  # loggers make such
    claim(run, "run")
    for place, target in ((run / "logs" / "train.log", tmp_path / "keys"), (run / "predictions", outside)):
        place.symlink_to(target)
        with pytest.raises(RunFolderError, match="is a symbolic link that leads out of the run folder"):
            claim(run, "run")
        place.unlink()


def test_a_run_logged_to_weights_and_biases_goes_on(tmp_path: Path) -> None:
    claim(tmp_path / "run", "run")
    logs = tmp_path / "run" / "wandb" / "run-20251029_063411-tz1cpo59" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/nowhere/.cache/wandb/logs/core-debug-20251029_063411.log")  # as wandb does
    assert require_mark(tmp_path / "run") == "run"
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "x").symlink_to(logs / "debug-core.log")
    with pytest.raises(RunFolderError, match="leads out of the run folder"):
        require_mark(tmp_path / "run")


def test_a_folder_without_a_name_has_that_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Request(quick=True).run == tmp_path / "runs" / "default-quick"
    assert Request(source="papers/x.yaml").run == tmp_path / "runs" / "x"
    assert usable_place("~") == Path.home().resolve()
    with pytest.raises(UserError, match="--config"):
        Request(source=" ")


def test_nodes_of_one_job_may_mark_a_folder_at_the_same_time(tmp_path: Path) -> None:
    (tmp_path / ".owner").write_text("{}")
    (tmp_path / f".{MARK}.x1y2").write_text("")  # another node writes its mark aside
    claim(tmp_path, "run")
    assert require_mark(tmp_path) == "run"


def test_a_folder_that_is_marked_while_it_is_looked_at_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node marks it, and goes on, after this one has seen no mark."""
    claim(tmp_path / "other", "run")
    folder, seen = tmp_path / "run", []

    def late(place: Path) -> bool:
        seen.append(place)
        if len(seen) == 1:
            (tmp_path / "other").rename(folder)
            (folder / "config.yaml").write_text("")
            return False
        return (place / MARK).is_file()

    monkeypatch.setattr(mark, "is_marked", late)
    claim(folder, "run")
