"""What the numbers say, in sentences made from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REFERENCES = ("base", "plain")
"""Keys of the systems that others are compared with."""
_FEW_ROWS = 50
"""Below this a percentile bootstrap covers clearly less than 95 %."""
_LOWER_IS_BETTER = ("lower (better)", "higher (worse)")
_HIGHER_IS_BETTER = ("lower (worse)", "higher (better)")
_WORDS = {
    "nll": _LOWER_IS_BETTER, "accuracy": _HIGHER_IS_BETTER, "pearson": _HIGHER_IS_BETTER, "rmse": _LOWER_IS_BETTER,
}
_NAMES = {"nll": "NLL", "accuracy": "accuracy", "pearson": "Pearson's correlation", "rmse": "RMSE"}


def write_reading(result: dict[str, Any]) -> str:
    """One paragraph: the scores of the run's adapter, which differences exclude 0, and what limits them."""
    sentences = [_own_scores(result)]
    for versus in REFERENCES:
        sentences += [_verdict(result, versus, score) for score in _WORDS]
    sentences += [_validation(result), _chosen_size(result), _chosen_adapters(result), _limits(result)]
    return " ".join(sentence for sentence in sentences if sentence)


def interval_text(entry: dict[str, float], digits: int = 3, signed: bool = False) -> str:
    """`0.512 [0.481, 0.544]`, of a score or a difference."""
    value = entry["difference"] if "difference" in entry else entry["value"]
    low, high = (number_text(entry[end], digits, signed) for end in ("low", "high"))
    return f"{number_text(value, digits, signed)} [{low}, {high}]"


def number_text(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number with a true minus sign."""
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def pick(result: dict[str, Any], **wanted: str) -> list[dict[str, Any]]:
    """The comparisons with these fields."""
    return [c for c in result["comparisons"] if all(c[field] == value for field, value in wanted.items())]


def _own_scores(result: dict[str, Any]) -> str:
    own = next((system for system in result["systems"] if system["key"] == "mean_field"), None)
    if own is None:
        return ""
    before, rows = own["test"]["before"], f"{result['rows']['test']} test rows"
    if result["kind"] == "regression":
        pearson, spearman, rmse = (interval_text(before[score]) for score in ("pearson", "spearman", "rmse"))
        return (f"On {rows}, the numbers that {own['name']} predicts have a correlation of {pearson} with the right "
                f"ones (Spearman's: {spearman}) and an RMSE of {rmse}.")
    nll = interval_text(before["nll"])
    if result["kind"] == "completion":
        perplexity = interval_text(before["perplexity"], 2)
        return f"On {rows}, {own['name']} has an NLL of {nll} nats per token (perplexity {perplexity})."
    after = interval_text(own["test"]["after"]["nll"])
    return (f"On {rows}, {own['name']} has an accuracy of {interval_text(before['accuracy'])} and an NLL of {nll} "
            f"nats, {after} after temperature scaling.")


def _verdict(result: dict[str, Any], versus: str, score: str) -> str:
    """Which systems differ from a reference, before and (NLL) after temperature scaling."""
    before = pick(result, split="test", versus=versus, score=score, scaling="before")
    after = pick(result, split="test", versus=versus, score=score, scaling="after") if score == "nll" else []
    if not before:
        return ""
    names = {system["key"]: system["short_name"] for system in result["systems"]}
    text = f"Against {names[versus]}, {_NAMES[score]} is {_clauses(before, names, score)}"
    return text + (f"; after temperature scaling of both it is {_clauses(after, names, score)}." if after else ".")


def _clauses(compared: Sequence[dict[str, Any]], names: dict[str, str], score: str) -> str:
    groups = {
        _WORDS[score][0]: [c for c in compared if c["excludes_zero"] and c["difference"] < 0],
        _WORDS[score][1]: [c for c in compared if c["excludes_zero"] and c["difference"] > 0],
        "not distinguishable": [c for c in compared if not c["excludes_zero"]],
    }
    groups = {words: found for words, found in groups.items() if found}
    if len(groups) == 1 and len(compared) > 1:
        return f"{next(iter(groups))} for all {len(compared)} systems"
    return ", and ".join(f"{words} for {_join([names[c['system']] for c in found])}" for words, found in groups.items())


def _validation(result: dict[str, Any]) -> str:
    score = "rmse" if result["kind"] == "regression" else "nll"
    wanted = {"split": "validation", "system": "mean_field", "versus": "base", "scaling": "before", "score": score}
    found = pick(result, **wanted)
    if not found:
        return ""
    verdict = "excludes" if found[0]["excludes_zero"] else "includes"
    return (f"On {result['rows']['validation']} validation rows, the {_NAMES[score]} of the trained adapter less that "
            f"of the base model is {interval_text(found[0], signed=True)}, which {verdict} 0.")


def _chosen_size(result: dict[str, Any]) -> str:
    if result["ensemble"] is None:
        return ""
    size = result["ensemble"]["chosen_size"]
    members = "one mask draw" if size == 1 else f"an ensemble of {size} mask draws"
    return f"Validation chooses {members}: the {result['ensemble']['rule']}."


def _chosen_adapters(result: dict[str, Any]) -> str:
    """Greedy selection comes first among the adapter ensembles; all adapters follow where it took fewer."""
    systems = [system for system in result["systems"] if system["key"].startswith("adapters_")]
    if not systems:
        return ""
    return f"Greedy selection on validation takes {systems[0]['passes']} of {systems[-1]['passes']} searched adapters."


def _limits(result: dict[str, Any]) -> str:
    rows = result["rows"]["test"]
    warning = f" With {rows} test rows the intervals themselves are too narrow to trust." if rows < _FEW_ROWS else ""
    seeds = str(result["train_seed"])
    runs = f"over training runs with the seeds {seeds}" if "," in seeds else f"of one training run with seed {seeds}"
    return (f"“Not distinguishable” means that the 95 % interval of the paired difference includes 0. The intervals "
            f"are over rows (and over mask draws, where an ensemble has fewer members than were cached) {runs}: "
            f"another seed may give other numbers, and there is no "
            f"correction for the number of comparisons.{warning}")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
