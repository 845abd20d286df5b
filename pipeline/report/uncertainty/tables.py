"""The page's tables of uncertainty, and rows to look at with their texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.data.rows import Row
from pipeline.report.sentences import number_text
from pipeline.report.tables import Cell, interval_cell, shortened

NAMES = {
    "entropy": "Entropy", "expected_entropy": "Expected entropy", "mutual_information": "Mutual information",
    "aurc": "AURC", "e_aurc": "E-AURC", "auroc_confidence": "AUROC (confidence)", "auroc_entropy": "AUROC (entropy)",
    "auroc_mutual_information": "AUROC (mutual inf.)",
}
"""Score -> its one name, as in docs/glossary.md."""
RATER_NAMES = {
    "rater_cross_entropy": "Cross-entropy", "rater_divergence": "JS divergence", "rater_entropy": "Entropy correlation",
}
_LONGEST_TEXT = 400
_CHOICES_SHOWN = 4


def uncertainty_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]] | None:
    """Headings and rows of the page; None where rows have no choices."""
    if result["kind"] != "choice":
        return None
    rows = [
        [(system["name"], ""), *(interval_cell(system["uncertainty"].get(score)) for score in NAMES)]
        for system in result["systems"]
    ]
    return ["System", *NAMES.values()], rows


def rater_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[Cell]]] | None:
    """Headings and rows of agreement with people, before and after scaling; None where nobody was asked."""
    if result["raters"] is None:
        return None
    kinds = [(score, scaling) for score in RATER_NAMES for scaling in ("before", "after")]
    headings = [RATER_NAMES[score] + (", scaled" if scaling == "after" else "") for score, scaling in kinds]
    rows = [
        [(system["name"], ""), *(interval_cell(system["test"][scaling][score]) for score, scaling in kinds)]
        for system in result["systems"]
    ]
    return ["System", *headings], rows


def row_lists(result: Mapping[str, Any], test_rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The rows to look at, with their texts: list -> what the page shows of each row. Not escaped."""
    found, by_id = result["rows_to_see"], {row.id: row for row in test_rows}
    if found is None:
        return {}
    lists = ("disagreement", "confidently_wrong")
    return {name: [_shown(entry, by_id[entry["id"]]) for entry in found[name]] for name in lists}


def _shown(entry: Mapping[str, Any], row: Row) -> dict[str, Any]:
    texts = [shortened(" ".join(choice.split()), 80) for choice in row.choices]
    order = sorted(range(len(texts)), key=lambda choice: -entry["probabilities"][choice])[:_CHOICES_SHOWN]
    shown = order if entry["right"] in order else [*order[:-1], entry["right"]]
    chosen, probability = entry["members"]["chosen"], entry["members"]["probability"]
    counts = [f"{count} × {texts[choice]}" for choice, count in Counter(chosen).most_common(_CHOICES_SHOWN)]
    return {
        "id": entry["id"],
        "texts": [_middle_cut(text, _LONGEST_TEXT) for text in (row.prompt, row.second) if text],
        "choices": [
            {"text": texts[choice], "probability": entry["probabilities"][choice], "right": choice == entry["right"],
             "predicted": choice == entry["predicted"]}
            for choice in shown
        ],
        "members": ", ".join(counts) if len(chosen) > 1 else "",
        "range": f"{number_text(min(probability), 2)} – {number_text(max(probability), 2)}",
        "mutual_information": number_text(entry["mutual_information"]),
    }


def _middle_cut(text: str, length: int) -> str:
    """Both ends of a long text: what is asked often stands last."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
