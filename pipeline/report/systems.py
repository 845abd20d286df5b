"""The systems that a report compares, made from the members that were predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.config import AdapterConfig
from pipeline.config.adapter import KIND_NAMES
from pipeline.report.inputs import ReportInputs
from pipeline.run_folder.comparison import REFERENCE
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.run_folder.members import Group, PredictedMember
from pipeline.scores.adaptive import adaptive_average, passes_needed
from pipeline.scores.bootstrap import Floats
from pipeline.scores.ensemble import Space, average, choose_adapters, choose_cheapest, subsets
from pipeline.scores.selection import SelectBy

METHOD_NAMES = {
    "none": "LoRA without dropout",
    "input_dropout": "LoRA with input dropout",
    "lora_dropout": "LoRA Dropout",
    "droplora": "DropLoRA",
    "rank_dropout": "rank dropout",
    "dropkey": "DropKey",
    "dropattention": "DropAttention",
    "hiddencut": "HiddenCut",
    "hiddenkey_minus": "HiddenKey without KL",
    "hiddenkey": "HiddenKey",
}
_ALL_SIZES_UP_TO = 16


@dataclass(frozen=True)
class System:
    """A predictor: the average of a few members, or of as many of them as a row needs.

    Where any `passes` of several mask draws would do, there are many candidates: scores are averaged over them, and
    intervals are those of one of them. Runs of several training seeds are candidates of another kind: what is wanted
    is the mean over seeds and its interval (`scores.seeds`).
    """

    key: str
    name: str
    short_name: str
    """In sentences that have named the method."""
    candidates: tuple[tuple[int, ...], ...]
    """Q subsets of member indices, all of one size."""
    curve: str | None = None
    """Key of its training curve among the inputs."""
    seeds: tuple[int, ...] = ()
    """Training seed of each candidate, where there is one candidate per training run; empty: interchangeable ones."""
    weights: tuple[float, ...] | None = None
    """Of the members of its one candidate; None: all alike."""
    crossed: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """On validation rows, which have decided `weights`: those of the even units' rows, which rows of odd units have
    decided, and the reverse (`scores.selection: halves`)."""
    margin: float | None = None
    """Members of its one candidate are taken until a row is settled by this margin (`scores.adaptive`)."""
    mean_passes: float | None = None
    """Passes per test row, where a margin decides, or the one member stands for several."""

    @property
    def runs(self) -> list[list[int]]:
        """The candidates of each training run."""
        numbers = list(range(len(self.candidates)))
        return [[number] for number in numbers] if self.seeds else [numbers]

    @property
    def used(self) -> list[int]:
        """Members that predict for it, in order."""
        if self.weights is None:
            return sorted({index for candidate in self.candidates for index in candidate})
        return [index for index, share in zip(self.candidates[0], self.weights, strict=True) if share > 0.0]

    @property
    def passes(self) -> int:
        """Forward passes per row; where a margin decides, at most."""
        return len(self.candidates[0]) if self.weights is None else len(self.used)


def predicted(system: System, split: LabelledSplit, space: Space, crossed: bool = False) -> Floats:
    """What each candidate of a system says of a split: (Q, L, C).

    Args:
        crossed: the split is the one that has decided the weights: by those that have not seen the row.
    """
    outputs = [split.outputs[list(candidate)] for candidate in system.candidates]
    if system.margin is not None:
        return np.stack([adaptive_average(one, passes_needed(one, system.margin)) for one in outputs])
    found = np.stack([average(one, space, system.weights) for one in outputs])
    if crossed and system.crossed is not None:
        for cells, weights in zip(split.halves(), system.crossed, strict=True):
            found[0, cells] = average(outputs[0][:, cells], space, weights)
    return found


def method_name(adapter: AdapterConfig) -> str:
    """What people call the method: the kind of adapter, if it is not LoRA, and a preset's name or its sites."""
    parts = [] if adapter.kind == "lora" else [KIND_NAMES[adapter.kind]]
    if adapter.method == "none" and parts:
        return f"{parts[0]} without dropout"
    if isinstance(adapter.method, str):
        return " + ".join(parts + [METHOD_NAMES.get(part, part) for part in adapter.method.split("+")])
    return " + ".join([*parts, "Dropout on " + ", ".join(s.position for s in adapter.resolved_method().sites)])


def method_label(method: str) -> str:
    """What people call a method of a comparison; one with a name of its own keeps it."""
    if method == REFERENCE:
        return "Plain LoRA"
    return " + ".join(METHOD_NAMES.get(part, part) for part in method.split("+"))


def build_systems(inputs: ReportInputs) -> list[System]:
    """Every system that the members allow, in the order of the summary table."""
    members, config = inputs.members, inputs.config
    name, own, kind = method_name(config.adapter), mean_field_name(config.adapter), KIND_NAMES[config.adapter.kind]
    teacher = next((member.name for member in members if member.group == "teacher"), "")
    if teacher:
        name = own = f"Distilled {kind}"
    singles: dict[Group, tuple[str, str]] = {
        "plain": (f"Plain {kind}", f"plain {kind}"),
        "teacher": (f"Teacher: {teacher}", "its teacher"),
        "mean_field": (own, "mean-field" if own != name else own),
    }
    systems = base_system(members) + [
        System(group, *names, ((index,),), group, mean_passes=members[index].extra.get("passes"))
        for group, names in singles.items() for index in indices(members, group)[:1]
    ]
    draws = indices(members, "mask_draw")
    systems += [mask_system(name, draws, size) for size in table_sizes(len(draws))]
    return systems + _searched_systems(members, inputs.splits["validation"], ensemble_space(inputs), config.select.by)


def base_system(members: Sequence[PredictedMember]) -> list[System]:
    """The base model alone, where it was predicted; a classifier's base has a head that nobody has trained."""
    found = indices(members, "base")[:1]
    untrained = any(members[index].extra.get("head") == "untrained" for index in found)
    names = ("Base model, untrained head", "the base with an untrained head") if untrained else (
        "Base model", "the base model")
    return [System("base", *names, ((index,),)) for index in found]


def mean_field_name(adapter: AdapterConfig) -> str:
    """The run's own adapter without masks; `mean-field` where the masks were on its weights."""
    has_draws = any(site.masks_weights for site in adapter.resolved_method().sites)
    return method_name(adapter) + (", mean-field" if has_draws else "")


def mask_system(name: str, draws: Sequence[int], size: int) -> System:
    """Ensembles of `size` of the cached mask draws."""
    chosen = tuple(tuple(draws[i] for i in subset) for subset in subsets(len(draws), size).tolist())
    short_name = f"{size} mask{'s' if size > 1 else ''}"
    return System(f"masks_{size}", f"{name}, {short_name}", short_name, chosen)


def table_sizes(draws: int) -> list[int]:
    """2, 4, 8, … up to the cached draws, and all of them."""
    return sorted({2**k for k in range(1, draws.bit_length()) if 2**k <= draws} | ({draws} if draws > 1 else set()))


def curve_sizes(draws: int) -> list[int]:
    """Every size where there are few; powers of two beyond 16."""
    return sorted(set(range(1, min(draws, _ALL_SIZES_UP_TO) + 1)) | set(table_sizes(draws)))


def indices(members: Sequence[PredictedMember], group: Group) -> list[int]:
    """Positions of a group's members."""
    return [index for index, member in enumerate(members) if member.group == group]


def ensemble_space(inputs: ReportInputs) -> Space:
    """The space in which this run's members are averaged."""
    return inputs.splits["validation"].averaging_space(inputs.config.ensemble.average)


def _searched_systems(
    members: Sequence[PredictedMember], validation: LabelledSplit, space: Space, by: SelectBy
) -> list[System]:
    """As many adapters as validation chose, one among the candidates, and all of them where it chose fewer."""
    searched = indices(members, "searched")
    if not searched:
        return []
    outputs = validation.outputs[searched]
    order = choose_adapters(list(outputs), len(searched), lambda one: validation.loss(one[None], by).point(), space)
    sizes = range(1, len(order) + 1)
    losses = [validation.loss(average(outputs[list(order[:size])], space)[None], by) for size in sizes]
    chosen = order[: sizes[choose_cheapest(sizes, losses, validation.rows, validation.units)]]
    systems = [_searched_system(f"{len(chosen)}", [searched[i] for i in chosen])]
    return systems + ([_searched_system(f"all {len(searched)}", searched)] if len(chosen) < len(searched) else [])


def _searched_system(count: str, adapters: Sequence[int]) -> System:
    key, subset = f"adapters_{len(adapters)}", (tuple(adapters),)
    if len(adapters) == 1:
        return System(key, "Best searched adapter", "the best searched adapter", subset)
    return System(key, f"Ensemble of {count} searched adapters", f"{count} searched adapters", subset)
