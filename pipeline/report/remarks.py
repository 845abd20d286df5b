"""What a table must say besides its numbers: chance, warnings about single systems, and what to do next and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.inputs import ReportInputs, TrainingCurve
from pipeline.report.sentences import join, number_text, pick
from pipeline.report.systems import method_label
from pipeline.run_folder.comparison import REFERENCE, Training, values_text

NEXT = "Next:"
"""What a remark begins with that says what to do."""
_POWER = (1.96 + 0.84) ** 2 / 1.96**2
"""Times as many rows as an interval needs to just exclude 0 in the mean, for it to do so in four samples of five."""
_MOST_ROWS = 100
"""Times as many test rows: what would need more is called out of reach."""


def chance(inputs: ReportInputs) -> dict[str, float] | None:
    """What guessing gives on the test rows, exactly; None where nothing can be guessed (completion data).

    Choices: every choice of a row alike, and always the most frequent answer. Numbers: always the mean.
    """
    split = inputs.splits["test"]
    if inputs.kind == "completion":
        return None
    if inputs.kind == "regression":
        return {"rmse": float(np.std(split.labels)), "pearson": 0.0, "spearman": 0.0}
    choices = np.isfinite(split.outputs[0]).sum(axis=-1)
    return {
        "accuracy": float((1.0 / choices).mean()),
        "nll": float(np.log(choices).mean()),
        "most_frequent": float(np.bincount(split.labels).max() / len(split.labels)),
    }


def chance_line(result: Mapping[str, Any]) -> str:
    """The chance line of a table; empty where there is none."""
    found = result["chance"]
    if found is None:
        return ""
    if result["kind"] == "regression":
        return f"Chance: always the mean has an RMSE of {number_text(found['rmse'])} and no correlation."
    return (f"Chance: guessing has an accuracy of {number_text(found['accuracy'])} and an NLL of "
            f"{number_text(found['nll'])}; always the most frequent answer is right in "
            f"{number_text(found['most_frequent'])}.")


def remarks(inputs: ReportInputs, result: Mapping[str, Any]) -> list[str]:
    """Warnings first, then what to do next; a sentence each."""
    return [
        *_warnings(result), *_edges(inputs), *_seconds(inputs), *_ended_early(inputs, result),
        *_next_steps(inputs, result),
    ]


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    systems: Sequence[Mapping[str, Any]] = result["systems"]

    def of(names: Sequence[str], every: str = "every system") -> str:
        return every if len(names) == len(systems) > 1 else join(list(dict.fromkeys(names)))

    if constant := [s["name"] for s in systems if s["top_choices"] and max(s["top_choices"]) == 1.0]:
        yield f"One answer for all test rows: {of(constant)}."
    guess = (result["chance"] or {}).get("nll")
    if guess is not None:
        worse = [s["name"] for s in systems if s["test"]["before"]["nll"]["value"] > guess]
        if worse:
            yield f"NLL above that of guessing ({number_text(guess)}) before scaling: {of(worse)}."
    mean = (result["chance"] or {}).get("rmse")
    if mean is not None and (worse := [s["name"] for s in systems if s["test"]["before"]["rmse"]["value"] > mean]):
        yield f"RMSE above that of always the mean ({number_text(mean)}): {of(worse)}."
    scaled = [s for s in systems if s["temperature"]]
    if bound := [s["name"] for s in scaled if s["temperature"]["at_bound"]]:
        yield f"Temperature at the bound of its search: {of(bound)}. Its scaled scores mean little."
    if weak := [s["name"] for s in scaled if not s["temperature"]["carried"]]:
        rows, units = result["rows"]["calibration"], result["units"]["calibration"]
        told = f"{rows} calibration rows" + (f" ({units} independent units)" if units < rows else "")
        yield (f"{told} carry no temperature of {of(weak, 'any system')}: they say less about it than "
               "the assumption that it is near 1, which it is shrunk to.")
    seeds = max((len(s["train_seeds"]) for s in systems), default=0)
    if 1 < seeds < result["claim_seeds"]:
        yield (f"{seeds} seeds are too few for a claim about methods: with one degree of freedom the intervals over "
               f"seeds are honest and wide. Give compare.seeds at least {result['claim_seeds']}, better 5.")


def _edges(inputs: ReportInputs) -> Iterator[str]:
    """Choices that lie at the edge of what was tried."""
    yield from (inputs.search or {}).get("warnings", ())
    found, pairs = edges(inputs.trainings or ())
    if found:
        yield f"Chosen at the edge of what was tried: {'; '.join(found)}. The best may lie beyond it."
    if pairs:
        yield f"Of two values every choice is at the edge ({', '.join(pairs)}): the best may lie beyond them."
    if uneven := larger_grids(inputs.trainings or ()):
        yield (f"Chosen among more settings than plain LoRA: {'; '.join(uneven)}. That favours them; give plain LoRA "
               "as many: {name: none, adapter: {method: none}, vary: {train.learning_rate: [...]}}.")


def _seconds(inputs: ReportInputs) -> Iterator[str]:
    if any(one.packed for one in inputs.trainings or ()):
        yield ("Trained together: seconds of training are those of all trainings that shared a pass, and no cost of a "
               "step is compared. launch.processes=1 trains one after another.")


def larger_grids(trainings: Sequence[Training]) -> list[str]:
    """`HiddenKey (4, plain LoRA 2)` for every method that was trained at more settings than the reference."""
    tried: dict[str, set[str]] = {}
    for one in trainings:
        if one.state == "done":
            tried.setdefault(one.method, set()).add(str(one.values))
    own = len(tried.get(REFERENCE, ()))
    return [f"{method_label(method)} ({len(values)}, plain LoRA {own})"
            for method, values in tried.items() if 0 < own < len(values)]


def edges(trainings: Sequence[Training]) -> tuple[list[str], list[str]]:
    """`LoRA Dropout: lr 0.002 (largest of 3)` for every chosen number that is an end of its grid; `lr 0.001 and
    0.002` for every grid of two values, which has nothing but ends."""
    found: list[str] = []
    pairs: list[str] = []
    for one in trainings:
        if not one.chosen:
            continue
        for key, value in one.values.items():
            grid = {t.values[key] for t in trainings if t.method == one.method and _is_number(t.values.get(key))}
            if not _is_number(value) or len(grid) < 2 or min(grid) < value < max(grid):
                continue
            if len(grid) == 2:
                pairs.append(f"{values_text({key: min(grid)})} and {max(grid):g}")
            else:
                end = "largest" if value == max(grid) else "smallest"
                found.append(f"{method_label(one.method)}: {values_text({key: value})} ({end} of {len(grid)})")
    return list(dict.fromkeys(found)), list(dict.fromkeys(pairs))


def _ended_early(inputs: ReportInputs, result: Mapping[str, Any]) -> Iterator[str]:
    names, train = {system["key"]: system["name"] for system in result["systems"]}, inputs.config.train
    if train.patience is None or inputs.trainings is not None:
        return
    for key, curve in inputs.curves.items():
        if (last := max(curve.loss)) < train.max_steps and key in names:
            yield (f"{names[key]} was trained for {last} of {train.max_steps} steps: {train.patience} validations in a"
                   " row were no improvement (train.patience).")


def _next_steps(inputs: ReportInputs, result: Mapping[str, Any]) -> Iterator[str]:
    names = {system["key"]: system["name"] for system in result["systems"]}
    if inputs.trainings is None:
        curves = {names[key]: curve for key, curve in inputs.curves.items() if key in names}
    else:
        chosen = [one for one in inputs.trainings if one.chosen and one.name in inputs.curves]
        curves = {f"{method_label(one.method)} (seed {one.seed})": inputs.curves[one.name] for one in chosen}
    longer = [name for name, curve in curves.items() if _falls_to_the_end(curve)]
    if longer:
        yield (f"Next: train longer (train.max_steps). The last validation is the best one so far of "
               f"{join(longer)}.")
    over = [name for name, curve in curves.items() if _rises_at_the_end(curve)]
    if over:
        yield (f"Next: more training rows, a higher dropout rate or fewer steps. Validation NLL rose after its best "
               f"step for {join(over)}.")
    yield from _more_rows(result, names)


def _falls_to_the_end(curve: TrainingCurve) -> bool:
    values = list(curve.validation_nll.values())
    return len(values) > 1 and values[-1] == min(values) and values[-1] < values[0]


def _rises_at_the_end(curve: TrainingCurve) -> bool:
    """By more than a twentieth above the best of at least three validations."""
    values = list(curve.validation_nll.values())
    return len(values) > 2 and values[-1] > 1.05 * min(values)


def _more_rows(result: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """How many test rows would tell the run's adapter from plain LoRA, if the difference is what it seems."""
    wanted = {"split": "test", "scaling": "before", "system": "mean_field", "versus": "plain", "score": "nll"}
    for found in pick(dict(result), **wanted):
        if found["excludes_zero"] or found["difference"] == 0.0:
            continue
        factor = ((found["high"] - found["low"]) / 2.0 / found["difference"]) ** 2 * _POWER
        told = f"{number_text(found['difference'], signed=True)} nats between {names['mean_field']} and plain LoRA"
        if factor > _MOST_ROWS:
            yield f"Next: no more rows for this. {told} are too little for any practical number of test rows."
        else:
            needed = max(result["rows"]["test"] + 1, round(result["rows"]["test"] * factor, -2))
            yield (f"Next: more test rows (data.test_rows) or seeds. {told} would need about {needed:.0f} test rows to "
                   "be told from chance in four samples of five, if the difference is what it seems.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
