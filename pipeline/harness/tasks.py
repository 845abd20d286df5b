"""Tasks of lm-evaluation-harness by their names or files, checked before a model is loaded. Needs lm-eval."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from pipeline.errors import ConfigError
from pipeline.harness.model import MembersLM

KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
"""What a task may ask of a model."""
FEWSHOT_SEED, BOOTSTRAP = 1234, 100
"""As the harness draws examples; resamples for the errors of metrics that are no means."""


class Tasks:
    """The tasks that were asked for."""

    def __init__(self, names: Sequence[str], include: str | None, shots: int | None) -> None:
        """Load them once.

        Args:
            include: a folder with task files, searched before the harness's own.
            shots: examples in the prompt; None: as each task says.

        Raises:
            ConfigError: no such task or file, data that cannot be had, a task that generates.
        """
        if include is not None and not Path(include).is_dir():
            raise ConfigError("--include-path", include, "is no folder", "Give a folder with task files (.yaml).")
        self._names, self._shots = list(names), shots
        self._manager = TaskManager(include_path=include)
        loaded = self._load()
        for name, task in loaded["tasks"].items():
            if task.OUTPUT_TYPE not in KINDS:
                what = f"asks for {task.OUTPUT_TYPE}, and members answer {', '.join(KINDS)}"
                raise ConfigError("--tasks", name, what, "Leave it out.")
            settings = task.get_config("generation_kwargs") or {}
            if task.OUTPUT_TYPE == "generate_until" and (settings.get("do_sample") or settings.get("num_beams", 1) > 1):
                what = "samples its texts, or searches with beams, and members write greedily"
                raise ConfigError("--tasks", name, what, "Set do_sample to false and num_beams to 1 in its file.")
        self.greedy = any(
            task.OUTPUT_TYPE == "loglikelihood" or "exact_match" in getattr(task, "_metric_fn_list", {})
            for task in loaded["tasks"].values()
        )
        """Whether some task asks what would be written."""

    def scored(self, model: MembersLM, limit: int | None) -> dict[str, Any]:
        """Task or group -> metric -> value, and the rows and versions of the tasks."""
        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else a pool of copies of this process resamples each metric
        with redirect_stdout(sys.stderr):  # stdout is for the table
            found: Mapping[str, Any] = evaluate(
                lm=model, task_dict=self._load(), limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
            ) or {}
        rows = {name: counts["effective"] for name, counts in found["n-samples"].items()}
        return {"results": _plain(found["results"]), "rows": rows, "versions": _plain(found["versions"])}

    def _load(self) -> Any:
        """Anew for each system: tasks keep what they were answered."""
        for name in self._names:
            known = name in self._manager.all_tasks or Path(name).is_file()
            if not known:
                remedy = "See `lm-eval ls tasks`, or give a task file, or a folder of them with --include-path."
                raise ConfigError("--tasks", name, "is no task of lm-eval, and no task file", remedy)
        try:
            loaded = self._manager.load(self._names)
        except Exception as error:  # of the hub's client, of datasets, of the harness: many types
            what = f"cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
            remedy = "Check the network, or the file and the data that it names."
            raise ConfigError("--tasks", ", ".join(self._names), what, remedy) from error
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (self._shots is not None and own != 0):  # 0 in a task's file is never overruled
                task.set_config(key="num_fewshot", value=self._shots or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded


def _plain(values: Any) -> Any:
    """Numbers and texts for JSON; what is neither (a function's name, N/A) as text."""
    if isinstance(values, Mapping):
        return {str(key): _plain(value) for key, value in values.items()}
    if isinstance(values, bool | int | float | str) or values is None:
        return values
    return float(values) if hasattr(values, "__float__") else str(values)
