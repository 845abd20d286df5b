"""Which folders an export has of members that do not count alike, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.adapters.peft_format import StoredAdapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import ExportConfig, build_config
from pipeline.errors import RunFolderError
from pipeline.export.peft import ensemble_entry, planned_exports

SPEC = AdapterSpec(rank=4, alpha=8.0, sites=build_config({}).adapter.resolved_method().sites)
STORED = StoredAdapter(SPEC, {}, "", None)
WEIGHTED = {"ensemble": {"members": [None, 2], "weights": [0.25, 0.75]}}


def said(draws: Sequence[int | None], weights: Sequence[float] | None) -> dict[str, Any]:
    return {"draws": list(draws), "weights": weights}


def entry(asked: ExportConfig, result: dict[str, Any]) -> dict[str, Any] | None:
    return ensemble_entry(planned_exports(asked, 8, result, STORED), said, asked, result)


def test_chosen_members_are_exported_with_their_weights() -> None:
    folders = [one.folder for one in planned_exports(ExportConfig(), 8, WEIGHTED, STORED)]
    assert folders == ["adapter", "draws/draw_002"]
    assert entry(ExportConfig(), WEIGHTED) == {"members": folders, "draws": [None, 2], "weights": (0.25, 0.75)}
    with pytest.raises(RunFolderError, match="export.forms = .*leaves out the adapter without masks"):
        entry(ExportConfig(forms=("draws",)), WEIGHTED)


def test_all_other_ensembles_are_draws_that_count_alike() -> None:
    prefix = {"ensemble": {"members": [0, 1], "weights": None}}
    two = {"members": ["draws/draw_000", "draws/draw_001"], "draws": [0, 1], "weights": None}
    assert entry(ExportConfig(), prefix) == two
    assert entry(ExportConfig(draws=2), WEIGHTED) == two, "what is asked for is not what was chosen"
    assert entry(ExportConfig(), {"ensemble": {"members": [None], "weights": None}}) is None
    unreported = entry(ExportConfig(), {})
    assert unreported is not None and unreported["draws"] == list(range(8))
    assert entry(ExportConfig(forms=("adapter",)), WEIGHTED) is None
