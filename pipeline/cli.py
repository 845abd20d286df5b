"""The command line: `loradrop` and `bash launch.sh`. Imports nothing heavy before a stage is known."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import __version__
from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER, LoradropError, Stopped, UserError, file_fault
from pipeline.plan.request import Request
from pipeline.stages.reference.help import general, of_stage
from pipeline.stages.table import OFFERED, STAGES, Stage
from pipeline.terminal import printable, say

if TYPE_CHECKING:
    from pipeline.plan.layers import Layers
    from pipeline.run_folder.paths import Folders


class Parser(argparse.ArgumentParser):
    """Its errors are ours: one sentence, and what it quotes is shown as every error shows it."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        remedy, (what, _, given) = "See loradrop --help.", message.partition(": ")
        if what == "unrecognized arguments" and (name := given.split()[0].partition("=")[0].strip("-")):
            word = name.replace("-", "_")
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(f"--{name}", flags, 1, 0.8)
            remedy = f"Keys are set as key.path=value, without dashes: see loradrop keys {word}, or loradrop --help."
            if near and given.startswith("-"):
                remedy = f"Did you mean {near[0]}?"
        raise UserError("command line", None, message, remedy)


def build_parser(stage: Stage | None = None) -> argparse.ArgumentParser:
    """The argument parser; its help is that of one stage, or of the whole command."""
    page = of_stage(stage) if stage else general()
    parser = Parser(
        prog="loradrop", usage=page.usage, description=page.above, epilog=page.below, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new = [one.name for one in OFFERED if one.settings == "new"]
    saved = [one.name for one in OFFERED if one.settings == "saved"]

    def option(flag: str, text: str, stages: Sequence[str], **more: Any) -> None:
        shown = f"{', '.join(stages)}: {text}" if stage is None and len(stages) < 4 else text
        hidden = stage is not None and stage.name not in stages
        parser.add_argument(flag, help=argparse.SUPPRESS if hidden else shown, **more)

    parser.add_argument("words", nargs="*", metavar="STAGE key=value", help=argparse.SUPPRESS)
    option("--config", "a YAML file, or a recipe (loradrop recipes)", [*new, "data", "doctor"], metavar="FILE-or-NAME")
    folder = "the run folder (default: runs/ + the recipe's name)"
    named = [*new, *saved, "data", "verify", "predict", "distill", "serve", "eval", "doctor"]
    option("--run-dir", folder, named, metavar="DIR")
    option("--quick", "a smoke run of a few minutes, labelled as no result", new, action="store_true")
    option("--dry-run", "resolve, validate, print the plan, stop", [*new, *saved], action="store_true")
    option("--rows", "rows shown of each split (default 2)", ["data"], type=int, default=2, metavar="N")
    option("--fast", "only the fast tier", ["test"], action="store_true")
    option("--gpu", "the acceptance of a device, resumed where it stopped", ["test"], action="store_true")
    option("--device", "with --gpu: cuda (default), or cpu for a small form", ["test"], metavar="DEVICE")
    option("--fresh", "with --gpu: forget what has passed before", ["test"], action="store_true")
    option("--json", "print JSON", ["doctor", "keys", "recipes"], action="store_true")
    option("--input", "rows as the run has them; -: JSON Lines on stdin", ["predict"], metavar="FILE")
    output = "JSON Lines, or what has passed: continued where they end"
    option("--output", output, ["predict", "test"], metavar="FILE")
    option("--abstain", "share of answers that may be wrong", ["predict", "serve"], type=float, metavar="RISK")
    option("--unlabelled", "more rows to teach, as for predict", ["distill"], metavar="FILE")
    option("--host", "where to listen (default 127.0.0.1: this machine alone)", ["serve"], metavar="ADDRESS")
    option("--port", "(default 8000; 0: any that is free)", ["serve"], type=int, metavar="N")
    option("--api-key-file", "its first line is the key that clients have to show", ["serve"], metavar="FILE")
    option("--tasks", "names or files of lm-eval's tasks, separated by commas", ["eval"], metavar="TASKS")
    option("--include-path", "a folder with task files of yours", ["eval"], metavar="DIR")
    option("--limit", "rows of each task", ["eval"], type=int, metavar="N")
    option("--num-fewshot", "examples in the prompt (default: as a task says)", ["eval"], type=int, metavar="N")
    # No action of argparse's: which stage is asked about is known once all words are read.
    parser.add_argument("-h", "--help", action="store_true", help="show this, or what a stage does, and stop")
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
    except BrokenPipeError:  # who reads what is printed has seen enough: `loradrop keys | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes there
        return EXIT_FAILED
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
    if arguments.help:
        build_parser(stage if arguments.words else None).print_help()
        return EXIT_OK
    request = Request(
        arguments.config, arguments.run_dir, tuple(overrides), arguments.quick, arguments.dry_run, arguments.rows,
        arguments.fast, json=arguments.json, input=arguments.input, output=arguments.output, abstain=arguments.abstain,
        unlabelled=arguments.unlabelled, host=arguments.host, port=arguments.port, api_key_file=arguments.api_key_file,
        tasks=arguments.tasks, include_path=arguments.include_path, limit=arguments.limit,
        num_fewshot=arguments.num_fewshot, gpu=arguments.gpu, device=arguments.device, fresh=arguments.fresh,
    )
    code: int = stage.load()(request) if stage.settings == "own" else execute(stage, request)
    return code


def execute(stage: Stage, request: Request) -> int:
    """Resolve the configuration, check everything that can be checked without a model, run the stage.

    Raises:
        UserError: something to mend, before any model is loaded or anything is written.
    """
    from pipeline.config.space import find_space, read_space
    from pipeline.distributed.nodes import check_nodes, owned_folders
    from pipeline.hub import check_model_at_hand
    from pipeline.plan.compute_dtype import with_compute_dtype
    from pipeline.plan.layers import annotated, summary
    from pipeline.plan.preflight import check_inputs, read_fetched
    from pipeline.plan.resolve import OWN_DATA, fit_micro_batch, resolve_epochs
    from pipeline.plan.steps import step_lines
    from pipeline.run_folder.mark import FOLDERS, claim
    from pipeline.run_folder.paths import Folders
    from pipeline.stages.processes import check_adapter, start

    folders = Folders(request.run)
    layers = resolve(stage, request, folders)
    config = check_inputs(layers.config)
    if (stage.settings == "new" or stage.loads_model) and not request.dry_run:  # which works without a network
        check_model_at_hand(config.model.path, config.model.revision)
    if "search" in (stage.plan or (stage.name,)):
        read_space(find_space(config.search.space))  # how it fits the method is tried when the search starts
    common = [other.name for other in OFFERED if other.processes == "all"]
    check_nodes(config.launch, stage.name, stage.processes, common)
    if stage.trains:
        config = config.model_copy(update={"train": fit_micro_batch(config.train, config.launch)})
    if stage.settings == "new":
        config = with_compute_dtype(config, [getattr(folders, name) for name in stage.writes])
    if stage.trains and layers.sources.get("train.epochs") == OWN_DATA:
        say(f"own data: {config.train.epochs:g} epochs; train.epochs or train.max_steps says otherwise")
    if request.dry_run:
        check_adapter(stage, config, folders)
        print(printable(f"{annotated(layers, config)}\n\nplan (nothing has been started):"))
        for step in stage.plan or (stage.name,):
            print(printable("\n".join(step_lines(config, folders, step))))
        return EXIT_OK
    config = resolve_epochs(read_fetched(config))
    if stage.settings == "new":
        for line in ("settings (those left out have their defaults):", *summary(layers, config)):
            say(line)
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


def resolve(stage: Stage, request: Request, folders: Folders) -> Layers:
    """The settings in force, once the folders are known to be ours, or free.

    Raises:
        UserError: they are neither, or a key or value is wrong.
    """
    from pipeline.plan.resolve import new_layers, saved_layers
    from pipeline.run_folder.mark import FOLDERS, refuse_foreign, require_mark

    if stage.settings == "new":
        for name in stage.writes:
            refuse_foreign(getattr(folders, name), FOLDERS[name])
        stage.check_folders(folders)
        return new_layers(request, stage.name, stage.recipe, stage.unread)
    require_mark(folders.run, "run", "comparison")
    return saved_layers(request, stage.name)


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
