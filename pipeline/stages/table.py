"""The stages, once: what the command offers, what each needs, and where its work is written.

A new stage is a file in this folder and a row here. Nothing else has to list it: --help, the checks, the launcher, the
processes that are started (`python -m pipeline.stages`) and `--dry-run` read this table. (`pipeline.plan.steps` has
words of its own for those of which --dry-run can tell more than the folder.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

TRUST = "--trust-remote-code"
"""How a command tells the processes that it starts: no file that they read can."""


@dataclass(frozen=True)
class Stage:
    """One stage."""

    name: str
    help: str
    """One line; empty: other stages start it, the command does not offer it."""
    processes: Literal["all", "one", "none"]
    """What works: `all` processes that `launch` describes; `one` process; `none` but the command itself."""
    settings: Literal["new", "saved", "own"]
    """The configuration: a `new` one from recipe and overrides; the one `saved` in the run folder; or the stage's `own`
    business, which then takes the request as it is."""
    function: str
    """The work, as `module:function`, imported when it is needed. `all`, `one`: (run folder). `none`: (config, folders)
    -> exit code; with `own` settings (request) -> exit code."""
    writes: tuple[Literal["run", "plain", "search", "comparison"], ...] = ()
    """What it writes into, of `run_folder.paths.Folders`: refused where it is not ours, made and marked else; one
    command at a time owns it."""
    refuses: str = ""
    """What looks at the folders before any of them is made, as `module:function` of them, where the mark is not all."""
    loads_model: bool = False
    """Of `all` and `one`: whether it loads the model, and takes `trusted`: whether code that comes with it may run."""
    needs_adapter: bool = False
    """Whether adapter/ must be whole and made from the folder's configuration (where the folder is no comparison)."""
    trains: bool = False
    """Whether all processes train: the micro-batch must then fit each one's share of a step."""
    plan: tuple[str, ...] = ()
    """Steps that --dry-run tells of (`pipeline.plan.steps`); the stage itself where none is named."""
    recipe: str = "default"
    """The recipe where none is given."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Beginning of an override that the stage does not read -> the way out."""
    outcome: str = ""
    """Of `all` and `one`: what the command shows in the end, where it was asked for this stage alone, as
    `module:function` of the run folder."""

    def load(self) -> Callable[..., Any]:
        """The function itself."""
        return _named(self.function)

    def check_folders(self, folders: Any) -> None:
        """Raises `RunFolderError` where the stage has nothing to do with what lies in the folders."""
        if self.refuses:
            _named(self.refuses)(folders)

    def show_outcome(self, run_dir: Path) -> None:
        """Print what a stage by itself ends with, if anything."""
        if self.outcome:
            _named(self.outcome)(run_dir)


def _named(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


_METHODS = "Give compare.methods=[{name: …, adapter: {method: …, rates: {…}}}]."

STAGES = {
    stage.name: stage
    for stage in (
        Stage("run", "all of the following, in order (the default)", "none", "new", "pipeline.stages.run:run_line",
              writes=("run", "plain", "search"), refuses="pipeline.stages.run:refuse_trained", trains=True,
              plan=("search", "train", "plain", "evaluate", "report", "export", "memory")),
        Stage("search", "Ray Tune over dropout rate, rank and learning rate", "none", "new",
              "pipeline.stages.search:run_search", writes=("search",)),
        Stage("train", "one adapter, DeepSpeed-launched", "all", "new", "pipeline.stages.train:train_stage",
              writes=("run",), loads_model=True, trains=True, plan=("train", "memory"),
              outcome="pipeline.stages.run:say_trained"),
        Stage("evaluate", "predictions of every ensemble member, cached", "all", "saved",
              "pipeline.stages.evaluate:evaluate_run", writes=("run",), loads_model=True, needs_adapter=True),
        Stage("report", "scores, calibration, cost: result.json and report.html", "one", "saved",
              "pipeline.stages.report:write_report", writes=("run",), outcome="pipeline.stages.report:print_report"),
        Stage("export", "adapter, mask draws, merged models: export.forms, each proven by a stock tool", "one",
              "saved", "pipeline.stages.export:export_run", writes=("run",), loads_model=True, needs_adapter=True),
        Stage("predict", "the chosen, calibrated ensemble on new rows (--input, --output, --abstain)", "none", "own",
              "pipeline.stages.predict:predict"),
        Stage("distill", "the chosen, calibrated ensemble taught to one plain adapter, in RUN-distilled (--unlabelled)",
              "none", "own", "pipeline.stages.distill:distill"),
        Stage("serve", "the chosen, calibrated ensemble behind HTTP, OpenAI's routes among others (--host, --port)",
              "none", "own", "pipeline.serving.command:serve"),
        Stage("eval", "tasks of lm-evaluation-harness, by every member and their average (--tasks)", "none", "own",
              "pipeline.harness.command:evaluate_tasks"),
        Stage("data", "real rows as the model will see them, supervised tokens coloured; nothing is trained", "none",
              "own", "pipeline.stages.data:show"),
        Stage("compare", "several methods at several learning rates on the same base, data and budget: one table",
              "none", "new", "pipeline.stages.compare:run_comparison",
              writes=("comparison",), trains=True,
              plan=("trainings",), recipe="compare",
              unread=dict.fromkeys(("adapter.method", "adapter.rate=", "adapter.rates"), _METHODS)),
        Stage("verify", "what of a run, search, comparison or export is whole, damaged or foreign; nothing is written",
              "none", "own", "pipeline.stages.verify:verify"),
        Stage("doctor", "what of this machine, its packages and a configuration is not fit to run, and what mends it",
              "none", "own", "pipeline.stages.doctor:diagnose"),
        Stage("keys", "every configuration key: meaning, type, range, default", "none", "own",
              "pipeline.stages.reference.keys:show_keys"),
        Stage("schema", "the JSON Schema of a configuration file, for editors", "none", "own",
              "pipeline.stages.reference.schema:show_schema"),
        Stage("recipes", "what --config NAME takes", "none", "own", "pipeline.stages.reference.recipes:show_recipes"),
        Stage("test", "the project's own tests, arithmetic also on AVX2 kernels (--fast: no slow tier)", "none", "own",
              "pipeline.stages.reference.test:run_tests"),
        Stage("predict_rows", "", "all", "saved", "pipeline.stages.predict:predict_rows", writes=("run",),
              loads_model=True, needs_adapter=True),
        Stage("pack", "", "one", "saved", "pipeline.stages.pack:pack_stage", loads_model=True),
        Stage("method_check", "", "one", "saved", "pipeline.plan.methods:check_methods", loads_model=True),
    )
}
"""name -> stage, in the order of --help."""
OFFERED = tuple(stage for stage in STAGES.values() if stage.help)
