"""Valid material, made once: a model's folder with a tokenizer, rows, a run folder as a run leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pipeline.config import dump_config, load_config
from pipeline.data.splits import EVALUATED_SPLITS, load_splits
from pipeline.files import ADAPTER_WEIGHTS, publish_folder, sha256_file, write_json, write_text
from pipeline.run_folder.chain import Origin, own_member, predictions_from
from pipeline.run_folder.mark import claim
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.run_folder.predictions import ChoicePredictions, write_predictions

WORDS = ["<unk>", "<s>", "</s>", "Review:", "Sentiment:", "the", "film", "was", "good", "bad", "positive", "negative"]
ROWS = 40
SETTINGS = (
    "model.path={base}/model", "data.path={base}/rows.jsonl", "data.validation_rows=8", "data.calibration_rows=8",
    "data.test_rows=8", "data.max_tokens=32", "train.global_batch=8", "train.micro_batch=4", "ensemble.size=2",
    "launch.processes=1", "search.trials=4",
)
"""Overrides of a run on the material."""


def row(number: int) -> dict[str, object]:
    """One of `rows.jsonl`."""
    mood = ("bad", "good")[number % 2]
    prompt = f"Review: film {number} was {mood} Sentiment:"
    return {"prompt": prompt, "choices": [" negative", " positive"], "label": number % 2}


def make(base: Path) -> None:
    """model/, rows.jsonl, run/."""
    _write_model(base / "model")
    write_text(base / "rows.jsonl", "".join(f"{json.dumps(row(i))}\n" for i in range(ROWS)))
    paths = RunPaths(base / "run")
    config = load_config(None, [setting.replace("{base}", str(base)) for setting in SETTINGS])
    splits = load_splits(config.data)
    origin = Origin(config.training_sha256(), splits.fingerprint)
    claim(paths.root, "run")
    write_text(paths.config, dump_config(config))
    write_json(paths.environment, {"device": "cpu", "data_fingerprint": splits.fingerprint, "versions": {"torch": "2"}})
    write_json(paths.related, {})
    lines = [{"kind": "train", "step": i, "loss": 1.0 / i, "seconds": 0.1} for i in range(1, 5)]
    lines.append({"kind": "validation", "step": 4, "nll": 0.5})
    write_text(paths.metrics, "".join(f"{json.dumps(line)}\n" for line in lines))
    publish_folder(paths.adapter, lambda folder: _write_adapter(folder, origin))
    own = own_member(paths.adapter, sha256_file(paths.adapter / ADAPTER_WEIGHTS))
    members = [PredictedMember("base", "base"), own]
    write_members(paths.predictions, members)
    for split in EVALUATED_SPLITS:
        ids = tuple(one.id for one in getattr(splits, split))
        table = np.log(np.full((len(members), len(ids), 2), 0.5, dtype=np.float32))
        made_from = predictions_from(origin, members)
        write_predictions(paths.predictions, split, ChoicePredictions(ids, table, seconds=1.0, made_from=made_from))
    files = {split: sha256_file(paths.predictions / f"{split}.npz") for split in EVALUATED_SPLITS}
    made = {**origin.as_dict(), "adapter_sha256": own.adapter_sha256, "predictions": files,
            "settings_sha256": config.reading_sha256()}
    write_json(paths.result, {"made_from": made})
    write_text(paths.report, "<html>")
    update_status(paths, "train", "done", config_sha256=config.training_sha256())
    update_status(paths, "report", "done", made={p.name: sha256_file(p) for p in (paths.result, paths.report)})


def _write_model(folder: Path) -> None:
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(WORDS)}
    write_json(folder / "config.json", shape)
    words = {word: number for number, word in enumerate(WORDS)}
    split = {"type": "WhitespaceSplit"}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": None, "model": model,
    })  # fmt: skip
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **marks})


def _write_adapter(folder: Path, origin: Origin) -> None:
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8, "lora_alpha": 16.0})
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    (folder / ADAPTER_WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    write_json(folder / "manifest.json", {"validation_nll": 0.5, "step": 4, "origin": origin.as_dict()})
