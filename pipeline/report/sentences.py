"""What the numbers say, in sentences made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

REFERENCES = ("base", "plain", "teacher")
"""Keys of the systems that others are compared with."""
_FEW_ROWS = 50
"""Below this a percentile bootstrap covers clearly less than 95 %."""
_NAMES = {
    "nll": "NLL", "ece": "ECE (debiased)", "accuracy": "accuracy", "pearson": "Pearson's correlation", "rmse": "RMSE",
}
_HIGHER_IS_BETTER = ("accuracy", "pearson")


def write_reading(result: dict[str, Any]) -> list[str]:
    """A few short lines: the scores of the run's adapter; how it, and the read-out that validation chose, differ from
    each reference; what was chosen; limits. All other differences stand in the table."""
    lines = [_own_scores(result), *(_verdicts(result, versus) for versus in REFERENCES)]
    lines += [" ".join(filter(None, (_validation(result), _chosen_size(result), _chosen_adapters(result))))]
    lines += [_adaptive(result)]
    return [line for line in [*lines, _limits(result)] if line]


def tuning_line(search: Mapping[str, Any] | None) -> str:
    """That plain LoRA was tuned as the method was; empty where it was not."""
    if search is None or not search.get("plain"):
        return ""
    own, plain = len(search["trials"]), len(search["plain"]["trials"])
    how = f"{own} settings each" if own == plain else f"{own} settings of the method and {plain} of plain LoRA"
    return f"Plain LoRA has settings of its own, tuned as those of the method were: {how}, chosen by the same rule."


def interval_text(entry: dict[str, float], digits: int = 3, signed: bool = False) -> str:
    """`0.512 [0.481, 0.544]`, of a score or a difference."""
    value = entry["difference"] if "difference" in entry else entry["value"]
    low, high = (number_text(entry[end], digits, signed) for end in ("low", "high"))
    return f"{number_text(value, digits, signed)} [{low}, {high}]"


def ece_text(entry: dict[str, float], digits: int = 3) -> str:
    """As `interval_text`; where the estimate is 0 (chance outweighs it) its upper bound alone: `≤ 0.045`."""
    return interval_text(entry, digits) if entry["value"] > 0.0 else f"≤ {number_text(entry['high'], digits)}"


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


def _verdicts(result: dict[str, Any], versus: str) -> str:
    """In which scores the systems in question are better or worse than a reference; those alike are named together."""
    names = {system["key"]: system["short_name"] for system in result["systems"]}
    shown = {"mean_field", (result["ensemble"] or {}).get("chosen")}
    if "mean_field" not in names:  # a comparison
        shown = {key for key in names if key.startswith(("plain", "method_"))}
    found: dict[str, dict[str, list[str]]] = {}
    for one in pick(result, split="test", versus=versus):
        score, scaled = one["score"], " scaled" if one["scaling"] == "after" else ""
        if one["system"] in shown and score in _NAMES and not (scaled and score == "accuracy"):
            verdicts = found.setdefault(names[one["system"]], {})
            verdicts.setdefault(_verdict(one), []).append(_NAMES[score] + scaled)
    alike: dict[str, list[str]] = {}
    for name, verdicts in found.items():
        text = "; ".join(f"{words} in {join(verdicts[words])}" for words in _VERDICTS if words in verdicts)
        alike.setdefault(text, []).append(name)
    return " ".join(f"Against {names[versus]}, {join(systems)}: {text}." for text, systems in alike.items())


_VERDICTS = ("better", "worse", "open (too few seeds for a claim)", "not distinguishable")


def _verdict(compared: dict[str, Any]) -> str:
    if not compared["claims"]:
        return _VERDICTS[2 if compared["excludes_zero"] else 3]
    return _VERDICTS[(compared["difference"] > 0.0) != (compared["score"] in _HIGHER_IS_BETTER)]


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
    ensemble = result["ensemble"]
    chosen = "no mask ensemble" if ensemble["chosen"] == "mean_field" else f"{ensemble['chosen_name']} averaged"
    stopped = (f" No more than {max(ensemble['sizes'])} masks were drawn: the last round lowered validation NLL by one"
               " paired standard error at most." if ensemble.get("stopped") else "")
    return f"Validation chooses {chosen}: the {ensemble['rule']}.{stopped}"


def _chosen_adapters(result: dict[str, Any]) -> str:
    """Greedy selection comes first among the adapter ensembles; all adapters follow where it took fewer."""
    systems = [system for system in result["systems"] if system["key"].startswith("adapters_")]
    if not systems:
        return ""
    return f"Of {systems[-1]['passes']} searched adapters validation takes {systems[0]['passes']}, by the same rule."


def _adaptive(result: dict[str, Any]) -> str:
    """What drawing until a row is settled saves and costs, of all draws."""
    found = (result["ensemble"] or {}).get("adaptive")
    if not found:
        return ""
    last = found[-1]
    return (f"Drawn until a row's answer is settled, {last['size']} masks take {number_text(last['passes'], 1)} passes "
            f"per test row; {number_text(100.0 * last['changed']['value'], 1)} % of answers change, and the NLL by "
            f"{interval_text(last['nll']['after'], signed=True)} after scaling.")


def _limits(result: dict[str, Any]) -> str:
    rows, units = result["rows"]["test"], result["units"]["test"]
    warning = f" With {units} test rows the intervals themselves are too narrow to trust." if units < _FEW_ROWS else ""
    seeds = str(result["train_seed"])
    over = (f"over rows and over the training seeds {seeds}" if "," in seeds else
            f"over rows, of one training run with seed {seeds}: another seed may give other numbers")
    shared = f" ({units} independent units)" if units < rows else ""
    return (f"“Not distinguishable”: the 95 % interval of the paired difference includes 0. Intervals are {over}; "
            f"{rows} test rows{shared}; no correction for the number of comparisons.{warning}")


def join(parts: Sequence[str]) -> str:
    """`a, b and c`; with semicolons where a part has commas of its own."""
    comma = "; " if any("," in part for part in parts) else ", "
    return parts[0] if len(parts) == 1 else comma.join(parts[:-1]) + (" and " if comma == ", " else "; ") + parts[-1]
