"""Texts that a run wrote, beside their references: scores with intervals, a table, samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipeline.config import RunConfig
from pipeline.report.sentences import interval_text, number_text
from pipeline.report.tables import Cell, align, seconds_text
from pipeline.run_folder.generated import JoinedTexts
from pipeline.scores.bootstrap import bootstrap, percentile_interval
from pipeline.scores.generated import text_scores

NAMES = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L", "exact_match": "Exact match", "number": "Number"}
"""Score -> its one name, as in docs/glossary.md."""
SEED = 0
SAMPLES = 8
"""Prompts whose texts are shown."""
SHOWN_REFERENCES = 3
"""Of a shown prompt; the others are counted."""


def texts_entry(joined: JoinedTexts, config: RunConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """What result.json says of the texts: scores in percent with their intervals, paired differences, samples.

    Args:
        names: of the systems, by their keys.
    """
    count, writers = len(joined.prompts), joined.generated.writers
    statistics = {
        (key, name): score for key, texts in joined.texts.items()
        for name, score in text_scores([one.text for one in texts], joined.references).items()
    }
    samples = config.evaluate.bootstrap_samples
    drawn = bootstrap(list(statistics.values()), count, samples, SEED, joined.units).T
    table = dict(zip(statistics, drawn, strict=True))
    points = {where: score.point() for where, score in statistics.items()}
    scores = list(dict.fromkeys(name for _, name in statistics))
    systems = [
        {
            "key": key, "name": names.get(key, key), "passes": len(members),
            "seconds": joined.generated.seconds[key],
            "mean_tokens": sum(one.tokens for one in joined.texts[key]) / count,
            "ended": sum(one.ended for one in joined.texts[key]) / count,
            "scores": {
                name: asdict(percentile_interval(points[key, name], table[key, name])) for name in scores
            },
        }
        for key, members in writers.items()
    ]
    trained = [key for key in writers if key != "base"]
    differences = [
        {
            "system": key, "versus": versus, "score": name,
            **_difference(points[key, name] - points[versus, name], table[key, name] - table[versus, name]),
        }
        for place, key in enumerate(trained) for versus in trained[:place] for name in scores
    ]
    settings = config.evaluate.generate
    return {
        "split": "test", "prompts": count, "references": sum(map(len, joined.references)),
        "settings": {} if settings is None else settings.model_dump(mode="json"),
        "average": config.ensemble.average, "bootstrap": {"samples": samples, "seed": SEED},
        "systems": systems, "differences": differences,
        "samples": [
            {
                "prompt": joined.prompts[n], "references": list(joined.references[n]),
                "texts": {key: asdict(texts[n]) for key, texts in joined.texts.items()},
            }
            for n in range(min(SAMPLES, count))
        ],
    }


def format_texts(entry: Mapping[str, Any]) -> str:
    """The table on the terminal."""
    scores = list(entry["systems"][0]["scores"])
    rows = [["texts", "passes", *(NAMES[score] for score in scores), "tokens", "test s"]]
    for system in entry["systems"]:
        values = [interval_text(system["scores"][score], 1) for score in scores]
        costs = [number_text(system["mean_tokens"], 1), seconds_text(system["seconds"])]
        rows.append([system["name"], str(system["passes"]), *values, *costs])
    return "\n".join([*align(rows), f"{_said(entry)}; 95 % intervals, in percent."])


def texts_tables(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the page shows: tables of scores and differences, how texts were searched for, samples."""
    entry = result.get("texts")
    if entry is None:
        return None
    scores = list(entry["systems"][0]["scores"])
    names = {system["key"]: system["name"] for system in entry["systems"]}
    rows: list[list[Cell]] = []
    for system in entry["systems"]:
        cells = [_interval_cell(system["scores"][score]) for score in scores]
        costs = (str(system["passes"]), number_text(system["mean_tokens"], 1), number_text(100.0 * system["ended"], 0),
                 seconds_text(system["seconds"]))
        rows.append([(system["name"], ""), *((text, "") for text in costs), *cells])
    pairs = list(dict.fromkeys((one["system"], one["versus"]) for one in entry["differences"]))
    found = {(one["system"], one["versus"], one["score"]): one for one in entry["differences"]}
    apart = [
        [(names[key], ""), (names[versus], ""), *(_interval_cell(found[key, versus, score], True) for score in scores)]
        for key, versus in pairs
    ]
    headings = [NAMES[score] for score in scores]
    return {
        "scores": (["System", "Passes", "Tokens", "Ended, %", "Test s", *headings], rows),
        "differences": (["System", "Minus", *(f"Δ {heading}" for heading in headings)], apart) if apart else None,
        "said": _said(entry), "samples": [_sample(one, names) for one in entry["samples"]],
    }


def _sample(one: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, list[tuple[str, str]]]:
    """(prompt, [(who, text)]): references first."""
    references = one["references"][:SHOWN_REFERENCES]
    more = len(one["references"]) - len(references)
    lines = [("Reference", text) for text in references]
    lines += [("", f"and {more} more")] if more else []
    return one["prompt"], lines + [(names[key], text["text"]) for key, text in one["texts"].items()]


def _said(entry: Mapping[str, Any]) -> str:
    settings = entry["settings"]
    how = "greedy" if settings["beams"] == 1 else (
        f"beam search with {settings['beams']} beams, length penalty {settings['length_penalty']:g}")
    if settings["no_repeat_ngram"]:
        how += f", no {settings['no_repeat_ngram']}-gram twice"
    return (
        f"{entry['prompts']} prompts of the test rows with {entry['references']} references; {how}, at most"
        f" {settings['max_tokens']} tokens; members write one text together, by the mean of their distributions of the"
        f" next token (space: {entry['average']})"
    )


def _difference(value: float, resamples: Any) -> dict[str, Any]:
    found = percentile_interval(value, resamples)
    return {"difference": value, "low": found.low, "high": found.high, "excludes_zero": found.excludes_zero}


def _interval_cell(entry: Mapping[str, Any], signed: bool = False) -> Cell:
    low, high = (number_text(entry[end], 1, signed) for end in ("low", "high"))
    if not signed:
        return number_text(entry["value"], 1), f"{low} – {high}"
    return number_text(entry["difference"], 1, True) + ("" if entry["excludes_zero"] else " ∋ 0"), f"{low} … {high}"
