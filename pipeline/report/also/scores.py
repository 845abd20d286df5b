"""Scores on the other data sets of a run (`evaluate.also`), beside those on its test split.

Systems and temperatures are those of the run: a set stands in the place of the test split, and nothing is fitted to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.config.evaluate import ALSO
from pipeline.report.also.rows import AlsoSplit
from pipeline.report.inputs import ReportInputs
from pipeline.report.scoring import AFTER, BOOTSTRAP_SEED, Resamples, ScoredSystem, on_rows, resample
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.scores.bootstrap import Floats, Ints, bootstrap
from pipeline.scores.disagreement import entropy, mutual_information
from pipeline.scores.seeds import Runs, difference, within_bounds
from pipeline.scores.uncertainty import Auroc

SHOWN = {
    "accuracy": (0.0, 1.0), "nll": (0.0, np.inf), "ece": (0.0, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0),
    "rmse": (0.0, np.inf),
}  # fmt: skip
"""Score -> its bounds."""
SIGNALS = ("entropy", "mutual_information", "confidence")
"""What tells rows from elsewhere; the less confident of two rows is taken for the one from elsewhere."""


def also_entries(inputs: ReportInputs, scored: Sequence[ScoredSystem], test: Resamples) -> dict[str, Any]:
    """Name of each set -> its rows, and per system scores, differences to the test split, and detection.

    Args:
        test: the systems' scores on resamples of the test split.
    """
    return {
        split.removeprefix(ALSO): {
            "path": one.path, "rows": one.rows.rows, "units": one.rows.unit_count, "labels": one.labels,
            "left_out": one.shown, "systems": list(_systems(inputs, scored, one, test)),
        }
        for split, one in inputs.also.items()
    }  # fmt: skip


def _systems(
    inputs: ReportInputs, scored: Sequence[ScoredSystem], one: AlsoSplit, test: Resamples
) -> Iterator[dict[str, Any]]:
    known = len(one.rows.outputs)  # the teacher of a distilled run has predicted the run's own splits alone
    scored = [system for system in scored if max(system.system.used) < known]
    there = [on_rows(system, one.rows) for system in scored]
    found = resample(there[0].inputs, there, "test") if one.labels else {}
    for before, system in zip(scored, there, strict=True):
        entry: dict[str, Any] = {"key": system.system.key, "name": system.system.name,
                                 "short_name": system.system.short_name, "passes": system.system.passes}
        for scaling in system.scalings("test") if one.labels else ():
            entry[scaling] = {
                score: _score(score, found[where], test[where])
                for score in SHOWN if (where := (system.system.key, scaling, score)) in found
            }
            if inputs.kind == "completion":
                ends = entry[scaling]["nll"]
                entry[scaling]["perplexity"] = {end: float(np.exp(ends[end])) for end in ("value", "low", "high")}
        if inputs.kind == "choice":
            entry["detection"] = _detection(before, system)
        yield entry


def _score(score: str, here: Runs, test: Runs) -> dict[str, Any]:
    less = difference(here, test).interval
    return {
        **asdict(within_bounds(here.interval(), *SHOWN[score])),
        "minus_test": {**asdict(less), "excludes_zero": less.excludes_zero},
    }


def _detection(own: ScoredSystem, there: ScoredSystem) -> dict[str, Any]:
    """AUROC, with its interval over the rows of both, and the means of what it goes by, of each signal.

    Entropy and confidence are those of the scaled average; mutual information is that of the members as they are.
    """
    inputs, system = own.inputs, own.system
    test, others = inputs.splits["test"], there.inputs.splits["test"]
    units = _joint_units(test, others)
    values = {name: (_unsure(name, own, test), _unsure(name, there, others)) for name in SIGNALS}
    found = {name: pair for name, pair in values.items() if system.passes > 1 or name != "mutual_information"}
    elsewhere = np.repeat([[0.0] * test.rows + [1.0] * others.rows], len(system.candidates), axis=0)
    statistics = [
        Auroc(np.concatenate([ours[run], theirs[run]], axis=1), elsewhere[run])
        for ours, theirs in found.values() for run in system.runs
    ]
    samples = inputs.config.evaluate.bootstrap_samples
    table = iter(bootstrap(statistics, test.rows + others.rows, samples, BOOTSTRAP_SEED, units).T)
    points, entries = iter([one.point() for one in statistics]), {}
    for name, (ours, theirs) in found.items():
        taken = [(next(points), next(table)) for _ in system.runs]
        runs = Runs(np.array([point for point, _ in taken]), np.stack([resamples for _, resamples in taken]),
                    test.unit_count + others.unit_count, system.seeds)
        sign = -1.0 if name == "confidence" else 1.0
        entries[name] = {"auroc": asdict(within_bounds(runs.interval(), 0.0, 1.0)),
                         "mean": sign * float(theirs.mean()), "test_mean": sign * float(ours.mean())}
    return entries


def _unsure(signal: str, one: ScoredSystem, rows: LabelledSplit) -> Floats:
    """(Q, N): more is less sure."""
    if signal == "mutual_information":
        members = [rows.outputs[list(candidate)] for candidate in one.system.candidates]
        return np.stack([mutual_information(outputs, one.system.weights) for outputs in members])
    scaled = one.predictions["test", AFTER]
    return entropy(scaled) if signal == "entropy" else -np.exp(scaled.max(axis=-1))


def _joint_units(one: LabelledSplit, other: LabelledSplit) -> Ints | None:
    """Units of the rows of both, none of which has rows in both."""
    if one.units is None and other.units is None:
        return None
    first, second = (np.arange(rows.rows) if rows.units is None else rows.units for rows in (one, other))
    return np.concatenate([first, second + one.unit_count])
