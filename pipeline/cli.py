"""The command line: `loradrop` and `bash launch.sh`. Imports nothing heavy before a stage is known."""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from pipeline import __version__
from pipeline.errors import EXIT_OK, EXIT_STOPPED, EXIT_USER, LoradropError, Stopped, UserError, file_fault
from pipeline.plan.request import Request
from pipeline.stages.table import OFFERED, STAGES, Stage
from pipeline.terminal import printable, say

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.run_folder.paths import Folders

DESCRIPTION = """\
Fine-tune 4-bit language models with LoRA under structured dropout, search the dropout rate, rank and
learning rate, evaluate ensembles of the adapters, export them for stock PEFT.

stages:
""" + "\n".join(f"  {stage.name:10} {stage.help}" for stage in OFFERED)
EXAMPLES = """\
examples:
  bash launch.sh
  bash launch.sh --quick
  bash launch.sh train --run-dir runs/mine model.path=/models/llama data.path=rows.jsonl adapter.rate=0.3
  bash launch.sh train --config mine.yaml --dry-run

Any configuration key can be set as key.path=value, among them: model.path data.path data.template data.train_rows
data.max_tokens adapter.rank adapter.alpha adapter.target_modules adapter.method adapter.rate adapter.rates.POSITION
adapter.kind train.max_steps train.epochs train.global_batch train.micro_batch train.learning_rate train.seed
train.draws ensemble.size compare.methods compare.learning_rates launch.processes. Every key: pipeline/config/.

exit codes: 0 done, 1 failed, 2 something to mend in what was given, 75 stopped on request (same command continues).
"""


class Parser(argparse.ArgumentParser):
    """Its errors are ours: one sentence, and what it quotes is shown as every error shows it."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        raise UserError("command line", None, message, "See loradrop --help.")


def build_parser() -> argparse.ArgumentParser:
    """The argument parser."""
    parser = Parser(
        prog="loradrop",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="loradrop [STAGE] [--config FILE-or-NAME] [--run-dir DIR] [key=value ...]",
    )
    parser.add_argument("words", nargs="*", metavar="STAGE key=value", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE-or-NAME", help="a YAML file, or a recipe of pipeline/recipes")
    parser.add_argument(
        "--run-dir", metavar="DIR", help="the run folder (default: runs/ + the recipe's name)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few minutes, labelled as no result")
    parser.add_argument("--dry-run", action="store_true", help="resolve, validate, print the plan, stop")
    parser.add_argument("--rows", type=int, default=2, metavar="N", help="data: rows shown of each split (default 2)")
    parser.add_argument("--fast", action="store_true", help="test: only the fast tier")
    parser.add_argument("--json", action="store_true", help="doctor: findings for programs")
    parser.add_argument("--version", action="version", version=f"loradrop {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        with stopping_between_stages():
            return dispatch(build_parser().parse_intermixed_args(argv))
    except LoradropError as error:
        say(f"loradrop: {error}")
        return error.exit_code
    except OSError as error:
        if (fault := file_fault(error)) is None:
            raise
        say(f"loradrop: {fault}")
        return fault.exit_code
    except KeyboardInterrupt:
        print("\nloradrop: interrupted; the same command continues.", file=sys.stderr)
        return EXIT_STOPPED


def dispatch(arguments: argparse.Namespace) -> int:
    """Run the stage that the arguments name; its exit code."""
    stage, overrides = split_words(arguments.words)
    request = Request(
        arguments.config, arguments.run_dir, tuple(overrides), arguments.quick, arguments.dry_run, arguments.rows,
        arguments.fast, arguments.json,
    )
    code: int = stage.load()(request) if stage.settings == "own" else execute(stage, request)
    return code


def execute(stage: Stage, request: Request) -> int:
    """Resolve the configuration, check everything that can be checked without a model, run the stage.

    Raises:
        UserError: something to mend, before any model is loaded or anything is written.
    """
    from pipeline.config import dump_config
    from pipeline.config.space import find_space, read_space
    from pipeline.distributed.nodes import check_nodes, owned_folders
    from pipeline.hub import check_model_at_hand
    from pipeline.plan.compute_dtype import with_compute_dtype
    from pipeline.plan.preflight import check_inputs
    from pipeline.plan.resolve import fit_micro_batch, resolve_epochs
    from pipeline.plan.steps import step_lines
    from pipeline.run_folder.mark import FOLDERS, claim
    from pipeline.run_folder.paths import Folders
    from pipeline.stages.processes import check_adapter, start

    folders = Folders(request.run)
    config = resolve(stage, request, folders)
    check_inputs(config)
    if stage.settings == "new" or stage.loads_model:
        check_model_at_hand(config.model.path, config.model.revision)
    if "search" in (stage.plan or (stage.name,)):
        read_space(find_space(config.search.space))  # how it fits the method is tried when the search starts
    common = [other.name for other in OFFERED if other.processes == "all"]
    check_nodes(config.launch, stage.name, stage.processes, common)
    if stage.trains:
        config = config.model_copy(update={"train": fit_micro_batch(config.train, config.launch)})
    if stage.settings == "new":
        config = with_compute_dtype(config, [getattr(folders, name) for name in stage.writes])
    if request.dry_run:
        check_adapter(stage, config, folders)
        print(printable(f"{dump_config(config)}\nplan (nothing has been started):"))
        for step in stage.plan or (stage.name,):
            print(printable("\n".join(step_lines(config, folders, step))))
        return EXIT_OK
    config = resolve_epochs(config)
    shared = config.launch if stage.processes == "all" else None
    with owned_folders([getattr(folders, name) for name in stage.writes], stage.name, shared):
        if stage.settings == "new":
            for name in stage.writes:
                claim(getattr(folders, name), FOLDERS[name])
        if stage.processes == "none":
            code: int = stage.load()(config, folders)
            return code
        code = start(stage.name, config, folders)
        if code == EXIT_OK:
            stage.show_outcome(folders.run)
        return code


def resolve(stage: Stage, request: Request, folders: Folders) -> RunConfig:
    """The configuration in force, once the folders are known to be ours, or free.

    Raises:
        UserError: they are neither, or a key or value is wrong.
    """
    from pipeline.plan.resolve import resolve_new, resolve_saved
    from pipeline.run_folder.mark import FOLDERS, refuse_foreign, require_mark

    if stage.settings == "new":
        for name in stage.writes:
            refuse_foreign(getattr(folders, name), FOLDERS[name])
        stage.check_folders(folders)
        return resolve_new(request, stage.name, stage.recipe, stage.unread)
    require_mark(folders.run, "run", "comparison")
    return resolve_saved(request, stage.name)


@contextmanager
def stopping_between_stages() -> Iterator[None]:
    """A signal while no stage runs (a stage catches its own): nothing is half-written, so leave at once."""

    def leave(number: int, frame: object) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}; the same command continues")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def split_words(words: list[str]) -> tuple[Stage, list[str]]:
    """(stage, overrides): the first word may name a stage, all others are key=value."""
    name = "run"
    if words and "=" not in words[0]:
        name, words = words[0], words[1:]
    names = [stage.name for stage in OFFERED]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"loradrop: stage = {name!r}: must be one of {', '.join(names)}.{hint}", file=sys.stderr)
        raise SystemExit(EXIT_USER)
    return STAGES[name], words


if __name__ == "__main__":
    sys.exit(main())
