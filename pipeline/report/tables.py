"""Tables: for the terminal, and as rows for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.sentences import interval_text, number_text
from pipeline.terminal import one_line, printable

Cell = tuple[str, str]
"""Main text, and a smaller one below it (an interval)."""

HEADINGS = {
    "accuracy": "Accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE", "perplexity": "Perplexity",
    "matthews": "Matthews", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman", "rmse": "RMSE",
}
_SCORES = {
    "choice": ("accuracy", "matthews", "f1", "nll", "brier", "ece"),
    "completion": ("nll", "perplexity"),
    "regression": ("pearson", "spearman", "rmse"),
}


def format_table(result: dict[str, Any]) -> str:
    """The short table that a run ends with: plain text, one line per system, intervals for the NLL."""
    columns = {
        "choice": ["accuracy", "NLL [95 % interval]", "ECE", "NLL scaled", "ECE scaled"],
        "completion": ["NLL [95 % interval]", "perplexity"],
        "regression": ["Pearson [95 % interval]", "Spearman", "RMSE"],
    }
    headings = ["", "passes", *columns[result["kind"]]]
    rows = [headings, *([_plain_row(system, result["kind"]) for system in result["systems"]])]
    title = [f"*** {result['label']} ***"] if result["label"] else []
    return printable("\n".join([*map(one_line, title), *align(rows), _footnote(result)]))


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table, the headings first: its first column to the left, the others to the right."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    rule = "─" * len(lines[0])
    return [lines[0], rule, *lines[1:], rule]


def summary_table(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the page's summary: every score before and after temperature scaling."""
    headings, columns = ["System", "Passes"], []
    shown = [score for score in _SCORES[result["kind"]] if score in result["systems"][0]["test"]["before"]]
    for score in shown:
        scaled = result["kind"] == "choice" and score not in ("accuracy", "matthews", "f1")
        columns += [(score, "before")] + ([(score, "after")] if scaled else [])
        headings += [HEADINGS[score]] + ([f"{HEADINGS[score]}, scaled"] if scaled else [])
    if result["kind"] == "choice":
        headings.append("Temperature")
    rows = []
    for system in result["systems"]:
        what = "seeds" if "seeds" in system else "subsets"
        subsets = f"mean of {system['subsets']} {what}" if system["subsets"] > 1 else ""
        row = [(system["name"], subsets), (str(system["passes"]), "")]
        row += [_interval_cell(system["test"][scaling][score], _digits(score)) for score, scaling in columns]
        rows.append(row + ([_temperature_cell(system["temperature"])] if system["temperature"] else []))
    return headings, rows


def comparison_table(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the paired differences, one line per system, reference and split."""
    kinds = sorted({(c["score"], c["scaling"]) for c in result["comparisons"]} - {("accuracy", "after")},
                   key=lambda kind: (kind[0] != "nll", kind[1] != "before"))
    headings = ["System", "Minus", "Split"]
    headings += [f"Δ {HEADINGS[score]}" + (", scaled" if scaling == "after" else "") for score, scaling in kinds]
    names = {system["key"]: system["name"] for system in result["systems"]}
    short_names = {system["key"]: system["short_name"] for system in result["systems"]}
    lines: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for entry in result["comparisons"]:
        line = lines.setdefault((entry["versus"], entry["split"], entry["system"]), {})
        line[entry["score"], entry["scaling"]] = entry
    rows = [
        [(names[system], ""), (short_names[versus], ""), (split, ""), *(_difference_cell(line[k]) for k in kinds)]
        for (versus, split, system), line in lines.items()
    ]
    return headings, rows


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of nested mappings, for the environment table."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        rows += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", str(value))]
    return rows


def trial_table(search: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the searched configurations, best first; trials without a score last."""
    trials: Sequence[Mapping[str, Any]] = search.get("trials", ())
    keys = list(dict.fromkeys(key for trial in trials for key in trial.get("config", {})))
    headings = ["Trial", *keys, "Steps", "State", "Validation NLL", "Validation accuracy"]
    ordered = sorted(trials, key=lambda t: (t.get("validation_nll") is None, t.get("validation_nll") or 0.0))
    rows = []
    for trial in ordered:
        best = "best" if trial.get("name") == search.get("best") else ""
        values = [_value_text(trial.get("config", {}).get(key)) for key in keys]
        scores = [_value_text(trial.get(key), ".3f") for key in ("validation_nll", "validation_accuracy")]
        cells = [*values, str(trial.get("steps", "")), str(trial.get("state", "")), *scores]
        rows.append([(str(trial.get("name", "")), best), *((cell, "") for cell in cells)])
    return headings, rows


def _plain_row(system: dict[str, Any], kind: str) -> list[str]:
    before = system["test"]["before"]
    row = [system["name"], str(system["passes"])]
    if kind == "regression":
        numbers = [number_text(before[score]["value"]) for score in ("spearman", "rmse")]
        return [*row, interval_text(before["pearson"]), *numbers]
    if kind == "completion":
        return [*row, interval_text(before["nll"]), number_text(before["perplexity"]["value"], 2)]
    after = system["test"]["after"]
    numbers = [number_text(entry["value"]) for entry in (before["ece"], after["nll"], after["ece"])]
    return [*row, number_text(before["accuracy"]["value"]), interval_text(before["nll"]), *numbers]


def _footnote(result: dict[str, Any]) -> str:
    if result["kind"] == "regression":
        return f"{result['rows']['test']} test rows; RMSE in the units of the scores."
    rows = f"{result['rows']['test']} test rows; NLL in nats"
    if result["kind"] == "completion":
        return f"{rows} per token; passes = forward passes per row."
    return (f"{rows}; ECE debiased, {result['ece']['bins']} equal-mass bins; scaled = temperature fitted on "
            f"{result['rows']['calibration']} calibration rows.")


def _digits(score: str) -> int:
    return 2 if score == "perplexity" else 3


def _interval_cell(entry: Mapping[str, float], digits: int) -> Cell:
    low, high = number_text(entry["low"], digits), number_text(entry["high"], digits)
    return number_text(entry["value"], digits), f"{low} – {high}"


def _difference_cell(entry: Mapping[str, float]) -> Cell:
    low, high = (number_text(entry[end], signed=True) for end in ("low", "high"))
    verdict = "" if entry["excludes_zero"] else " ∋ 0"
    return number_text(entry["difference"], signed=True), f"{low} … {high}{verdict}"


def _temperature_cell(temperature: Mapping[str, Any]) -> Cell:
    return number_text(temperature["mean"], 2), "at its bound" if temperature["at_bound"] else ""


def _value_text(value: Any, form: str = ".3g") -> str:
    return "–" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)
