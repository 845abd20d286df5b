"""YAML files and overrides: recipes and config.yaml of runs with a part replaced, search spaces, DeepSpeed files."""

from __future__ import annotations

from random import Random

from helpers import ROOT
from helpers.fuzz.case import Case, Item
from helpers.fuzz.command_line import KEYS
from helpers.fuzz.material import SETTINGS
from helpers.fuzz.values import SCALARS, damaged_json, mutated

RECIPES = sorted((ROOT / "pipeline" / "recipes").glob("**/*.yaml"))
SPACES = sorted((ROOT / "tune" / "spaces").glob("*.yaml"))
DEEPSPEED = sorted((ROOT / "ds_configs").glob("*.json"))
BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
)
WHOLE = (
    b"", b"\n", b"null", b"- 1", b"x", b"{}", b"[]", b"---\n...", BOMB, b"train: &a {seed: *a}\n",
    b"train: {seed: 1}\n" * 2,
    b"label: " + b"[" * 3000, b"label: " + b"x" * 300_000, b"x: 1\n" * 20_000, b"\0", b"\xff\xfe",
    b"\xef\xbb\xbflabel: x",
    "".join(f"k{i}: 1\n" for i in range(4000)).encode(), b"? " * 2000, b"{a: " * 2000, b"- " * 2000,
    b"%YAML 9.9\n--- x",
    b"<<: {train: {seed: 1}}", b"export: 5", b"export: [members]", b"export: {members: 3}", b"train: 5", b"model:\n",
    b"? {a: b}\n: c", b"label: |\n" + b"  x\n" * 10_000, b"train:\n\tseed: 1", b"label: 'x", b"root:x:0:0:root:/root\n",
)


def make(random: Random) -> Case:
    stage = random.choice(("train", "run", "search", "compare"))
    match random.randrange(6):
        case 0:
            return _config(stage, random.choice(WHOLE), random)
        case 1 | 2:
            return _config(stage, mutated(random.choice(RECIPES).read_bytes(), random), random)
        case 3:
            content = mutated(random.choice(SPACES).read_bytes(), random)
            return _other_file("search.space", "space.yaml", content, random)
        case 4:
            content = damaged_json(random.choice(DEEPSPEED).read_bytes(), random)
            return _other_file("train.deepspeed", "ds.json", content, random)
    words = [f"{random.choice(KEYS)}={random.choice(SCALARS)}" for _ in range(random.choice((1, 1, 2, 5)))]
    return Case("configuration", ("--dry-run", stage, "--run-dir", "run", *SETTINGS, *words))


def _config(stage: str, content: bytes, random: Random) -> Case:
    """As --config, or as the file of a run folder."""
    if random.random() < 0.3:
        items = Item("run", "copy", b"run"), Item("run/config.yaml", "bytes", content)
        stage = random.choice(("evaluate", "report", "export", "train"))
        words = SETTINGS if stage == "train" else ()
        return Case("configuration", ("--dry-run", stage, "--run-dir", "run", *words), items)
    argv = ("--dry-run", stage, "--run-dir", "run", "--config", "mine.yaml", *SETTINGS)
    return Case("configuration", argv, (Item("mine.yaml", "bytes", content),))


def _other_file(key: str, name: str, content: bytes, random: Random) -> Case:
    item = random.choice((
        Item(name, "bytes", content), Item(name, "bytes", content), Item(name, "bytes", content), Item(name, "fifo"),
        Item(name, "folder"), Item(name, "link", b"/dev/zero"), Item(name, "sparse", b"1099511627776"),
        Item(name, "bytes", random.choice(WHOLE)),
    ))
    return Case("configuration", ("--dry-run", "run", "--run-dir", "run", *SETTINGS, f"{key}={name}"), (item,))
