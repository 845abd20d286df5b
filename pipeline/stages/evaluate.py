"""The evaluation stage: every member's predictions on three splits and other data sets. No label of test rows is read.

All members share one pass: base, adapter, its mask draws, the plain run, the best searched adapters; of a comparison
the adapters that validation chose, or all, and mask draws of those that it chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from pipeline.adapters.attach import Adapters
from pipeline.adapters.build import attach_stored
from pipeline.adapters.members import Member
from pipeline.adapters.peft_adalora import shown_rank
from pipeline.adapters.peft_format import StoredAdapter, read_adapter
from pipeline.config import RunConfig
from pipeline.config.adapter import KIND_NAMES
from pipeline.config.evaluate import EnsembleConfig, GenerateConfig, check_generation
from pipeline.data.rows import Row
from pipeline.data.shapes.also import load_also
from pipeline.data.splits import EVALUATED_SPLITS, Splits, load_splits
from pipeline.distributed.lifeline import stop_asked, work_begins
from pipeline.distributed.world import World, agree, leave_world, require_shared_folder, start_world
from pipeline.errors import RunFolderError, Stopped, one_line
from pipeline.prediction.generation import Writing
from pipeline.prediction.predict import predict_shared
from pipeline.prediction.rounds import ROUND, Lineup, draws_stop, predict_in_rounds
from pipeline.prediction.task import Task, open_task
from pipeline.prediction.unseen import require_unseen
from pipeline.run_folder.chain import Origin, places_among, predictions_from, require_adapter, require_whole
from pipeline.run_folder.comparison import read_comparison
from pipeline.run_folder.generated import (
    GeneratedTexts,
    distinct_prompts,
    is_written,
    texts_from,
    write_texts,
    writers_of,
)
from pipeline.run_folder.members import Group, PredictedMember, read_members, write_members
from pipeline.run_folder.paths import RunPaths, load_saved, update_status
from pipeline.run_folder.predictions import Predictions, read_predictions, write_predictions
from pipeline.run_folder.related import finished_trials, read_related
from pipeline.terminal import Progress, say


def evaluate_run(run_dir: Path, trusted: bool = False) -> None:
    """Write predictions/ of a run. Splits already predicted by the same members, or by these and others, are kept.

    Raises:
        RunFolderError: an adapter is missing, damaged, not the one that was referred to, or trained on other data; the
            run's own was trained from another configuration.
        Stopped: a stop was requested.
    """
    paths = RunPaths(run_dir)
    config = load_saved(paths.config, trusted)
    entries = listed_adapters(
        paths, kind=config.adapter.kind, draws=config.ensemble.size, searched=config.search.adapters,
        compared=config.compare.evaluate,
    )
    stored = [read_entry(entry) for entry in entries]
    splits = load_splits(config.data)
    also = load_also(config.evaluate.also, config.data, splits)
    origin = Origin(config.training_sha256(), splits.fingerprint)
    if read_comparison(paths) is None:
        require_adapter(paths, Origin(origin.config_sha256))
    others = require_unseen([entry.folder for entry in entries], config.data, splits)
    lineups = _lineups(entries, stored, config.ensemble, origin)
    rows = {name: getattr(splits, name) for name in EVALUATED_SPLITS} | {name: one.rows for name, one in also.items()}
    hashes = {name: one.fingerprint for name, one in also.items()}
    lineups, kept = _kept(paths, lineups, rows, config, origin, hashes)
    lineup, missing = lineups[0], {name: of_split for name, of_split in rows.items() if name not in kept}
    for name, predictions in kept.items():  # before members.json: a kill in between leaves what is found again
        if read_predictions(paths.predictions, name).members != predictions.members:
            write_predictions(paths.predictions, name, predictions)
    texts = _missing_texts(paths, lineups, splits, config)
    if not missing and texts is None:
        write_members(paths.predictions, lineup.described)  # all processes the same; the folder may have been moved
        say("predictions are complete")
        return
    world = start_world()
    require_shared_folder(run_dir)
    task = open_task(config, splits, world.device)
    adapters = attach_stored(task.base, stored, config.train.seed, config.adapter.fused)
    count = sum(map(len, missing.values()))
    say("these rows are not those of the training, whose best step its own validation chose", world.is_main and others)
    say(f"{len(lineup.members)} members × {count} rows, all members in one pass per chunk", world.is_main)
    if agree(stop_asked(paths), world.device):  # and every process has seen which splits are missing
        _stop(paths, world)
    work_begins()
    if world.is_main:
        update_status(paths, "evaluate", "running")
        for name in missing:  # of other members: never to be taken for these
            (paths.predictions / f"{name}.npz").unlink(missing_ok=True)
        write_members(paths.predictions, lineup.described)
    lineup = predict_splits(paths, config.ensemble, lineups, missing, task, adapters, world, hashes)
    if texts is not None:
        generate_texts(paths, config.ensemble, lineup, splits.test, texts, Writing(task, adapters, texts, world))
    if world.is_main:
        update_status(paths, "evaluate", "done")
    leave_world()


def predict_splits(
    paths: RunPaths, ensemble: EnsembleConfig, lineups: Sequence[Lineup], missing: Mapping[str, Sequence[Row]],
    task: Task, adapters: Adapters, world: World, hashes: Mapping[str, str],
) -> Lineup:
    """Predict and write the splits that are missing, validation, where it is one of them, in rounds of draws.

    Args:
        hashes: of those whose rows are not the run's own, what their predictions name for its data.

    Returns:
        Who predicted.

    Raises:
        Stopped: a stop was requested; what is written stays.
    """
    lineup, done = lineups[0], 0
    progress = Progress(sum(map(len, missing.values())), 0, world.is_main, unit="row")
    for name, chosen in missing.items():
        started = time.monotonic()
        shown = _counter(progress, done, len(chosen), name, world.world_size)
        predict = partial(
            predict_shared, task, adapters, chosen, world=world, on_chunk=shown, stop_asked=lambda: stop_asked(paths)
        )
        try:
            if name == "validation":
                lineup, predictions = predict_in_rounds(lineups, predict, chosen, ensemble.average)
            else:
                predictions = predict(lineup.members)
        except Stopped:
            _stop(paths, world)
        done += len(chosen)
        if name == "validation" and len(lineup.members) < len(lineups[-1].members):
            drawn, most = len(lineup.draws), ensemble.size
            say(f"{drawn} of {most} mask draws: validation gains too little from more", world.is_main)
        if world.is_main:
            seconds = time.monotonic() - started
            write_members(paths.predictions, lineup.described)
            made_from = _of_rows(lineup.made_from, name, hashes)
            predictions = replace(predictions, seconds=seconds, made_from=made_from)
            write_predictions(paths.predictions, name, predictions)
    progress.close()
    return lineup


def _missing_texts(
    paths: RunPaths, lineups: Sequence[Lineup], splits: Splits, config: RunConfig
) -> GenerateConfig | None:
    """How texts are to be written; None where none are asked for, or they are there."""
    settings, kind = config.evaluate.generate, splits.test[0].kind
    check_generation(settings, "completion" if kind == "chat" else kind)
    if settings is None:
        return None
    if not writers_of(lineups[0].described):
        say("evaluate.generate: the adapters of a comparison write no texts")
        return None
    made_from = texts_from(lineups[0].made_from, settings, config.ensemble.average)
    return None if len(lineups) == 1 and is_written(paths.predictions, "test", made_from) else settings


def generate_texts(
    paths: RunPaths, ensemble: EnsembleConfig, lineup: Lineup, rows: Sequence[Row], settings: GenerateConfig,
    writing: Writing,
) -> None:
    """Write texts for the different prompts of the test rows.

    Raises:
        Stopped: a stop was requested; no text is kept.
    """
    prompts, writers = [group[0] for group in distinct_prompts(rows, settings.rows)], writers_of(lineup.described)
    world, count = writing.world, len(prompts) * len(writers)
    say(f"texts for {len(prompts)} prompts by {len(writers)} systems", world.is_main)
    progress = Progress(count, 0, world.is_main, unit="text")
    shown = _counter(progress, 0, count, "texts", world.world_size)
    writing = replace(writing, space=ensemble.average, on_chunk=shown, stop_asked=lambda: stop_asked(paths))
    try:
        texts, seconds = writing.write(
            prompts, {key: [lineup.members[place] for place in places] for key, places in writers.items()}
        )
    except Stopped:
        _stop(paths, world)
    progress.close()
    if world.is_main:
        names = {key: [lineup.described[place].name for place in places] for key, places in writers.items()}
        made_from = texts_from(lineup.made_from, settings, ensemble.average)
        write_texts(paths.predictions, "test", GeneratedTexts(made_from, names, seconds, texts))


def _stop(paths: RunPaths, world: World) -> NoReturn:
    if world.is_main:
        update_status(paths, "evaluate", "stopped")
        paths.stop_request.unlink(missing_ok=True)
    leave_world()
    raise Stopped("stopped; the splits that are finished are kept, and the same command continues")


def _lineups(
    entries: list[Entry], stored: list[StoredAdapter], ensemble: EnsembleConfig, origin: Origin
) -> list[Lineup]:
    """All members; before them, where the draws may stop, those with the mask draws of one round, two, …"""
    counts = range(ROUND, ensemble.size, ROUND) if ensemble.stop_when_flat else ()
    lineups: list[Lineup] = []
    for count in (*counts, ensemble.size):
        chosen = [replace(one, draws=min(one.draws, count)) if one.group == "mean_field" else one for one in entries]
        members, described = member_list(chosen, stored, ensemble.seed)
        if not lineups or len(members) > len(lineups[-1].members):  # else there are no masks
            lineups.append(Lineup(members, described, predictions_from(origin, described)))
    return lineups


def _kept(
    paths: RunPaths, lineups: list[Lineup], rows: Mapping[str, Sequence[Row]], config: RunConfig, origin: Origin,
    hashes: Mapping[str, str],
) -> tuple[list[Lineup], dict[str, Predictions]]:
    """(the one lineup that is known to predict, else all in question; its predictions that are there, by split)."""
    try:
        before = read_members(paths.predictions)
    except RunFolderError:
        before = []

    def found(name: str, lineup: Lineup) -> Predictions | None:
        """Those of a split; of an earlier evaluation with more members, the part of them that is asked for."""
        try:
            predictions = read_predictions(paths.predictions, name).scored_by(config.data.choice_score)
        except RunFolderError:
            return None
        if list(predictions.row_ids) != [row.id for row in rows[name]]:
            return None
        wanted = _of_rows(lineup.made_from, name, hashes)
        if predictions.made_from == wanted:
            return predictions
        places = places_among(lineup.described, before)
        made_from = _of_rows(predictions_from(origin, before), name, hashes)
        if places is None or predictions.made_from != made_from or predictions.members != len(before):
            return None
        share = predictions.seconds * len(places) / len(before)
        return replace(predictions.of_members(places), seconds=share, made_from=wanted)

    for made, lineup in enumerate(lineups, start=1):
        validation, own = found("validation", lineup), rows["validation"]
        known = validation is not None and draws_stop(lineups, made, validation, own, config.ensemble.average)
        if known or len(lineups) == 1:
            there = {name: found(name, lineup) for name in rows}
            return [lineup], {name: one for name, one in there.items() if one is not None}
    return lineups, {}


def _of_rows(made_from: Mapping[str, Any], name: str, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What predictions of a split carry: of rows that are not the run's own, their hash."""
    return {**made_from, **({"data_sha256": hashes[name]} if name in hashes else {})}


@dataclass(frozen=True)
class Entry:
    """An adapter to predict with."""

    group: Group
    name: str
    folder: Path
    sha256: str | None = None
    """Hash of its weights, where who refers to it has noted that."""
    draws: int = 0
    """Mask draws beside its mask-free read-out, if it has masks at all."""
    extra: dict[str, Any] = field(default_factory=dict)


def listed_adapters(
    paths: RunPaths, *, kind: str, draws: int, searched: int, compared: Literal["chosen", "all"]
) -> list[Entry]:
    """Of a comparison what was trained; else the run's own and those related.json refers to, best first.

    Args:
        kind: `adapter.kind`, which names the plain run.
        draws: mask draws of the run's own adapter, or of each one that a comparison chose: `ensemble.size`.
        searched: adapters of a search, at most: `search.adapters`.
        compared: of a comparison all adapters, or those of the settings that it chose: `compare.evaluate`.

    Raises:
        RunFolderError: the run has no adapter, or what it refers to is damaged.
    """
    trainings = read_comparison(paths)
    if trainings is not None:
        return [
            Entry("compared", one.name, paths.root / one.run / "adapter", one.adapter_sha256,
                  draws if one.chosen else 0,
                  {"method": one.method, "values": one.values, "train_seed": one.seed})
            for one in trainings if one.state == "done" and (one.chosen or compared == "all")
        ]
    if not paths.adapter.is_dir():
        raise RunFolderError(str(paths.adapter), None, "does not exist", "Run the train stage first.")
    entries = [Entry("mean_field", "mean-field", paths.adapter, draws=draws)]
    related = read_related(paths)
    if related.plain is not None:
        name = f"plain {KIND_NAMES[kind]}"
        entries.append(Entry("plain", name, related.plain / "adapter", related.plain_sha256))
    if related.search is not None:
        for trial in finished_trials(related.search, related.search_identity)[:searched]:
            entries.append(Entry("searched", trial.name, trial.run / "adapter", trial.adapter_sha256))
    return entries


def read_entry(entry: Entry) -> StoredAdapter:
    """The adapter of an entry.

    Raises:
        RunFolderError: it is damaged, or not the one that was referred to.
    """
    require_whole(entry.folder)
    stored = read_adapter(entry.folder)
    if entry.sha256 not in (None, stored.sha256):
        what = f"is another adapter than the one that this run refers to as {one_line(entry.name)}"
        raise RunFolderError(str(entry.folder), None, what, "Put that one back, or run the whole line again.")
    return stored


def member_list(
    entries: list[Entry], stored: list[StoredAdapter], seed: int
) -> tuple[list[Member], list[PredictedMember]]:
    """The members of the pass and their descriptions: base, then every adapter mask-free and its draws.

    The base of a classifier has an untrained head: its scores say what chance is. `seed` is that of the draws,
    `ensemble.seed`.
    """
    members = [Member(None)]
    described = [PredictedMember("base", "base", extra={"head": "untrained"} if stored[0].head.modules else {})]
    for k, (entry, adapter) in enumerate(zip(entries, stored, strict=True)):
        rates = {site.position: site.rate for site in adapter.spec.sites if site.rate > 0}
        extra = {"rank": shown_rank(adapter.spec), "alpha": adapter.spec.alpha, "rates": rates, **entry.extra}
        own = PredictedMember(entry.name, entry.group, str(entry.folder), adapter.sha256, None, extra)
        members.append(Member(k))
        described.append(own)
        group: Group = "mask_draw" if entry.group == "mean_field" else entry.group
        name = "draw {}" if group == "mask_draw" else f"{entry.name}, draw {{}}"
        extra = {**extra, "seed": seed}
        for draw in range(entry.draws if rates else 0):
            members.append(Member(k, draw))
            described.append(replace(own, name=name.format(draw), group=group, draw=draw, extra=extra))
    return members, described


def _counter(
    progress: Progress, done: int, rows: int, split: str, processes: int
) -> Callable[[int, int], None]:
    """Show the share of this process as that of all: they have equally many rows of similar lengths."""
    return lambda own, own_total: progress.show(done + rows * own // own_total, [split, f"{processes} processes"])
