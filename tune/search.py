"""A search: trials of a space under Ray Tune, and what follows from them.

    SEARCH/
      config.yaml     the base configuration (written by who starts the search)
      ledger.jsonl    every event; a search is rebuilt from it
      trials/         one run folder and one log per trial
      search.json     the result
      .ray/           Ray's own files, removed at the end
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import (
    ADAPTER_WEIGHTS,
    EXIT_STOPPED,
    LEDGER,
    SEARCH,
    LoradropError,
    RunConfig,
    RunFolderError,
    RunPaths,
    StageFailed,
    held,
    is_validated,
    load_config,
    manifest_faults,
    sha256_file,
    without_dropout,
    write_json,
)
from tune.cluster import cluster, plan
from tune.dimensions import Space
from tune.ensemble import choose_ensemble, validation_losses
from tune.ledger import Ledger, TrialRecord, pending
from tune.progress import SearchProgress, tell
from tune.space import ARM_TEXTS, Arm, load_arms, packing_refusal
from tune.stopping import Stopping, stop_on_signal
from tune.trial import TRIALS, PackMaker, TrainFunction

RAY_FOLDER = ".ray"
SEARCHING = ".searching"
"""Held by the process that searches. The command that started it owns the folder, but may be killed before it."""
_PATIENCE = 60.0
"""Seconds: a search whose command was killed ends its trials first."""


class SearchStopped(LoradropError):
    """A stop was requested; the ledger has everything and the same command continues."""

    exit_code = EXIT_STOPPED


def search(
    config: RunConfig, folder: Path, train: TrainFunction | None = None, make_pack: PackMaker | None = None
) -> dict[str, Any]:
    """Run, or continue, the search of `config.search` in `folder`; returns what search.json holds.

    Args:
        train: Stands in for `pipeline.train_run` in tests; must be importable in other processes.
        make_pack: Stands in for `pipeline.Pack`, likewise.

    Raises:
        ConfigError: illegal space, a folder with another search, more trials at once than the cluster carries.
        RunFolderError: another search works in the folder, a minute later still; its ledger holds values of keys that
            the space has not.
        StageFailed: Ray does not start, or every trial failed (with the first error).
        SearchStopped: SIGINT or SIGTERM; finished trials are kept.
    """
    folder = folder.resolve()
    arms = load_arms(config)
    with held(folder / SEARCHING, "python -m tune", patience=_PATIENCE), stop_on_signal() as stopping:
        ledger = Ledger(folder / LEDGER)
        ledger.open_search(identity(config, arms), describe(arms))
        _refuse_strange(ledger, arms)
        _forget_lost(ledger, folder)
        if pending(ledger, arms):
            _run_trials(config, arms, ledger, folder, stopping, (train, make_pack))
        if stopping.requested:
            raise SearchStopped("search stopped; finished trials are kept and the same command continues")
        result = conclude(config, arms, ledger, folder)
        write_json(folder / SEARCH, result)
        return result


def describe(arms: Sequence[Arm]) -> dict[str, Any]:
    """JSON form of what is searched, by arm."""
    return {arm.name: arm.space.describe() for arm in arms}


def identity(config: RunConfig, arms: Sequence[Arm]) -> str:
    """Hash of all that a trial's score depends on: how many trials there are, and how many at once, does not."""
    parts = config.model_dump(mode="json")
    relevant = {key: parts[key] for key in ("model", "data", "adapter", "train")}
    relevant["search"] = {key: parts["search"][key] for key in ("max_steps", "seed", "early_exit")}
    return hashlib.sha256(json.dumps([relevant, describe(arms)], sort_keys=True).encode()).hexdigest()


def conclude(config: RunConfig, arms: Sequence[Arm], ledger: Ledger, folder: Path) -> dict[str, Any]:
    """The result of a search whose trials have all ended: at the top what the method's arm found, and the adapter
    ensemble of its trials; under `plain` what plain LoRA's arm found, None where it has none.

    Raises:
        StageFailed: no trial of an arm finished, or trials were not trained as they were meant to be.
    """
    found = {arm.name: _conclude_arm(config, arm, ledger, folder) for arm in arms}
    records = ledger.in_order()
    return {
        "label": config.label,
        "identity": identity(config, arms),
        "selected_by": config.select.by,
        **found["method"],
        "plain": found.get("plain"),
        "warnings": [
            *_same_adapters([record for record in records if record.state == "done"]),
            *(warning for arm in arms for warning in edge_warnings(arm, ledger.trials[found[arm.name]["best"]])),
            *_unequal_tuning(config, arms),
        ],
    }


def _conclude_arm(config: RunConfig, arm: Arm, ledger: Ledger, folder: Path) -> dict[str, Any]:
    records = ledger.in_order(arm.name)
    finished = sorted((r for r in records if r.state == "done"), key=lambda r: (r.nll, r.index))
    if not finished:
        failed = [r for r in records if r.state == "failed"]
        said = f"the first, {failed[0].name}, said: {failed[0].error}" if failed else "none ran to the end"
        of = "the search" if arm.name == "method" else ARM_TEXTS[arm.name]
        raise StageFailed(f"no trial of {of} finished; {said} (log: {folder / TRIALS})")
    _require_different(records, folder)
    by = config.select.by
    splits, losses = validation_losses(config.data, folder, finished, by)
    scored = {record.name: loss for record, loss in zip(finished, losses, strict=True)}
    best = finished[int(np.argmin(losses))]
    found = {
        "space": arm.space.describe(),
        "trials": [_entry(record, scored.get(record.name)) for record in records],
        "best": best.name,
        "best_config": best.values,
    }
    if arm.name == "method":
        names = [record.name for record in finished]
        found["ensemble"] = choose_ensemble(splits, names, config.ensemble.average, config.search.adapters, by)
    return found


def _run_trials(
    config: RunConfig,
    arms: Sequence[Arm],
    ledger: Ledger,
    folder: Path,
    stopping: Stopping,
    stand_ins: tuple[TrainFunction | None, PackMaker | None],
) -> None:
    refusal = "" if config.search.pack == "off" else packing_refusal(config, arms)
    packed = config.search.pack != "off" and not refusal
    if refusal:
        tell(f"Each trial loads the base for itself: {refusal}.")
    wanted, left = sum(arm.trials for arm in arms), len(pending(ledger, arms))
    if left < wanted:
        tell(f"Continuing: {wanted - left} of {wanted} trials have ended.")
    try:
        with cluster(folder / RAY_FOLDER, stopping) as nodes:
            stopping.listen()
            capacity = plan(config.search, nodes, left, packed)
            shares = " and ".join(f"{arm.trials} of {ARM_TEXTS[arm.name]}" for arm in arms)
            tell(
                f"Search: {left} trials of {config.search.max_steps} steps"
                f"{f' ({shares})' if len(arms) > 1 and left == wanted else ''}, {capacity.describe()}."
            )
            from tune.study import Study, run_study  # imports ray, which the cluster has set up by now

            progress = SearchProgress(ledger, wanted, config.search.max_steps, capacity.concurrent)
            study = Study(config, arms, ledger, folder, capacity)
            run_study(study, progress, folder / RAY_FOLDER, stopping, *stand_ins)
    finally:
        shutil.rmtree(folder / RAY_FOLDER, ignore_errors=True)


def _refuse_strange(ledger: Ledger, arms: Sequence[Arm]) -> None:
    """A folder from elsewhere could set what no search varies: hosts, paths, whose code runs."""
    dimensions: dict[str, Space] = {arm.name: arm.space for arm in arms}
    for record in ledger.in_order():
        if record.arm not in dimensions:
            what = f"holds {record.name} of something that this search does not tune"
            raise RunFolderError(str(ledger.path), None, what, "Search in another --run-dir.")
        if strange := sorted(set(record.values) - dimensions[record.arm].dimensions.keys()):
            what = f"gives {record.name} a value of {strange[0]}, which this search does not vary"
            raise RunFolderError(str(ledger.path), None, what, "Search in another --run-dir.")


def _forget_lost(ledger: Ledger, folder: Path) -> None:
    """A finished trial whose run folder is gone, or whose adapter is damaged or another one, has to run again."""
    for record in ledger.in_order():
        if record.state == "done" and not _holds(folder, record):
            ledger.append("end", trial=record.name, state="failed", error="its run folder is gone or damaged")


def _holds(folder: Path, record: TrialRecord) -> bool:
    paths = RunPaths(folder / TRIALS / record.name)
    if not paths.config.is_file() or manifest_faults(paths.adapter):
        return False
    config, sha256 = load_config(paths.config), sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    same = config.sha256() == record.config_sha256 and sha256 == record.adapter_sha256
    return same and is_validated(paths, config, sha256)


def _require_different(records: list[TrialRecord], folder: Path) -> None:
    """Every trial trained the configuration chosen for it, and no two the same one."""
    for record in records:
        if record.state == "done" and not _holds(folder, record):
            raise StageFailed(f"{record.name}: its run folder holds another configuration than the one chosen")
    points = Counter(json.dumps(record.values, sort_keys=True) for record in records)
    if repeated := [point for point, count in points.items() if count > 1]:
        raise StageFailed(f"several trials had the same configuration: {repeated[0]}")


def _same_adapters(finished: list[TrialRecord]) -> list[str]:
    """Equal adapters from different settings: what was varied did not reach the training."""
    by_hash: dict[str | None, list[str]] = {}
    for record in finished:
        by_hash.setdefault(record.adapter_sha256, []).append(record.name)
    return [
        f"{', '.join(names)} trained identical adapters: what differs between them changes nothing"
        for names in by_hash.values()
        if len(names) > 1
    ]


def edge_warnings(arm: Arm, best: TrialRecord) -> list[str]:
    """Chosen values that lie at the edge of their dimension: the best may lie beyond it."""
    found = [
        f"{key} = {best.values[key]:.3g}"
        for key, dimension in arm.space.dimensions.items()
        if key in best.values and dimension.at_edge(best.values[key])
    ]
    whose = "" if arm.name == "method" else f" for {ARM_TEXTS[arm.name]}"
    said = f"Chosen{whose} at the edge of what was searched: {', '.join(found)}. The best may lie beyond it."
    return [said] if found else []


def _unequal_tuning(config: RunConfig, arms: Sequence[Arm]) -> list[str]:
    """What is to be said where plain LoRA was tuned less than the method."""
    if len(arms) > 1:
        tried, plain = arms[0].trials, arms[1].trials
        said = (f"Plain LoRA was tuned with {plain} settings, the method with {tried}: of what the space varies plain "
                "LoRA has no more.")
        return [said] if plain < tried else []
    if config.adapter.resolved_method() == without_dropout(config).adapter.resolved_method():
        return []
    if config.search.plain:
        return ["Plain LoRA is not tuned: the space varies nothing that it has."]
    return ["Plain LoRA has the settings chosen for the method and no tuning of its own (search.plain), which favours "
            "the method."]


def _entry(record: TrialRecord, loss: float | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": record.name,
        "config": record.values,
        "config_sha256": record.config_sha256,
        "validation_nll": record.nll,
        "validation_accuracy": record.accuracy,
        "validation_loss": loss,
        "steps": record.steps,
        "reports": record.reports,
        "state": record.state,
        "run": f"{TRIALS}/{record.name}",
        "adapter_sha256": record.adapter_sha256,
    }
    if record.overfits:
        entry["overfits"] = True
    return entry | ({"error": record.error} if record.state == "failed" else {})
