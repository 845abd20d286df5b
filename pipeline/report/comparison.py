"""The report of a comparison of methods: its systems, its result, its tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from pipeline.report.compared import DEEP_ENSEMBLE, compared_systems, settings_left_out, without_deep_ensemble
from pipeline.report.inputs import ReportInputs
from pipeline.report.remarks import remarks
from pipeline.report.result import score_entries
from pipeline.report.scoring import ScoredSystem, score_system
from pipeline.report.sentences import interval_text, number_text, pick, write_reading
from pipeline.report.systems import System, base_system, method_label
from pipeline.report.tables import (
    HEADINGS,
    UNCERTAINTY_NOTE,
    Cell,
    align,
    closing_lines,
    rows_text,
    scaled_lines,
    score_text,
    seconds_text,
    uncertainty_lines,
)
from pipeline.run_folder.comparison import REFERENCE, Training, values_text
from pipeline.terminal import one_line

Entries = dict[str, Any]

_LEAD = {"choice": "nll", "completion": "nll", "regression": "rmse"}
"""Kind of rows -> the score whose difference to plain LoRA the table shows."""
_COLUMNS = {
    "choice": ("accuracy", "nll", "ece"), "completion": ("nll",), "regression": ("pearson", "rmse"),
}  # fmt: skip


def build_comparison(inputs: ReportInputs, trainings: Sequence[Training]) -> tuple[Entries, list[ScoredSystem]]:
    """Score every adapter that predicted, and the mask ensembles of those chosen: the content of result.json."""
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
        "left_out": [
            *(f"{one.name} {one.state}: {one.error}" for one in trainings if one.state in ("failed", "refused")),
            *without_deep_ensemble(trainings, [system for system, _ in owners]),
            *settings_left_out(inputs.members, trainings),
        ],
    }
    result |= {"remarks": remarks(inputs, result)}
    return {**result, "reading": _reading(result)}, scored


def step_costs(trainings: Sequence[Training]) -> dict[str, float]:
    """Training -> median time of a step over the median of the reference method's; empty without a reference, and where
    trainings shared their passes: a step of any then took as long as that of all."""
    done = [one for one in trainings if one.state == "done"]
    reference = [one.step_seconds for one in done if one.method == REFERENCE]
    if not reference or any(one.packed for one in done):
        return {}
    return {one.name: one.step_seconds / median(reference) for one in done}


def format_comparison(result: Entries) -> str:
    """The tables on the terminal: chosen settings marked, the other ones below them."""
    names, kind = {system["key"]: system["short_name"] for system in result["systems"]}, result["kind"]
    lead = _LEAD[kind]
    spread = any("run_sd" in system["test"]["before"][lead] for system in result["systems"])
    rows = [["", *(HEADINGS[score] for score in _COLUMNS[kind]), f"{HEADINGS[lead]} − {names[result['reference']]}",
             *(["runs ±"] if spread else []), "passes", "train steps", "train s", "cost"]]
    rows += [_row(result, system, spread) for system in result["systems"]]
    title = [result["label"]] if result["label"] else []
    tables = [*align(rows), *scaled_lines(result), *uncertainty_lines(result)]
    lines = [*title, *tables, *_footnote(result, names), *closing_lines(result), *result["left_out"]]
    return "\n".join(map(one_line, lines))


def training_table(result: Entries) -> tuple[list[str], list[list[Cell]]]:
    """Headings and rows of the page's table of trainings."""
    headings = ["Training", "State", "Steps", "Validation NLL", "Seconds", "Cost"]
    rows = []
    for one in result["trainings"]:
        done = one["state"] == "done"
        numbers = [number_text(one["validation_nll"]), seconds_text(one["seconds"])] if done else ["–", "–"]
        cost = "–" if one["cost"] is None else number_text(one["cost"], 2)
        name = f"{method_label(one['method'])}, {values_text(one['values'])}, seed {one['seed']}"
        cells = [one["state"], str(one["steps"]), *numbers, cost]
        rows.append([(name, "chosen" if one["chosen"] else ""), *((cell, "") for cell in cells)])
    return headings, rows


def _about(system: System, group: Sequence[Training], cost: dict[str, float]) -> Entries:
    """What a system's entry says besides its scores. A deep ensemble has cost all of its trainings, others one."""
    runs = 1 if system.key == DEEP_ENSEMBLE else len(group)
    return {
        "method": group[0].method,
        "values": group[0].values,
        "seeds": [one.seed for one in group],
        "chosen": group[0].chosen,
        "train_steps": round(sum(one.steps for one in group) / runs),
        "train_seconds": sum(one.seconds for one in group) / runs,
        "cost": median(cost[one.name] for one in group) if cost else None,
    }


def _training_entry(one: Training, cost: dict[str, float]) -> Entries:
    shown = ("name", "method", "values", "seed", "state", "error", "chosen", "steps", "validation_nll", "seconds")
    return {
        **{key: getattr(one, key) for key in shown}, "run": one.run, "adapter_sha256": one.adapter_sha256,
        "step_seconds": one.step_seconds, "cost": cost.get(one.name),
    }


def _row(result: Entries, system: Entries, spread: bool) -> list[str]:
    lead, before = _LEAD[result["kind"]], system["test"]["before"]
    mark = " *" if _is_chosen_setting(system) else ""
    difference = pick(result, system=system["key"], split="test", score=lead, scaling="before")
    row = [
        system["name"] + mark, *(score_text(score, before[score]) for score in _COLUMNS[result["kind"]]),
        interval_text(difference[0], signed=True) if difference else "",
    ]
    if spread:
        row.append(number_text(before[lead]["run_sd"]) if "run_sd" in before[lead] else "")
    row.append(str(system["passes"]))
    if "cost" not in system:
        return [*row, "", "", ""]
    return [*row, str(system["train_steps"]), seconds_text(system["train_seconds"]),
            "" if system["cost"] is None else number_text(system["cost"], 2)]


def _is_chosen_setting(system: Entries) -> bool:
    """Whether validation chose it among the settings of its method; what is averaged of such ones is no setting."""
    return bool(system.get("chosen")) and (system["key"] == "plain" or system["key"].startswith("method_"))


def _footnote(result: Entries, names: dict[str, str]) -> list[str]:
    rows, lead = result["rows"], HEADINGS[_LEAD[result["kind"]]]
    several = any(len(system["train_seeds"]) > 1 for system in result["systems"])
    lines = [
        f"* settings that {rows['validation']} validation rows choose, by {result['selected_by']['name']}.",
        f"{rows_text(result)}; 95 % intervals, over rows{' and seeds' if several else ''}; NLL in nats.",
        f"{lead} − {names[result['reference']]}: paired by row{' and seed' if several else ''}. passes: forward, per "
        "row; train s: in optimizer",
        f"steps, per run as train steps; cost: of a step, plain LoRA = 1.00. Seed {result['train_seed']}.",
    ]
    if DEEP_ENSEMBLE in names:
        lines.append("Deep ensemble: one system, its intervals are over rows alone; its training is that of all seeds.")
    if several:
        lines.append(f"runs ±: standard deviation of {lead} between single runs.")
    if result["kind"] == "choice":
        lines.append(f"T: temperature, fitted on {rows['calibration']} calibration rows and shrunk towards 1 (~: those "
                     "rows do not carry it).")
        lines += UNCERTAINTY_NOTE
    return lines


def _reading(result: Entries) -> list[str]:
    """Which settings were chosen, and how the methods, as chosen, differ from plain LoRA; a few lines."""
    chosen = [system for system in result["systems"] if system.get("chosen")]
    single = [system for system in chosen if _is_chosen_setting(system)]
    picked = "; ".join(f"{method_label(system['method'])}: {values_text(system['values'])}" for system in single)
    keys = {system["key"] for system in chosen}
    of_chosen = [c for c in result["comparisons"] if c["system"] in keys]
    return [f"Validation chooses {picked}.", *write_reading({**result, "comparisons": of_chosen})]
