"""`loradrop STAGE --help`: what a stage does, what of the configuration it reads, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.stages.table import OFFERED, Stage

WIDTH = 80
COMMAND = "bash launch.sh"
ABOUT = """\
Fine-tune 4-bit language models with LoRA under structured dropout, search the dropout rate, rank and learning rate,
evaluate ensembles of the adapters, export them for stock PEFT."""
EXAMPLES = (
    "", "--quick", "train --config mine.yaml --dry-run",
    "train --run-dir runs/mine data.path=rows.csv adapter.rate=0.3",
)
OFTEN = """\
Any configuration key can be set as key.path=value, among them: model.path data.path data.template data.train_rows
data.max_tokens adapter.rank adapter.alpha adapter.target_modules adapter.method adapter.rate adapter.rates.POSITION
adapter.kind train.max_steps train.epochs train.global_batch train.micro_batch train.learning_rate train.seed
train.draws ensemble.size compare.methods compare.learning_rates launch.processes."""
CODES = """\
Exit codes: 0 done, 1 failed, 2 something to mend in what was given, 75 stopped on request (the same command
continues)."""
EVERY_KEY = "Every key, with its meaning, type, range and default: loradrop keys."
SECTIONS = {
    "model": "the frozen base: which, how it is quantized, in which precision it computes",
    "data": "where rows come from, how columns become rows, how many are of which split",
    "adapter": "rank, alpha and targets of the adapter; what is dropped, at which rate",
    "train": "how long, in which batches, at which learning rate, under how many draws",
    "ensemble": "mask draws at test time, and how they are averaged",
    "select": "by what validation chooses",
    "evaluate": "batches of predictions, calibration bins, bootstrap samples",
    "export": "what is written for deployment",
    "search": "trials, their length, and the space of what they try",
    "compare": "methods, learning rates and seeds of a comparison",
    "launch": "processes, nodes, what happens on signals and after crashes",
    "logging": "TensorBoard and Weights & Biases, beside metrics.jsonl",
}
"""Section of the configuration -> what is in it. Help is printed by any Python, without pydantic."""
FROM_RUN = (
    "The configuration is that of the run folder; launch.*, model.trust_remote_code and what training does not read,"
    " here"
)


@dataclass(frozen=True)
class Text:
    """What the help of one stage says beside its line in the table."""

    about: str
    sections: tuple[str, ...] = ()
    """Of the configuration, that it reads."""
    examples: tuple[str, ...] = ()
    """What follows the command."""
    words: str = "[key=value ...]"
    """What it takes beside options."""


class Page(NamedTuple):
    """A help text: the line of usage, and what stands above and below the options."""

    usage: str
    above: str
    below: str


TEXTS = {
    "run": Text(
        "Searches, trains the method and plain LoRA with the best values of each, evaluates both, reports and exports."
        " The same command continues after an interruption, and skips what is done.",
        ("model", "data", "adapter", "train", "ensemble", "select", "evaluate", "export", "search", "launch",
         "logging"),
        ("", "--quick", "--run-dir runs/mine model.path=models/llama data.path=rows.csv"),
    ),
    "search": Text(
        "Tries values of the space (search.space) in short trainings, for the method and for plain LoRA alike; the best"
        " of each and an ensemble of adapters are written into RUN-search/search.json.",
        ("model", "data", "adapter", "train", "select", "search", "launch"),
        ("search --run-dir runs/mine data.path=rows.csv search.trials=8",),
    ),
    "train": Text(
        "Trains one adapter with the values given, and keeps that of the best validation in RUN/adapter. With data of"
        " your own it makes 3 epochs unless train.epochs or train.max_steps say otherwise.",
        ("model", "data", "adapter", "train", "launch", "logging"),
        ("train --run-dir runs/mine data.path=rows.csv train.epochs=2",
         "train --config mine.yaml --dry-run", "train --config papers/roberta-large-rte"),
    ),
    "evaluate": Text(
        f"Predicts validation, calibration and test rows under the adapter and its mask draws. {FROM_RUN}"
        " ensemble, evaluate, select and data.evaluation, may be given anew.",
        ("ensemble", "evaluate", "launch"), ("evaluate --run-dir runs/mine",),
    ),
    "report": Text(
        f"Scores the predictions, fits temperatures, chooses by validation; writes result.json and report.html."
        f" {FROM_RUN} select, evaluate, ensemble.average and ensemble.adaptive, may be given anew.",
        ("ensemble", "select", "evaluate"), ("report --run-dir runs/mine",),
    ),
    "export": Text(
        f"Writes the adapter, and one folder per mask draw, as PEFT loads them, and compares what stock PEFT says"
        f" of test rows. {FROM_RUN} export, may be given anew.", ("export",), ("export --run-dir runs/mine",),
    ),
    "predict": Text(
        "Answers rows of a file with the chosen, calibrated ensemble of a trained run, one line of JSON per row.",
        ("launch",), ("predict --run-dir runs/mine --input rows.csv --output out.jsonl",),
    ),
    "distill": Text(
        "Asks the chosen, calibrated ensemble of a reported run about its training rows and those of --unlabelled,"
        " and trains one plain adapter to say the same, in RUN-distilled: a run like any other, for evaluate, report,"
        " export and predict. train.*, and adapter's rank, alpha and target_modules, may be given anew.",
        ("train", "launch"),
        ("distill --run-dir runs/mine", "distill --run-dir runs/mine --unlabelled more.jsonl"),
    ),
    "serve": Text(
        "Answers over HTTP with the ensemble of a reported run or of an export: /v1/classify, OpenAI's /v1/completions"
        " and /v1/chat/completions (the members' average, token by token), /metrics, and a page at /. The key that"
        " clients have to show comes from --api-key-file or LORADROP_API_KEY; without one it listens at this machine"
        " alone. SIGTERM ends it when what was accepted is answered. Limits are given as key=value (docs/serving.md):"
        " waiting, gather_ms, body_bytes, body_seconds, seconds, rows, tokens, new_tokens, sequences.",
        (), ("serve --run-dir runs/mine", "serve --run-dir runs/mine/export --port 9000"),
    ),
    "eval": Text(
        "Scores tasks of lm-evaluation-harness (pip install \"loradrop[eval]\"), by name or from a task file: the base,"
        " the adapter, each of its mask draws and their average, by likelihoods and greedy texts. Results go to"
        " RUN/harness.json.", ("ensemble",),
        ("eval --run-dir runs/mine --tasks arc_easy,hellaswag --limit 200",
         "eval --run-dir runs/mine --tasks mine --include-path tasks"), "",
    ),
    "data": Text(
        "Shows rows as the model will see them, supervised tokens coloured, and the lengths of all. Loads a tokenizer"
        " and no model.", ("model", "data", "train"),
        ("data --rows 3 data.path=rows.csv", "data --run-dir runs/mine"),
    ),
    "compare": Text(
        "Trains several methods at several settings on the same rows and budget, and puts them into one table with"
        " paired differences to plain LoRA (none). It takes up methods that are added later.",
        ("model", "data", "adapter", "train", "ensemble", "select", "evaluate", "compare", "launch"),
        ("compare", "compare --config mine.yaml 'compare.methods=[none, hiddenkey]'",
         "compare 'compare.seeds=[0, 1, 2]'"),
    ),
    "verify": Text(
        "Reads every file of a run, search, comparison or export, and says what is whole, damaged or foreign.", (),
        ("verify runs/mine",), "[FOLDER]",
    ),
    "keys": Text(
        "Prints the configuration's keys with meaning, type, range and default: all of them, those that begin with a"
        " word or contain it, or what another tool calls so.", (),
        ("keys train", "keys rank", "keys lora_alpha", "keys data.template --json"), "[PREFIX]",
    ),
    "schema": Text(
        "Prints the JSON Schema of a configuration file: editors complete and check keys by it, for example where the"
        " file begins with `# yaml-language-server: $schema=loradrop.schema.json`.", (),
        ("schema > loradrop.schema.json",), "",
    ),
    "recipes": Text("Prints the names that --config takes, and what each is.", (), ("recipes",), ""),
    "doctor": Text("Tries what this machine has, and says how to mend what does not work.", (), ("doctor",)),
    "test": Text(
        "Runs linter, type checker and the project's own tests, in a checkout of the repository. With --gpu only the"
        " acceptance of a device: parity, ZeRO, packs, exports, speed and memory of an 8B-shaped base, in under eight"
        " minutes. What has passed or was measured is kept in --output (default runs/acceptance-DEVICE.json) and not"
        " run again under the same code. --device cpu runs the same pieces in a small form.", (),
        ("test --fast", "test --gpu", "test --gpu --device cpu"), "",
    ),
}
"""Stage -> its text."""


def general() -> Page:
    """Of `loradrop --help`."""
    stages = "\n".join(_entry(stage.name, stage.help) for stage in OFFERED)
    where = f"Recipes for --config: loradrop recipes.\n{EVERY_KEY}"
    below = (_examples(EXAMPLES), _filled(OFTEN), _filled(CODES), where)
    above = f"{_filled(ABOUT)}\n\nstages (loradrop STAGE --help says more):\n{stages}"
    return Page("loradrop [STAGE] [OPTIONS] [key=value ...]", above, "\n\n".join(below))


def of_stage(stage: Stage) -> Page:
    """Of `loradrop STAGE --help`."""
    text = TEXTS.get(stage.name, Text(""))
    below = [_examples(text.examples)] if text.examples else []
    if text.sections:
        entries = "\n".join(_entry(name, SECTIONS[name]) for name in text.sections)
        below.insert(0, f"configuration it reads (loradrop keys SECTION tells all):\n{entries}")
    above = "\n\n".join(_filled(part) for part in (f"{stage.name}: {stage.help}", text.about) if part)
    return Page(f"loradrop {stage.name} [OPTIONS] {text.words}".strip(), above, "\n\n".join([*below, EVERY_KEY]))


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def _entry(name: str, text: str) -> str:
    start = f"  {name:10} "
    return textwrap.fill(
        " ".join(text.split()), WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
    )


def _examples(examples: Sequence[str]) -> str:
    return "examples:\n" + "\n".join(f"  {COMMAND} {example}".rstrip() for example in examples)
