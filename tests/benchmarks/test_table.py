from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks.cases import CASES
from benchmarks.table import COLUMNS, Limit, Row, document, markdown, print_table, shown, skipped
from benchmarks.targets import TARGETS, Target
from benchmarks.timing import Spread

SPREAD = Spread.of([0.5, 0.55, 0.7])
ROWS = [
    Row("step", "ours | split", "theirs", SPREAD, target="step against plain PEFT", seconds=(1.0, 2.0),
        limit=Limit(0.4, 120.0, Spread.of([0.8]))),
    Row("step", "ours, narrow", "theirs", SPREAD, target="step against PEFT with dropout", note="busy"),
    Row("prediction", "rows", value=Spread.of([1234.0, 1236.0]), unit="tokens/s"),
    skipped("factors", "a search, packed", "no search.pack here", "packing and early exit"),
]


def test_cells_say_what_is_measured_and_whether_it_is_reached() -> None:
    first, second, third, fourth = (row.cells() for row in ROWS)
    assert all(len(row.cells()) == len(COLUMNS) for row in ROWS)
    assert first[3:] == ("0.55×", "0.50 – 0.70", "0.53 – 0.62", "3", "≤ 0.60×, reached", "80 %")
    assert second[1] == "ours, narrow (busy)" and second[7:] == ("≤ 0.47×, missed", "")
    assert third[3:5] == ("1,235 tokens/s", "1,234 – 1,236") and third[7] == ""
    assert fourth[3:] == ("skipped: no search.pack here", "", "", "", "≥ 3.00×", "")


def test_markdown_has_a_line_per_row_and_as_many_cells_in_each() -> None:
    lines = markdown(ROWS, ["a machine"]).splitlines()
    assert lines[:2] == ["- a machine", ""] and len(lines) == 2 + 2 + len(ROWS)
    assert {line.replace("\\|", "").count("|") for line in lines[2:]} == {len(COLUMNS) + 1}
    assert "ours \\| split" in lines[4]


def test_json_has_every_number_and_the_target_in_full() -> None:
    read = json.loads(json.dumps(document(ROWS, {"date": "now"}), allow_nan=False))
    assert read["facts"] == {"date": "now"}
    first, *_, last = read["rows"]
    assert first["value"] == {
        "median": 0.55, "low": 0.5, "high": 0.7, "lower_quartile": 0.525, "upper_quartile": 0.625, "count": 3,
    }
    assert first["target"] == {
        "name": "step against plain PEFT", "bound": "at most", "value": 0.6, "reached": True,
    }
    assert first["limit"]["share"]["median"] == 0.8 and first["seconds"] == [1.0, 2.0]
    assert last["value"] is None and last["target"]["reached"] is None and "no search.pack" in last["note"]


def test_a_terminal_shows_header_and_rows() -> None:
    out = io.StringIO()
    print_table(ROWS, ["a [machine]"], Console(file=out))
    text = out.getvalue()
    assert text.startswith("a [machine]\n") and "0.55×" in text and "skipped: no" in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.804, "%", "80 %"), (2.345, "×", "2.35×"), (11.96, "s", "12.0 s"), (1150.4, "tokens/s", "1,150 tokens/s")],
)
def test_units(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_bounds() -> None:
    assert Target("at most", 3.0).reached_by(3.0) and not Target("at most", 3.0).reached_by(3.01)
    assert Target("at least", 2.6).reached_by(2.6) and not Target("at least", 2.6).reached_by(2.59)
    assert not Target("below", 2.0).reached_by(2.0) and Target("below", 2.0).reached_by(1.99)
    assert replace(ROWS[0], target="").reached() is None


def test_every_target_is_some_case_s_and_every_case_s_target_exists() -> None:
    named = [target for case in CASES.values() for target in case.targets]
    assert sorted(named) == sorted(TARGETS)
