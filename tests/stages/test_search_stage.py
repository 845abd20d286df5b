"""The search stage, as far as it goes without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import build_config, load_config
from pipeline.config.load import with_values
from pipeline.errors import RunFolderError
from pipeline.run_folder.paths import Folders
from pipeline.stages import search


def test_a_search_goes_on_with_more_trials_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "run_stage", lambda *_: 0)
    folders, config = Folders(tmp_path / "run"), build_config({"search": {"trials": 2}})
    assert search.run_search(config, folders) == 0
    more = with_values(config, {"search.trials": 5, "search.concurrent": 1})
    assert search.run_search(more, folders) == 0
    assert load_config(folders.search / "config.yaml").search.trials == 5
    for key, value in (("search.max_steps", 7), ("search.seed", 7), ("adapter.rank", 2), ("search.space", "rates")):
        with pytest.raises(RunFolderError, match="belongs to another configuration"):
            search.run_search(with_values(more, {key: value}), folders)
