"""Tables: for the terminal, and as rows for the page."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.remarks import NEXT, chance_line
from pipeline.report.sentences import ece_text, interval_text, number_text
from pipeline.terminal import one_line

Cell = tuple[str, str]
"""Main text, and smaller lines below it (an interval)."""

HEADINGS = {
    "accuracy": "Accuracy", "nll": "NLL", "brier": "Brier", "ece": "ECE (debiased)", "ece_plugin": "ECE (plug-in)",
    "ece_classwise": "ECE (classwise)", "ece_adaptive": "ECE (adaptive, plug-in)",
    "ece_classwise_plugin": "ECE (classwise, plug-in)", "perplexity": "Perplexity",
    "matthews": "Matthews", "f1": "F1", "pearson": "Pearson", "spearman": "Spearman", "rmse": "RMSE",
}
"""Score -> its one name, as in docs/glossary.md."""
_SCORES = {
    "choice": ("accuracy", "matthews", "f1", "nll", "brier", "ece", "ece_classwise", "ece_plugin"),
    "completion": ("nll", "perplexity"),
    "regression": ("pearson", "spearman", "rmse"),
}
_NAME = 26
"""Characters of a name on one line, where the terminal is too narrow for longer ones."""
UNCERTAINTY_NOTE = (
    "uncertainty: before scaling; entropy and mutual information (MI) in nats; AURC:",
    "mean error rate of the surest rows, over how many they are; AUROC: the chance",
    "that a wrong answer is less confident than a right one (0.5 tells nothing).",
)
_WIDTH = 80
"""Columns of the terminal, which the tables of uncertainty keep to."""
_UNSCALED = ("accuracy", "matthews", "f1")
_SCALED_TOO = ("ece_adaptive", "ece_classwise_plugin")
"""Of the page's table of scores after scaling alone; before, they stand in result.json."""
_TERMINAL = {
    "choice": ("accuracy", "nll", "ece"), "completion": ("nll", "perplexity"),
    "regression": ("pearson", "spearman", "rmse"),
}  # fmt: skip


def format_table(result: dict[str, Any]) -> str:
    """The short table that a run ends with: plain text, one line per system, then what it does not say by itself."""
    shown = _TERMINAL[result["kind"]]
    rows = [["", "passes", *(HEADINGS[score] for score in shown), "train s", "test s"]]
    for system in result["systems"]:
        scores = [score_text(score, system["test"]["before"][score]) for score in shown]
        rows.append([system["name"], str(system["passes"]), *scores, *_cost_texts(system)])
    title = [result["label"]] if result["label"] else []
    lines = [*title, *align(rows), *scaled_lines(result), *uncertainty_lines(result), *_footnote(result),
             *closing_lines(result)]
    return "\n".join(map(one_line, lines))


def scaled_lines(result: dict[str, Any]) -> list[str]:
    """The table of scores after temperature scaling; none where rows have no temperature."""
    if result["kind"] != "choice":
        return []
    rows = [["after temperature scaling", "T", HEADINGS["nll"], HEADINGS["ece"]]]
    for system in result["systems"]:
        after = system["test"]["after"]
        scores = [score_text(score, after[score]) for score in ("nll", "ece")]
        rows.append([system["name"], temperature_text(system["temperature"]), *scores])
    return align(rows)


def uncertainty_lines(result: Mapping[str, Any]) -> list[str]:
    """The table on the terminal, 80 columns at most; none where rows have no choices."""
    if result["kind"] != "choice":
        return []
    shown = {"entropy": "entropy", "mutual_information": "MI", "aurc": "AURC"}
    rows = [["uncertainty", *shown.values(), "AUROC of errors"]]
    for system in result["systems"]:
        found = system["uncertainty"]
        values = [_plain_value(found.get(score)) for score in shown]
        auroc = found["auroc_confidence"]
        rows.append([system["name"], *values, "–" if auroc is None else interval_text(auroc)])
    rest = sum(2 + max(len(row[column]) for row in rows) for column in range(1, len(rows[0])))
    named = [[shortened(row[0], _WIDTH - rest), *row[1:]] for row in rows]
    return [*align(named), *_rater_lines(result)]


def closing_lines(result: dict[str, Any]) -> list[str]:
    """Chance, remarks, each on a line; those that say what to do next are no warnings."""
    marked = (one if one.startswith(NEXT) else f"! {one}" for one in result["remarks"])
    return [line for line in (chance_line(result), *marked) if line]


def score_text(score: str, entry: Mapping[str, float]) -> str:
    """A score with its interval; of a debiased ECE of 0 its upper bound."""
    texts = ece_text if score in ("ece", "ece_classwise") else interval_text
    return texts(dict(entry), _digits(score))


def seconds_text(seconds: float) -> str:
    """A tenth where there are few."""
    return number_text(seconds, 0 if seconds >= 10.0 else 1)


def temperature_text(temperature: Mapping[str, Any]) -> str:
    """`1.32 [1.10, 1.58]`; `~` before one that the rows do not carry, `!` before one at its bound."""
    mark = "!" if temperature["at_bound"] else "" if temperature["carried"] else "~"
    return mark + interval_text({"value": temperature["mean"], **{end: temperature[end] for end in ("low", "high")}}, 2)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table, the headings first: its first column to the left, the others to the right.

    Where the terminal is too narrow (80 columns where there is none), long names take several lines, and columns that
    find no room stand in a table below, behind the names again.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    most = max(80, shutil.get_terminal_size((80, 24)).columns)
    names = [[row[0]] for row in rows]
    if sum(widths) + 2 * (len(widths) - 1) > most:
        names = [textwrap.wrap(row[0], _NAME, subsequent_indent="  ", break_on_hyphens=False) or [""] for row in rows]
        widths[0] = max(len(line) for name in names for line in name)
    parts: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if parts[-1] and widths[0] + sum(2 + widths[other] for other in (*parts[-1], column)) > most:
            parts.append([])
        parts[-1].append(column)
    lines: list[str] = []
    for columns in parts:
        rule = "─" * (widths[0] + sum(2 + widths[column] for column in columns))
        for number, ((first, *more), row) in enumerate(zip(names, rows, strict=True)):
            cells = (row[column].rjust(widths[column]) for column in columns)
            lines += ["  ".join([first.ljust(widths[0]), *cells]), *more, *([] if number else [rule])]
        lines.append(rule)
    return lines


def summary_table(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the page's summary: cost and every score as predicted."""
    shown = [score for score in _SCORES[result["kind"]] if score in result["systems"][0]["test"]["before"]]
    compared = any("train_steps" in system for system in result["systems"])
    headings = ["System", "Passes", *(["Train steps"] if compared else []), "Train s", "Test s"]
    headings += [HEADINGS[score] for score in shown]
    rows = []
    for system in result["systems"]:
        scores = [_score_cell(score, system["test"]["before"][score]) for score in shown]
        steps = [str(system.get("train_steps", "–"))] if compared else []
        costs = [str(system["passes"]), *steps, *_cost_texts(system)]
        rows.append([_name_cell(system), *((text, "") for text in costs), *scores])
    return headings, rows


def scaled_table(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]] | None:
    """Headings and rows of the scores after temperature scaling; None where rows have no temperature."""
    if result["kind"] != "choice":
        return None
    asked = [score for score in _SCORES["choice"] if score not in _UNSCALED] + [*_SCALED_TOO]
    shown = [score for score in asked if score in result["systems"][0]["test"]["after"]]
    rows = []
    for system in result["systems"]:
        scores = [_score_cell(score, system["test"]["after"][score]) for score in shown]
        rows.append([_name_cell(system), _temperature_cell(system["temperature"]), *scores])
    return ["System", "Temperature", *(HEADINGS[score] for score in shown)], rows


def comparison_table(result: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the paired differences, one line per system, reference and split."""
    places = {score: place for place, score in enumerate(HEADINGS)}
    kinds = sorted({(c["score"], c["scaling"]) for c in result["comparisons"]} - {("accuracy", "after")},
                   key=lambda kind: (kind[0] != "nll", places[kind[0]], kind[1] != "before"))
    headings = ["System", "Minus"]
    headings += [f"Δ {HEADINGS[score]}" + (", scaled" if scaling == "after" else "") for score, scaling in kinds]
    names = {system["key"]: system["name"] for system in result["systems"]}
    short_names = {system["key"]: system["short_name"] for system in result["systems"]}
    lines: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for entry in result["comparisons"]:
        line = lines.setdefault((entry["versus"], entry["split"], entry["system"]), {})
        line[entry["score"], entry["scaling"]] = entry
    rows = [
        [(names[system], ""), (short_names[versus], f"{split} rows"), *(_difference_cell(line[k]) for k in kinds)]
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
    headings = ["Trial", *keys, "Steps", "State", "Validation loss", "Validation NLL", "Validation accuracy"]
    ordered = sorted(trials, key=_trial_order)
    rows = []
    for trial in ordered:
        best = "best" if trial.get("name") == search.get("best") else ""
        values = [_value_text(trial.get("config", {}).get(key)) for key in keys]
        shown = ("validation_loss", "validation_nll", "validation_accuracy")
        scores = [_value_text(trial.get(key), ".3f") for key in shown]
        cells = [*values, str(trial.get("steps", "")), str(trial.get("state", "")), *scores]
        rows.append([(str(trial.get("name", "")), best), *((cell, "") for cell in cells)])
    return headings, rows


def _trial_order(trial: Mapping[str, Any]) -> tuple[bool, float, bool, float]:
    """By what chose among them; those without it (stopped, failed) by the NLL they were seen with."""
    loss, nll = trial.get("validation_loss"), trial.get("validation_nll")
    return loss is None, loss or 0.0, nll is None, nll or 0.0


def rows_text(result: Mapping[str, Any]) -> str:
    """How many test rows, and independent units where these are fewer."""
    rows, units = result["rows"]["test"], result["units"]["test"]
    return f"{rows} test rows" + (f" ({units} independent units)" if units < rows else "")


def _footnote(result: dict[str, Any]) -> list[str]:
    rows = rows_text(result)
    cost = "train s: in optimizer steps; test s: to predict the test rows."
    if result["kind"] == "regression":
        return [f"{rows}, 95 % intervals; RMSE in the units of the scores; {cost}"]
    if result["kind"] == "completion":
        return [f"{rows}, 95 % intervals; NLL in nats per token; {cost}"]
    return [
        f"{rows}, 95 % intervals; NLL in nats; ECE debiased, {result['ece']['bins']} equal-mass bins (≤: its upper "
        "bound, where the estimate is 0);",
        f"T: temperature, fitted on {result['rows']['calibration']} calibration rows and shrunk towards 1 (~: those "
        "rows do not carry it);",
        cost,
        *UNCERTAINTY_NOTE,
    ]


def _rater_lines(result: Mapping[str, Any]) -> list[str]:
    """Agreement with people, in a line per system."""
    if result["raters"] is None:
        return []
    rows = [["agreement with raters", "cross-entropy", "scaled", "JS divergence", "scaled"]]
    for system in result["systems"]:
        test = system["test"]
        rows.append([shortened(system["name"], 34), *(
            number_text(test[scaling][score]["value"])
            for score in ("rater_cross_entropy", "rater_divergence") for scaling in ("before", "after")
        )])
    return [*align(rows), f"The raters' own entropy is {number_text(result['raters']['entropy'])} nats: no "
            "cross-entropy is below it."]


def _digits(score: str) -> int:
    return 2 if score == "perplexity" else 3


def _name_cell(system: Mapping[str, Any]) -> Cell:
    what = "seeds" if system["train_seeds"] else "subsets"
    return system["name"], f"mean of {system['subsets']} {what}" if system["subsets"] > 1 else ""


def _cost_texts(system: Mapping[str, Any]) -> list[str]:
    """Seconds of training, and of predicting the test rows."""
    train = system["train_seconds"]
    return ["–" if train is None else seconds_text(train), seconds_text(system["evaluate_seconds"])]


def _score_cell(score: str, entry: Mapping[str, float]) -> Cell:
    digits = _digits(score)
    low, high = number_text(entry["low"], digits), number_text(entry["high"], digits)
    runs = f"\nruns ± {number_text(entry['run_sd'], digits)}" if "run_sd" in entry else ""
    if score in ("ece", "ece_classwise") and entry["value"] == 0.0:
        return f"≤ {high}", runs
    return number_text(entry["value"], digits), f"{low} – {high}{runs}"


def interval_cell(entry: Mapping[str, float] | None, signed: bool = False) -> Cell:
    """A value with its interval below; a dash where there is none."""
    if entry is None:
        return "–", ""
    low, value, high = (number_text(entry[end], signed=signed) for end in ("low", "value", "high"))
    return value, f"{low} … {high}" if signed else f"{low} – {high}"


def _difference_cell(entry: Mapping[str, Any]) -> Cell:
    low, high = (number_text(entry[end], signed=True) for end in ("low", "high"))
    few = "\nfew seeds" if entry["excludes_zero"] and not entry["claims"] else ""
    value = number_text(entry["difference"], signed=True) + ("" if entry["excludes_zero"] else " ∋ 0")
    return value, f"{low} … {high}{few}"


def _temperature_cell(temperature: Mapping[str, Any]) -> Cell:
    low, high = (number_text(temperature[end], 2) for end in ("low", "high"))
    said = "\nat its bound" if temperature["at_bound"] else "" if temperature["carried"] else "\nnot carried"
    return number_text(temperature["mean"], 2), f"{low} – {high}{said}"


def _plain_value(entry: Mapping[str, float] | None) -> str:
    return "–" if entry is None else number_text(entry["value"])


def shortened(text: str, length: int) -> str:
    """At most so many characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _value_text(value: Any, form: str = ".3g") -> str:
    return "–" if value is None else f"{value:{form}}" if isinstance(value, float) else str(value)
