"""Words and options: stages, --config, --run-dir, overrides in every form."""

from __future__ import annotations

from random import Random

from helpers.fuzz.case import Case, Item
from helpers.fuzz.material import SETTINGS
from helpers.fuzz.values import PATHS, SCALARS
from pipeline.config.load import config_keys

NEW = ("train", "run", "search", "compare")
SAVED = ("evaluate", "report", "export")
KEYS = tuple(config_keys())
MEET = (
    Item("plain.txt", "bytes", b"not yaml: [\n"), Item("pipe", "fifo"), Item("loop", "link", b"loop"),
    Item("locked", "folder"), Item("locked", "mode", b"000"), Item("empty", "folder"),
    Item("mine/notes.txt", "bytes", b"keep me\n"), Item("mine/adapter/weights", "bytes", b"keep me\n"),
    Item("good.yaml", "bytes", b"label: good\n"), Item("far", "link", b"/proc/self"),
)
"""What paths lead to."""
WORDS = (
    "trian", "", " ", "--", "-", "-x", "--nothing", "--rows", "--rows=x", "--rows=" + "9" * 5000, "--rows=-1", "--fast",
    "--quick", "--config", "--run-dir", "--config=", "--run-dir=", "--conf=good.yaml", "--help", "--version", "=", "=1",
    "a=1", ".=1", "..=1", "train.=1", ".seed=1", "train..seed=1", "train.seed", "train.seed==1", "train.seed=1=2",
    "tr\x1bain.seed=1", "\x1b[2J", "\u202etrain", "bytes\udcff", "bytes\udcff=1", "x" * 100_000,
    "a" + ".a" * 5000 + "=1",
    "train.seed=1 ", " train.seed=1", "😀=1", "train.seed=1\ntrain.draws=2", "train=5", "train=null", "label", "x=y=z",
    "model.path={here}/mine", "data.path={here}/mine", "train.seed=1", "train.seed=2", "@good.yaml", "%s",
    "$(touch pwned)",
)


def make(random: Random) -> Case:
    stage = random.choice((*NEW, *SAVED))
    argv = ["--dry-run", stage, "--run-dir", random.choice(("run", "run", "mine", *PATHS))]
    if stage in NEW:
        argv += SETTINGS
    if random.random() < 0.5:
        argv += ["--config", random.choice(("good.yaml", "default", *PATHS))]
    for _ in range(random.choice((1, 1, 2, 3))):
        match random.randrange(4):
            case 0:
                argv.insert(random.randrange(1, len(argv) + 1), random.choice(WORDS))
            case 1:
                argv.append(f"{random.choice(KEYS)}={random.choice(SCALARS)}")
            case 2:
                argv.append(f"{random.choice(KEYS)}={random.choice(PATHS)}")
            case _:
                del argv[random.randrange(1, len(argv))]
    items = (*MEET, Item("run", "copy", b"run")) if random.random() < 0.5 else MEET
    return Case("command_line", tuple(word.replace("\0", "") for word in argv), items)
