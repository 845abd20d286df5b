"""Tables of the other data sets of a run (`evaluate.also`): for the terminal, and as rows for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.also.scores import SIGNALS
from pipeline.report.scoring import AFTER, BEFORE
from pipeline.report.sentences import ece_text, interval_text
from pipeline.report.tables import HEADINGS, Cell, align, interval_cell, shortened
from pipeline.terminal import one_line

NAME = 23
"""Columns for a system's name: with three scores and their intervals the terminal's 80 are full."""


def format_also(result: Mapping[str, Any]) -> str:
    """For the terminal, in 80 columns: a table per set, scores after temperature scaling where rows have one."""
    blocks = []
    for name, one in result.get("also", {}).items():
        units = f", {one['units']} independent units" if one["units"] < one["rows"] else ""
        labels = "" if one["labels"] else "; no labels"
        rows = [["", *_headings(one)]]
        for system in one["systems"]:
            rows.append([shortened(system["name"], NAME), *(text for text, _ in _cells(one, system))])
        head = f"also {name}: {one['rows']} rows of {one['path']}{units}{labels}"
        blocks += ["", one_line(head), *align(rows), *_against_test(result, one)]
    return "\n".join(blocks)


def also_tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For the page: of each set its name, facts, and headings and rows of a table."""
    tables = []
    for name, one in result.get("also", {}).items():
        shown = _shown(one)
        headings = ["System", "Passes", *(h for s in shown for h in (HEADINGS[s], f"Δ {HEADINGS[s]}"))]
        headings += [f"AUROC, {signal.replace('_', ' ')}" for signal in _signals(one)]
        rows: list[list[Cell]] = []
        for system in one["systems"]:
            cells: list[Cell] = [(system["name"], ""), (str(system["passes"]), "")]
            for score in shown:
                entry = _scores(system)[score]
                cells += [interval_cell(entry), interval_cell(entry.get("minus_test"), signed=True)]
            for signal in _signals(one):
                cells.append(interval_cell((system["detection"].get(signal) or {}).get("auroc")))
            rows.append(cells)
        tables.append({"name": name, **{key: one[key] for key in ("path", "rows", "units", "labels", "left_out")},
                       "table": (headings, rows)})
    return tables


def _scores(system: Mapping[str, Any]) -> dict[str, Any]:
    """Those under the run's temperature, where there is one."""
    return dict(system.get(AFTER) or system.get(BEFORE) or {})


def _shown(one: Mapping[str, Any]) -> list[str]:
    """Scores that the rows of a set have."""
    return list(_scores(one["systems"][0]))


def _signals(one: Mapping[str, Any]) -> list[str]:
    """What some system tells its rows from those of the test split by."""
    return [signal for signal in SIGNALS if any(signal in system.get("detection", {}) for system in one["systems"])]


def _headings(one: Mapping[str, Any]) -> list[str]:
    if one["labels"]:
        return [HEADINGS[score].split(" (")[0] for score in _shown(one)]
    return ["AUROC, entropy", "mutual inf."]


def _cells(one: Mapping[str, Any], system: Mapping[str, Any]) -> list[Cell]:
    if one["labels"]:
        return [((ece_text if score == "ece" else interval_text)(entry, 2), "")
                for score, entry in _scores(system).items()]
    found = (system["detection"].get(signal) for signal in ("entropy", "mutual_information"))
    return [("–" if entry is None else interval_text(entry["auroc"], 2), "") for entry in found]


def _against_test(result: Mapping[str, Any], one: Mapping[str, Any]) -> list[str]:
    """One system in words: that which validation chose, or the last single one."""
    chosen = (result.get("ensemble") or {}).get("chosen")
    system = next((s for s in one["systems"] if s["key"] == chosen), one["systems"][-1])
    lines = []
    parts = [
        f"{HEADINGS[score].split(' (')[0]} {interval_text(entry['minus_test'], 2)}"
        for score, entry in _scores(system).items() if "minus_test" in entry
    ]
    if parts:
        lines += [f"{shortened(system['name'], NAME)}, minus its test split:", f"  {', '.join(parts)}"]
    if one["labels"] and "detection" in system:
        auroc = interval_text(system["detection"]["entropy"]["auroc"], 2)
        lines.append(f"  told from test rows by entropy: AUROC {auroc}")
    return lines
