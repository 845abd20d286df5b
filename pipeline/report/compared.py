"""The systems of a comparison of methods: each adapter, mask draws of the chosen ones, plain LoRAs averaged."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.systems import System, method_label
from pipeline.run_folder.comparison import REFERENCE, Training, values_text
from pipeline.run_folder.members import PredictedMember

DEEP_ENSEMBLE = "plain_ensemble"
"""Key of the average of the plain LoRAs of all seeds."""

_DRAWN = {"input_dropout": "MC dropout (input dropout, {} draw{})", "rank_dropout": "Random rank masks ({} draw{})"}
"""Method -> what the literature calls the average of its mask draws at test."""


def compared_systems(
    members: Sequence[PredictedMember], trainings: Sequence[Training]
) -> list[tuple[System, list[Training]]]:
    """Per method its chosen settings, their mask ensemble, and its other settings, where these predicted as well; each
    with the trainings it stands for.

    Trainings that differ in nothing but the seed are the runs of one system: scores are means over them. The chosen
    settings of the reference method have the key `plain`; where they have several seeds, these averaged are a system of
    their own. That baseline is published for plain training alone (arXiv 1612.01474), so no other method has it.
    """
    place = {(m.extra.get("train_seed"), str(m.extra.get("values")), m.extra.get("method"), m.draw): i
             for i, m in enumerate(members) if m.group == "compared"}
    predicted = {who_draw[:3] for who_draw in place}
    systems = []
    methods = sorted(dict.fromkeys(one.method for one in trainings), key=lambda method: method != REFERENCE)
    for number, method in enumerate(methods):  # the reference first: what is listed after it is compared with it
        done = [one for one in trainings if one.method == method and _who(one) in predicted]
        groups: dict[str, list[Training]] = {}
        for one in sorted(done, key=lambda one: not one.chosen):
            groups.setdefault(str(one.values), []).append(one)
        name = method_label(method)
        for position, group in enumerate(groups.values()):
            members_of = [_who(one) for one in group]
            title = f"{name}, {values_text(group[0].values)}"
            single = tuple((place[*who, None],) for who in members_of)
            seeds = tuple(one.seed for one in group)
            if not group[0].chosen:
                systems.append((System(f"variant_{number}_{position}", title, title, single, seeds=seeds), group))
                continue
            key = "plain" if method == REFERENCE else f"method_{number}"
            short_name = "plain LoRA" if key == "plain" else name
            systems.append((System(key, title, short_name, single, group[0].name, seeds), group))
            if key == "plain" and len(group) > 1:
                systems.append((deep_ensemble([index for (index,) in single]), group))
            draws = tuple(tuple(i for who_draw, i in place.items() if who_draw[:3] == who and who_draw[3] is not None)
                          for who in members_of)
            if draws[0]:
                masks = _DRAWN.get(method, name + ", {} mask{}").format(len(draws[0]), "s" if len(draws[0]) > 1 else "")
                systems.append((System(f"ensemble_{number}", masks, masks, draws, seeds=seeds), group))
    return systems


def _who(one: Training) -> tuple[int, str, str]:
    """What the members of a training are known by."""
    return one.seed, str(one.values), one.method


def deep_ensemble(members: Sequence[int]) -> System:
    """Plain LoRAs that differ in the seed, averaged: one system, whose intervals are over rows alone."""
    name = f"eep ensemble of {len(members)} plain LoRAs"
    return System(DEEP_ENSEMBLE, f"D{name}", f"d{name}", (tuple(members),))


def settings_left_out(members: Sequence[PredictedMember], trainings: Sequence[Training]) -> list[str]:
    """That settings which validation did not choose have no scores on test rows, as a sentence, where it is so."""
    predicted = {member.name for member in members}
    count = sum(one.state == "done" and one.name not in predicted for one in trainings)
    if not count:
        return []
    return [f"{count} training{'s' if count > 1 else ''} of settings that validation did not choose: report.html has "
            "their validation; compare.evaluate=all predicts test rows with them."]


def without_deep_ensemble(trainings: Sequence[Training], systems: Sequence[System]) -> list[str]:
    """Why there is no deep ensemble, as a sentence; nothing where there is one, or no plain LoRA in the comparison."""
    plain = [one for one in trainings if one.method == REFERENCE]
    if not plain or any(system.key == DEEP_ENSEMBLE for system in systems):
        return []
    seeds = sum(one.chosen for one in plain)
    return [f"Deep ensemble left out: it averages plain LoRAs of at least two seeds, and {seeds} "
            f"{'is' if seeds == 1 else 'are'} trained; give compare.seeds more."]
