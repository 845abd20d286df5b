"""`loradrop distill`: what a run's calibrated ensemble says, taught to one plain adapter: RUN-distilled, a whole run.

    RUN-distilled/taught/teacher.jsonl    the ensemble's answers to the training rows, and to rows without answers, as
                                          `predict` writes and continues them: each with the hash of who answered what
    RUN-distilled/taught/rows.jsonl       these rows with `label_probabilities`, which data.train_path names
    RUN-distilled/taught/evaluated/       its answers to the evaluated rows, for the report to set beside the student's

The student minimises Σ q · -log P(choice) over all choices of a row (docs/data.md), with q the teacher's probabilities
under its temperature. Its validation, calibration and test rows, and its own temperature, are those of any run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.config.load import build_config, overridden_tree, with_values, without_dropout
from pipeline.data.rows import Row
from pipeline.data.splits import EVALUATED_SPLITS, load_splits
from pipeline.distributed.nodes import check_nodes, owned_folders
from pipeline.ensemble.readout import EvaluatedRun, Readout
from pipeline.ensemble.rows import RowForm
from pipeline.errors import EXIT_OK, ConfigError
from pipeline.files import read_json_lines, write_json, write_text
from pipeline.plan.request import Request
from pipeline.plan.resolve import ALWAYS, fit_micro_batch, resolve_epochs, resolve_saved
from pipeline.run_folder.mark import claim, refuse_foreign, require_mark
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import Folders, RunPaths
from pipeline.run_folder.predictions import write_predictions
from pipeline.stages.predict import PLAN, ROWS, asked_rows, compare
from pipeline.stages.processes import headline, start
from pipeline.stages.run import say_trained
from pipeline.terminal import say

TEACHER, TAUGHT = "teacher.jsonl", "rows.jsonl"
TAKEN = ("train.", "adapter.rank=", "adapter.alpha=", "adapter.target_modules=")
"""Beginnings of the overrides that the student may have."""
LEAST = 0.001
"""Choices that the teacher finds less probable are not taught: of many classes most would cost a sequence each."""


def distill(request: Request) -> int:
    """Ask the ensemble, and train the student; the exit code. Both continue where they ended.

    Raises:
        UserError: something to mend in run folder, rows or settings, before a model is loaded.
    """
    require_mark(request.run, "run")
    for_launch = tuple(word for word in request.overrides if word.startswith(ALWAYS))
    config = resolve_saved(replace(request, overrides=for_launch), "distill")
    check_nodes(config.launch, "distill", "all", ["distill"])
    folders = Folders(request.run)
    taught = RunPaths(folders.distilled).taught
    student = student_config(config, [word for word in request.overrides if word not in for_launch], taught / TAUGHT)
    splits = load_splits(config.data)
    run = EvaluatedRun.open(RunPaths(request.run), config, splits)
    readout, form = run.readout(), RowForm.of_run(config, splits)
    refuse_untaught(readout, config, student)
    refuse_foreign(folders.distilled, "run")
    unlabelled = _unlabelled(request.unlabelled)

    def rows() -> Iterator[Row]:
        return asked_rows(splits, form, unlabelled, training=True)

    if request.dry_run:
        count = sum(1 for _ in rows())
        say(f"{count} rows would be answered by {len(readout.draws)} members, and taught in {folders.distilled}")
        return EXIT_OK
    with owned_folders([folders.run, folders.distilled], "distill", config.launch):
        claim(folders.distilled, "run")
        taught.mkdir(exist_ok=True)
        count, done = compare(rows(), taught / TEACHER, f"{run.identity(readout)} None")
        write_teacher(run, readout, RunPaths(folders.distilled).teacher)
        say(f"{done} of {count} rows have been answered by {len(readout.draws)} members")
        if done < count:
            plan = {"input": unlabelled, "output": str(taught / TEACHER), "abstain": None, "training": True}
            write_json(request.run / "logs" / PLAN, {**plan, "rows": count})
            if code := start(ROWS, config, folders):
                return code
        lines = taught_lines(rows(), read_json_lines(taught / TEACHER))
        write_text(taught / TAUGHT, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
        headline("one adapter")
        code = start("train", resolve_epochs(student), Folders(folders.distilled))
    if code == EXIT_OK:
        say_trained(folders.distilled)
    return code


def student_config(config: RunConfig, overrides: Sequence[str], rows: Path) -> RunConfig:
    """The run's configuration without dropout, with other training rows.

    Raises:
        ConfigError: an override of what teacher and student have in common, or a wrong value.
    """
    for word in overrides:
        if not word.startswith(TAKEN):
            what = "is not read by distill: teacher and student have it in common"
            raise ConfigError(word, None, what, "The student may have train.*, adapter.rank, alpha and target_modules.")
    plain = with_values(without_dropout(config), {"data.train_path": str(rows)})
    student = build_config(overridden_tree(plain.model_dump(mode="json"), overrides)).trusting(
        config.model.trust_remote_code
    )
    return student.model_copy(update={"train": fit_micro_batch(student.train, student.launch)})


def write_teacher(run: EvaluatedRun, readout: Readout, folder: Path) -> None:
    """What the run's ensemble said of the rows that both are scored on: predictions of one member."""
    entry: Any = run.result.get("ensemble") or {"chosen": "mean_field"}
    name = next(system["name"] for system in run.result["systems"] if system["key"] == entry["chosen"])
    folder.mkdir(exist_ok=True)
    for split in EVALUATED_SPLITS:
        predictions, passes = run.averages(readout, split)
        write_predictions(folder, split, predictions)
    extra = {"passes": passes, "seed": run.config.train.seed}
    write_members(folder, [PredictedMember(name, "teacher", adapter_sha256=run.adapter_sha256, extra=extra)])


def refuse_untaught(readout: Readout, config: RunConfig, student: RunConfig) -> None:
    """Raises `ConfigError` where an ensemble's distribution is none over choices, or would not be what is learnt."""
    answered = "with numbers" if readout.kind == "regression" else "in free text"
    for field, value, wrong, what, remedy in (
        ("distill", None, readout.kind != "choice", f"teaches a probability per choice, and the run answers {answered}",
         "Distill a run whose rows have choices."),
        ("data.choice_score", config.data.choice_score, config.data.choice_score != "sum",
         "scores choices otherwise than training does, which teaches the likelihood of whole texts",
         "Evaluate and report the run under data.choice_score=sum."),
        ("data.streaming", True, config.data.streaming, "has no training rows at hand to be answered",
         "Train the run with data.streaming=false."),
        ("train.packing", True, student.train.packing, "would not tell the choices of a row apart",
         "Give train.packing=false."),
    ):
        if wrong:
            raise ConfigError(field, value, what, remedy)


def taught_lines(rows: Iterator[Row], answers: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows as training reads them, in their order, with the teacher's probabilities."""
    for row, answer in zip(rows, answers, strict=True):
        line: dict[str, Any] = {"id": row.id, "prompt": row.prompt}
        known = {"second": row.second, "label": row.label, "unit": row.unit}
        line |= {name: value for name, value in known.items() if value is not None}
        probable = [q if q >= LEAST else 0.0 for q in answer["probabilities"]]
        shares = [q / math.fsum(probable) for q in probable]
        yield {**line, "choices": list(row.choices), "label_probabilities": shares}


def _unlabelled(given: str | None) -> str | None:
    """The path of the file. Raises `ConfigError` where there is none."""
    if given is None:
        return None
    path = Path(given).absolute()
    if not path.is_file():
        raise ConfigError("--unlabelled", given, "is no file", "Give rows as the run has them, right answers left out.")
    return str(path)
