"""`loradrop eval`: tasks of lm-evaluation-harness, answered by every member of a run and by their average.

Systems: the base; the adapter without masks; each of its `ensemble.size` mask draws; and all draws together, whose
likelihood of a text is the mean of theirs. A temperature has no part in it: it scales probabilities of a row's choices
among themselves, and which is the most probable one does not depend on it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import EXIT_OK, ConfigError, SetupError
from pipeline.plan.request import Request
from pipeline.terminal import one_line, say

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.harness.likelihoods import Likelihoods

RESULT = "harness.json"
SHOWN = ("acc", "acc_norm", "exact_match", "f1", "mcc", "perplexity", "word_perplexity", "byte_perplexity")
"""Metrics of the table, in this order; where a task has none of them, its first."""


def evaluate_tasks(request: Request) -> int:
    """Score the run's members on --tasks; write harness.json into the run folder; the exit code.

    Raises:
        UserError: no tasks, or some that cannot be loaded or scored; no run with a trained adapter of a causal model;
            lm-eval is missing.
    """
    from pipeline.distributed.nodes import owned_folders
    from pipeline.files import write_json
    from pipeline.model.kind import model_kind
    from pipeline.plan.resolve import resolve_saved
    from pipeline.run_folder.chain import Origin, require_adapter
    from pipeline.run_folder.mark import require_mark
    from pipeline.run_folder.paths import RunPaths

    names = [name.strip() for name in (request.tasks or "").split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks", request.tasks, "names no task", "Give names or files: --tasks arc_easy,my.yaml.")
    for option, value in (("--limit", request.limit), ("--num-fewshot", request.num_fewshot)):
        if value is not None and value < (option == "--limit"):
            raise ConfigError(option, value, "is too small", "Give a whole number of rows, or leave it out.")
    require_mark(request.run, "run")
    config, paths = resolve_saved(request, "eval"), RunPaths(request.run)
    require_adapter(paths, Origin(config.training_sha256()))
    if model_kind(config.model) == "classifier":
        raise ConfigError("model.kind", "classifier", "has no likelihood of a text", "Give a run of a causal model.")
    if find_spec("lm_eval") is None:
        remedy = 'Install it: pip install "loradrop[eval]".'
        raise SetupError("loradrop eval", None, "needs lm-evaluation-harness, which is not installed", remedy)
    from pipeline.harness.tasks import Tasks

    for noisy in ("lm_eval", "lm-eval"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    tasks = Tasks(names, request.include_path, request.num_fewshot)
    if request.dry_run:
        say(f"{len(names)} tasks would be scored under {config.ensemble.size} mask draws")
        return EXIT_OK
    with owned_folders([request.run], "eval", None):
        result = _scored(config, paths.adapter, tasks, request)
        write_json(paths.root / RESULT, result)
    print(format_tasks(result))
    say(f"all metrics  {one_line(str(paths.root / RESULT))}")
    return EXIT_OK


def _scored(config: RunConfig, adapter: Path, tasks: Any, request: Request) -> dict[str, Any]:
    from importlib.metadata import version

    from pipeline.harness.model import MembersLM

    likelihoods, sha256 = load_members(config, adapter)
    systems = {}
    for key in likelihoods.systems:
        say(f"scoring {key}")
        systems[key] = tasks.scored(MembersLM(likelihoods, key, tasks.greedy), request.limit)
    return {
        "made_from": {"config_sha256": config.training_sha256(), "adapter_sha256": sha256},
        "lm_eval": version("lm_eval"), "tasks": request.tasks, "limit": request.limit,
        "num_fewshot": request.num_fewshot, "ensemble": {"size": config.ensemble.size, "seed": config.ensemble.seed},
        "systems": systems,
    }  # fmt: skip


def load_members(config: RunConfig, adapter: Path) -> tuple[Likelihoods, str]:
    """Base, adapter and its draws on one model, and the hash of the adapter's weights."""
    from pipeline.adapters.build import attach_stored
    from pipeline.adapters.members import Member
    from pipeline.adapters.peft_format import read_adapter
    from pipeline.data.rows import Row
    from pipeline.data.splits import Splits
    from pipeline.distributed.world import lone_world
    from pipeline.harness.likelihoods import Likelihoods
    from pipeline.prediction.task import CausalLMTask, open_task

    stored = read_adapter(adapter)
    example = Splits([Row("example", "text", ("yes", "no"), 0)], [], [], [], "")
    task = open_task(config, example, lone_world().device)
    assert isinstance(task, CausalLMTask), "other kinds are refused"
    adapters = attach_stored(task.base, [stored], config.train.seed, config.adapter.fused)
    draws = range(config.ensemble.size if any(site.rate > 0 for site in stored.spec.sites) else 0)
    members = [Member(None), Member(0), *(Member(0, draw) for draw in draws)]
    systems: dict[str, tuple[int, ...]] = {"base": (0,), "adapter": (1,)}
    systems |= {f"draw {draw}": (2 + draw,) for draw in draws}
    if len(draws) > 1:
        systems[f"{len(draws)} draws"] = tuple(range(2, 2 + len(draws)))
    return Likelihoods(task, adapters, members, systems), stored.sha256


def format_tasks(result: Mapping[str, Any]) -> str:
    """A table per task: a line per system, its metrics with their standard errors; within 80 columns."""
    lines: list[str] = []
    systems = result["systems"]
    for task in next(iter(systems.values()))["results"]:
        shown = _metrics(next(iter(systems.values()))["results"][task])
        rows = next(iter(systems.values()))["rows"].get(task)
        head = one_line(task) + (f" ({rows} rows)" if rows else "")
        table = [[head, *(name for name, _ in shown)]]
        for key, found in systems.items():
            table.append([key, *_cells(found["results"][task], shown)])
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines += ["", *("  ".join([row[0].ljust(widths[0]), *(
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in table)]
    return "\n".join(lines[1:])


def _metrics(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, key) of three metrics at most: keys are METRIC,FILTER."""
    scores = [key for key, value in found.items() if "," in key and isinstance(value, float | int)]
    named = [(key.partition(",")[0], key) for key in scores if "_stderr" not in key]
    known = sorted((one for one in named if one[0] in SHOWN), key=lambda one: SHOWN.index(one[0]))
    return (known or named)[:3]


def _cells(found: Mapping[str, Any], shown: list[tuple[str, str]]) -> Iterator[str]:
    for name, key in shown:
        error = found.get(key.replace(name, f"{name}_stderr", 1))
        yield f"{found[key]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
