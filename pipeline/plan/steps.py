"""What --dry-run says of each stage: what it would do, and where it would write."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.distributed.devices import accelerator_memory
from pipeline.distributed.launcher import has_accelerator, process_count
from pipeline.plan.resolve import length_text
from pipeline.run_folder.comparison import plan_trainings, values_text
from pipeline.run_folder.paths import Folders


def folder(config: RunConfig, folders: Folders) -> str:
    """A stage that has no text of its own."""
    return f"  -> {folders.run}"


def search(config: RunConfig, folders: Folders) -> str:
    """Trials."""
    return _line("search", f"{config.search.trials} trials of {config.search.max_steps} steps -> {folders.search}")


def training(config: RunConfig, folders: Folders) -> str:
    """Length, processes, DeepSpeed file; how much memory a process takes."""
    return f"{_training(config, folders)}\n\n{_memory(config)}"


def evaluation(config: RunConfig, folders: Folders) -> str:
    """Members and splits."""
    return _line("evaluate", f"{config.ensemble.size} mask draws, 3 splits -> {folders.run / 'predictions'}")


def report(config: RunConfig, folders: Folders) -> str:
    """The page."""
    return _line("report", f"{folders.run / 'report.html'}")


def export(config: RunConfig, folders: Folders) -> str:
    """Forms."""
    return _line("export", f"{', '.join(config.export.forms)} -> {folders.run / 'export'}")


def line(config: RunConfig, folders: Folders) -> str:
    """All of them, in order; how much memory a training process takes."""
    plain = _line("plain", f"the same budget without dropout -> {folders.plain}")
    first, later = (search, _training), (evaluation, report, export)
    steps = [*(step(config, folders) for step in first), plain, *(step(config, folders) for step in later)]
    return "\n".join([*steps, "", _memory(config)])


def comparison(config: RunConfig, folders: Folders) -> str:
    """Every training, and the evaluation of all of them."""
    planned = [
        _line(f"{number}", f"{one.method}, {values_text(one.values)}, seed {one.seed}: {own.train.max_steps} steps")
        for number, (one, own) in enumerate(plan_trainings(config), 1)
    ]
    evaluated = f"all of them in one pass, {config.ensemble.size} mask draws per method -> {folders.comparison}"
    return "\n".join([*planned, _line("evaluate", evaluated)])


def _training(config: RunConfig, folders: Folders) -> str:
    by_device = has_accelerator() and not config.launch.processes
    processes = "one per visible accelerator" if by_device else process_count(config.launch)
    text = f"{length_text(config.train)}, processes: {processes}, {config.train.deepspeed} -> {folders.run}"
    return _line("train", text)


def _memory(config: RunConfig) -> str:
    """The memory plan: the one thing before a start that imports torch."""
    from pipeline.plan.memory_table import memory_table

    return memory_table(config, config.launch.processes or len(accelerator_memory()) or process_count(config.launch))


def _line(name: str, text: str) -> str:
    return f"  {name:9} {text}"
