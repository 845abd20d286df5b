"""What --dry-run says of each stage: what it would do, and where it would write."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import RunConfig
from pipeline.distributed.devices import accelerator_memory
from pipeline.distributed.launcher import has_accelerator, process_count
from pipeline.plan.resolve import length_text
from pipeline.run_folder.comparison import plan_trainings, values_text
from pipeline.run_folder.paths import Folders


def step_lines(config: RunConfig, folders: Folders, name: str) -> Iterator[str]:
    """The lines of one step; `memory` is what a training process takes, `trainings` those of a comparison."""
    launch, run = config.launch, folders.run
    match name:
        case "search":
            beside = ", and as many of plain LoRA" if config.search.plain else ""
            steps = config.search.max_steps
            yield _line(name, f"{config.search.trials} trials of {steps} steps{beside} -> {folders.search}")
        case "train":
            by_device = has_accelerator() and not launch.processes
            processes = "one per visible accelerator" if by_device else process_count(launch)
            length = length_text(config.train)
            yield _line(name, f"{length}, processes: {processes}, {config.train.deepspeed} -> {run}")
        case "plain":
            yield _line(name, f"the same budget without dropout -> {folders.plain}")
        case "evaluate":
            most = "at most " if config.ensemble.stop_when_flat else ""
            sets = "".join(f" + {one}" for one in config.evaluate.also)
            yield _line(name, f"{most}{config.ensemble.size} mask draws, 3 splits{sets} -> {run / 'predictions'}")
        case "report":
            yield _line(name, f"{run / 'report.html'}")
        case "export":
            yield _line(name, f"{', '.join(config.export.forms)} -> {run / 'export'}")
        case "trainings":
            for number, (one, own) in enumerate(plan_trainings(config), 1):
                values = values_text(one.values)
                yield _line(f"{number}", f"{one.method}, {values}, seed {one.seed}: {length_text(own.train)}")
            which = "all of them" if config.compare.evaluate == "all" else "the chosen setting of each method"
            draws, folder = config.ensemble.size, folders.comparison
            yield _line("evaluate", f"{which} in one pass, {draws} mask draws per method -> {folder}")
        case "memory":
            from pipeline.plan.memory_table import memory_table  # imports torch: the one thing before a start that does

            yield ""
            yield memory_table(config, launch.processes or len(accelerator_memory()) or process_count(launch))
        case _:
            yield _line(name, f"-> {run}")


def _line(name: str, text: str) -> str:
    return f"  {name:9} {text}"
