"""A run folder with one file damaged, replaced or missing, read by a later stage or by a report."""

from __future__ import annotations

import json
from random import Random

from helpers.fuzz.case import Case, Item
from helpers.fuzz.values import BYTES, JSON_TEXTS, damaged_json, json_value, mutated
from pipeline.stages.table import STAGES

STATUS = {"train": {"state": "done", "config_sha256": "ab"}, "report": {"state": "done", "made": {"result.json": "ab"}}}
MEMBERS = [{"name": "base", "group": "base"}, {"name": "mean_field", "group": "mean_field", "folder": "adapter"}]
RELATED = {
    "plain": {"run": "../plain", "folder": "../plain/adapter", "sha256": "ab"}, "search": {"folder": "../search"},
}
COMPARE = {"label": "", "reference": "none", "trainings": [
    {"name": "none-lr0.1", "method": "none", "values": {"train.learning_rate": 0.1}, "seed": 0, "config_sha256": "ab",
     "state": "done", "adapter_sha256": "cd", "validation_nll": 0.5, "steps": 4, "seconds": 1.0}]}
METRICS = [{"kind": "train", "step": 1, "loss": 0.5, "seconds": 0.1}, {"kind": "validation", "step": 1, "nll": 0.5}]
DESCRIBED = {
    "status.json": STATUS, "related.json": RELATED, "compare.json": COMPARE, "predictions/members.json": MEMBERS,
    "environment.json": {"device": "cpu", "versions": {"torch": "2"}},
    "adapter/manifest.json": {"validation_nll": 0.5, "files": {"adapter_config.json": {"bytes": 3, "sha256": "ab"}}},
    "adapter/adapter_config.json": {"peft_type": "LORA", "r": 8, "lora_alpha": 16.0},
    "result.json": {"made_from": {"config_sha256": "ab", "data_sha256": "cd", "predictions": {"test": "ef"}}},
    "made_by.json": {"made_by": "loradrop", "what": "run", "layout": 2, "version": "0.2"},
    "export/manifest.json": {"origin": {"config_sha256": "ab"}, "adapter_sha256": "cd", "files": {}},
    "stop_request.json": {"signal": "SIGINT"},
}
"""JSON files and what they look like."""
OTHERS = ("config.yaml", "metrics.jsonl", "adapter/adapter_model.safetensors", "predictions/validation.npz",
          "predictions/test.npz", "adapter", "predictions", "logs", "checkpoints")


def make(random: Random) -> Case:
    items = [Item("run", "copy", b"run")]
    for _ in range(random.choice((1, 1, 2))):
        items += _damage(random)
    if random.random() < 0.5:
        return Case("run_folders", ("run",), tuple(items), "inputs")
    stages = [name for name in ("evaluate", "report", "export", "verify") if name in STAGES]
    return Case("run_folders", ("--dry-run", random.choice(stages), "--run-dir", "run"), tuple(items))


def _damage(random: Random) -> list[Item]:
    name = random.choice((*DESCRIBED, *OTHERS))
    path = f"run/{name}"
    match random.randrange(7):
        case 0:
            return [Item(path, "remove")]
        case 1:
            return [Item(path, "remove"), random.choice((
                Item(path, "fifo"), Item(path, "folder"), Item(path, "link", b"/dev/zero"), Item(path, "bytes"),
                Item(path, "link", name.rpartition("/")[2].encode()), Item(path, "link", b"/etc/passwd"),
                Item(path, "sparse", b"1099511627776"),
            ))]
    if name in DESCRIBED:
        return [Item(path, "remove"), Item(path, "bytes", damaged_json(json.dumps(DESCRIBED[name]).encode(), random))]
    if name == "metrics.jsonl":
        damaged = damaged_json(json.dumps(random.choice(METRICS)).encode(), random)
        line = random.choice((damaged, json_value(random).encode(), random.choice(BYTES)))
        return [Item(path, "append", line + b"\n")]
    if "." in name.rpartition("/")[2]:
        return [Item(path, "append", random.choice((*BYTES, b"x" * 5000))), *_cut(path, random)]
    return [Item(path, "remove"), Item(path, "bytes", random.choice(JSON_TEXTS).encode("utf-8", "surrogatepass"))]


def _cut(path: str, random: Random) -> list[Item]:
    if random.random() < 0.5:
        return []
    return [Item(path, "bytes", mutated(b"PK\x03\x04" + bytes(range(256)) + b"train:\n  seed: 1\n", random))]
