"""The column `label_counts`: read where it is meant, refused where it cannot be, and nothing that a model reads."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import TemplateConfig
from pipeline.data.template import to_row
from pipeline.errors import DataError

ROW: dict[str, Any] = {"prompt": "q", "choices": [" no", " yes"], "label": 1}


@pytest.mark.parametrize(("given", "counts"), [
    ([3, 12], (3.0, 12.0)), ("[3, 12]", (3.0, 12.0)), ([0.2, 0.8], (0.2, 0.8)), (None, ()), ("", ()),
])
def test_counts_are_read_and_change_no_id(given: Any, counts: tuple[float, ...]) -> None:
    row = to_row({**ROW, "label_counts": given}, None, "file:1")
    assert row.label_counts == counts and row.content == to_row(ROW, None, "file:1").content
    named = to_row({"text": "q", "label": "yes", "label_counts": given},
                   TemplateConfig(prompt="{text}", choices=(" no", " yes")), "file:1")
    assert named.label_counts == counts


@pytest.mark.parametrize(
    "given", [[3], [1, 2, 3], [-1, 2], [0, 0], ["a", 1], 7, {"no": 1, "yes": 2}, [float("nan"), 1]]
)
def test_counts_that_say_nothing_of_the_choices_are_refused(given: Any) -> None:
    with pytest.raises(DataError, match="file:1: label_counts"):
        to_row({**ROW, "label_counts": given}, None, "file:1")
