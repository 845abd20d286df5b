"""The report of a comparison of methods: its systems, its result, its tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from pipeline.report.inputs import ReportInputs
from pipeline.report.result import score_entries
from pipeline.report.scoring import ScoredSystem, score_system
from pipeline.report.sentences import interval_text, number_text, pick, write_reading
from pipeline.report.systems import METHOD_NAMES, System, base_system
from pipeline.report.tables import HEADINGS, Cell, align
from pipeline.run_folder.comparison import REFERENCE, Training, values_text
from pipeline.run_folder.members import PredictedMember
from pipeline.terminal import one_line

Entries = dict[str, Any]

_LEAD = {"choice": "nll", "completion": "nll", "regression": "rmse"}
"""Kind of rows -> the score whose difference to plain LoRA the table shows."""
_COLUMNS = {
    "choice": ["accuracy", "NLL [95 % interval]", "ECE", "NLL scaled", "ECE scaled"],
    "completion": ["NLL [95 % interval]"],
    "regression": ["Pearson [95 % interval]", "RMSE"],
}


def build_comparison(inputs: ReportInputs, trainings: Sequence[Training]) -> tuple[Entries, list[ScoredSystem]]:
    """Score every adapter, and the mask ensembles of those that validation chose: the content of result.json."""
    owners = compared_systems(inputs.members, trainings)
    scored = [score_system(inputs, system) for system in [*base_system(inputs.members), *(s for s, _ in owners)]]
    singles = [one for one in scored if one.system.key.startswith(("base", "plain", "method_"))]
    entries = score_entries(inputs, scored, singles)
    seeds = sorted({one.seed for one in trainings})
    cost = step_costs(trainings)
    about = {system.key: _about(system, group, cost) for system, group in owners}
    reference = "plain" if any(system.key == "plain" for system, _ in owners) else "base"
    result = {
        **entries,
        "method": f"Comparison of {len({one.method for one in trainings})} methods",
        "train_seed": seeds[0] if len(seeds) == 1 else ", ".join(map(str, seeds)),
        "systems": [{**system, **about.get(system["key"], {})} for system in entries["systems"]],
        "comparisons": [c for c in entries["comparisons"] if c["versus"] == reference],
        "trainings": [_training_entry(one, cost) for one in trainings],
        "reference": reference,
        "ensemble": None,
        "left_out": [f"{one.name} {one.state}: {one.error}" for one in trainings if one.state in ("failed", "refused")],
    }
    return {**result, "reading": _reading(result)}, scored


def compared_systems(
    members: Sequence[PredictedMember], trainings: Sequence[Training]
) -> list[tuple[System, list[Training]]]:
    """Per method its chosen settings, their mask ensemble, its other settings; each with the trainings it stands for.

    Trainings that differ in nothing but the seed are candidates of one system: scores are means over them, intervals
    hold the variance over rows and over seeds. The chosen settings of the reference method have the key `plain`.
    """
    place = {(m.extra.get("train_seed"), str(m.extra.get("values")), m.extra.get("method"), m.draw): i
             for i, m in enumerate(members) if m.group == "compared"}
    systems = []
    methods = sorted(dict.fromkeys(one.method for one in trainings), key=lambda method: method != REFERENCE)
    for number, method in enumerate(methods):  # the reference first: what is listed after it is compared with it
        done = [one for one in trainings if one.method == method and one.state == "done"]
        groups: dict[str, list[Training]] = {}
        for one in sorted(done, key=lambda one: not one.chosen):
            groups.setdefault(str(one.values), []).append(one)
        name = method_label(method)
        for position, group in enumerate(groups.values()):
            members_of = [(one.seed, str(one.values), one.method) for one in group]
            title = f"{name}, {values_text(group[0].values)}"
            single = tuple((place[*who, None],) for who in members_of)
            if not group[0].chosen:
                systems.append((System(f"variant_{number}_{position}", title, title, single), group))
                continue
            key = "plain" if method == REFERENCE else f"method_{number}"
            short_name = "plain LoRA" if key == "plain" else name
            systems.append((System(key, title, short_name, single, group[0].name), group))
            draws = tuple(tuple(i for who_draw, i in place.items() if who_draw[:3] == who and who_draw[3] is not None)
                          for who in members_of)
            if draws[0]:
                masks = f"{name}, {len(draws[0])} mask{'s' if len(draws[0]) > 1 else ''}"
                systems.append((System(f"ensemble_{number}", masks, masks, draws), group))
    return systems


def method_label(method: str) -> str:
    """What people call a method of a comparison; one with a name of its own keeps it."""
    if method == REFERENCE:
        return "Plain LoRA"
    return " + ".join(METHOD_NAMES.get(part, part) for part in method.split("+"))


def step_costs(trainings: Sequence[Training]) -> dict[str, float]:
    """Training -> median time of a step over the median of the reference method's; empty without a reference."""
    reference = [one.step_seconds for one in trainings if one.method == REFERENCE and one.state == "done"]
    if not reference:
        return {}
    return {one.name: one.step_seconds / median(reference) for one in trainings if one.state == "done"}


def format_comparison(result: Entries) -> str:
    """The table on the terminal: chosen settings marked, the other ones below."""
    names = {system["key"]: system["short_name"] for system in result["systems"]}
    lead = _LEAD[result["kind"]]
    headings = [
        "", f"valid. {HEADINGS[lead]}", *_COLUMNS[result["kind"]], f"{HEADINGS[lead]} − {names[result['reference']]}",
        "train s", "cost",
    ]
    rows = [_row(result, system, lead) for system in result["systems"]]
    title = [f"*** {result['label']} ***"] if result["label"] else []
    lines = [*title, *align([headings, *rows]), _footnote(result, names), *result["left_out"]]
    return "\n".join(map(one_line, lines))


def training_table(result: Entries) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the page's table of trainings."""
    headings = ["Training", "State", "Steps", "Validation NLL", "Seconds", "Cost"]
    rows = []
    for one in result["trainings"]:
        done = one["state"] == "done"
        numbers = [number_text(one["validation_nll"]), number_text(one["seconds"], 0)] if done else ["–", "–"]
        cost = "–" if one["cost"] is None else number_text(one["cost"], 2)
        name = f"{method_label(one['method'])}, {values_text(one['values'])}, seed {one['seed']}"
        cells = [one["state"], str(one["steps"]), *numbers, cost]
        rows.append([(name, "chosen" if one["chosen"] else ""), *((cell, "") for cell in cells)])
    return headings, rows


def _about(system: System, group: Sequence[Training], cost: dict[str, float]) -> Entries:
    """What a system's entry says besides its scores."""
    return {
        "method": group[0].method,
        "values": group[0].values,
        "seeds": [one.seed for one in group],
        "chosen": group[0].chosen,
        "train_seconds": sum(one.seconds for one in group) / len(group),
        "cost": median(cost[one.name] for one in group) if cost else None,
    }


def _training_entry(one: Training, cost: dict[str, float]) -> Entries:
    shown = ("name", "method", "values", "seed", "state", "error", "chosen", "steps", "validation_nll", "seconds")
    return {
        **{key: getattr(one, key) for key in shown}, "run": one.run, "adapter_sha256": one.adapter_sha256,
        "step_seconds": one.step_seconds, "cost": cost.get(one.name),
    }


def _row(result: Entries, system: Entries, lead: str) -> list[str]:
    is_ensemble = system["key"].startswith("ensemble")
    mark = " *" if system.get("chosen") and not is_ensemble else ""
    difference = pick(result, system=system["key"], split="test", score=lead, scaling="before")
    row = [
        system["name"] + mark, number_text(system["validation"]["before"][lead]), *_test_scores(system, result["kind"]),
        interval_text(difference[0], signed=True) if difference else "",
    ]
    if "train_seconds" not in system or is_ensemble:
        return [*row, "", ""]
    return [*row, number_text(system["train_seconds"], 0),
            "" if system["cost"] is None else number_text(system["cost"], 2)]


def _test_scores(system: Entries, kind: str) -> list[str]:
    """The cells of `_COLUMNS`."""
    before = system["test"]["before"]
    if kind == "regression":
        return [interval_text(before["pearson"]), number_text(before["rmse"]["value"])]
    if kind == "completion":
        return [interval_text(before["nll"])]
    after = system["test"]["after"]
    scaled = [number_text(entry["value"]) for entry in (before["ece"], after["nll"], after["ece"])]
    return [number_text(before["accuracy"]["value"]), interval_text(before["nll"]), *scaled]


def _footnote(result: Entries, names: dict[str, str]) -> str:
    rows, lead = result["rows"], HEADINGS[_LEAD[result["kind"]]]
    scaled = f"; scaled = temperature fitted on {rows['calibration']} calibration rows"
    return (
        f"* settings that {rows['validation']} validation rows choose for the method (by NLL, in nats). "
        f"{rows['test']} test rows{scaled if result['kind'] == 'choice' else ''}.\n"
        f"{lead} − {names[result['reference']]}: paired on the same rows, 95 % interval. train s: in optimizer steps; "
        f"cost: of a step, plain LoRA = 1.00. Seed {result['train_seed']}."
    )


def _reading(result: Entries) -> str:
    """Which settings were chosen, and how the methods, as chosen, differ from plain LoRA."""
    chosen = [system for system in result["systems"] if system.get("chosen")]
    single = [system for system in chosen if not system["key"].startswith("ensemble")]
    picked = "; ".join(f"{method_label(system['method'])}: {values_text(system['values'])}" for system in single)
    keys = {system["key"] for system in chosen}
    of_chosen = [c for c in result["comparisons"] if c["system"] in keys]
    return f"Validation chooses {picked}. " + write_reading({**result, "comparisons": of_chosen})
