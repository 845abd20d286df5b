"""What a run is compared with, by place and hash: another search or a damaged file is named, not used."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, sha256_file, write_json, write_text
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.related import finished_trials, read_related, read_search, write_related

TRIALS = [
    {"name": "b", "run": "trials/b", "validation_nll": 0.4, "adapter_sha256": "ab"},
    {"name": "a", "run": "trials/a", "validation_nll": 0.3, "adapter_sha256": "cd"},
    {"name": "failed", "run": "trials/c", "validation_nll": None},
]


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    write_text(tmp_path / "x-plain" / "adapter" / ADAPTER_WEIGHTS, "plain")
    write_json(tmp_path / "x-search" / "search.json", {"identity": "this search", "trials": TRIALS})
    paths = RunPaths(tmp_path / "x")
    write_related(paths, tmp_path / "x-plain", tmp_path / "x-search")
    return paths


def test_what_is_written_is_found_also_where_all_three_were_moved(run: RunPaths, tmp_path: Path) -> None:
    tmp_path = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    found = read_related(RunPaths(tmp_path / "x"))
    assert (found.plain, found.search) == (tmp_path / "x-plain", tmp_path / "x-search")
    assert found.plain_sha256 == sha256_file(tmp_path / "x-plain" / "adapter" / ADAPTER_WEIGHTS)
    assert found.search is not None
    trials = finished_trials(found.search, found.search_identity)
    assert [(one.name, one.run, one.adapter_sha256) for one in trials] == [
        ("a", found.search / "trials/a", "cd"), ("b", found.search / "trials/b", "ab"),
    ]


def test_a_search_with_more_trials_is_the_same_and_another_one_is_not(run: RunPaths) -> None:
    found = read_related(run)
    assert found.search is not None
    more = [*TRIALS, {"name": "d", "run": "trials/d", "validation_nll": 0.2, "adapter_sha256": "ef"}]
    write_json(found.search / "search.json", {"identity": "this search", "trials": more})
    assert finished_trials(found.search, found.search_identity)[0].name == "d"
    write_json(found.search / "search.json", {"identity": "another", "trials": TRIALS})
    for read in (finished_trials, read_search):
        with pytest.raises(RunFolderError, match=r"search\.json: is of another search than the one that chose"):
            read(found.search, found.search_identity)
        for plain in (5, {"trials": [5]}):
            write_json(found.search / "search.json", {"identity": "this search", "trials": TRIALS, "plain": plain})
            with pytest.raises(RunFolderError, match="is no record of a search"):
                read(found.search)
        write_json(found.search / "search.json", {"identity": "another", "trials": TRIALS, "plain": None})
    (found.search / "search.json").unlink()
    assert read_search(found.search, found.search_identity) is None
    with pytest.raises(RunFolderError, match="Put the search's folder back"):
        finished_trials(found.search, found.search_identity)


@pytest.mark.parametrize("content", ["{", "[]", '{"plain": 5}', '{"plain": {"run": 5}}', '{"search": {"folder": []}}',
                                     '{"plain": {"run": "a\\u0000b"}}', '{"search": {"folder": "x", "identity": 3}}'])
def test_a_damaged_file_is_named(run: RunPaths, content: str) -> None:
    run.related.write_text(content)
    with pytest.raises(RunFolderError, match=r"related\.json"):
        read_related(run)


@pytest.mark.parametrize("trial", [{}, {"name": "a", "run": 5, "validation_nll": 1.0, "adapter_sha256": "x"}, 5,
                                   {"name": "a", "run": "a", "validation_nll": "low", "adapter_sha256": "x"}])
def test_a_damaged_record_of_a_search_is_named(run: RunPaths, trial: object) -> None:
    folder = run.root.with_name("x-search")
    write_json(folder / "search.json", {"trials": [{"validation_nll": 1.0, **trial} if trial == {} else trial]})
    with pytest.raises(RunFolderError, match=r"search\.json"):
        finished_trials(folder)
