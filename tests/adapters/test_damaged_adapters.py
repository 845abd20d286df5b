"""A PEFT folder from anywhere: what is damaged or no adapter is named, never a traceback, never half-read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.adapters.peft_format import read_adapter
from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, publish_folder

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "target_modules": ["q"], "task_type": "CAUSAL_LM"}
LAYER = "base_model.model.layers.0.q"


def fill(folder: Path) -> None:
    (folder / ADAPTER_CONFIG).write_text(json.dumps(CONFIG))
    pair = {f"{LAYER}.lora_A.weight": torch.ones(2, 3), f"{LAYER}.lora_B.weight": torch.ones(5, 2)}
    save_file(pair, folder / ADAPTER_WEIGHTS)


def setting(**changed: object) -> Callable[[Path], object]:
    return lambda folder: (folder / ADAPTER_CONFIG).write_text(json.dumps({**CONFIG, **changed}))


def test_a_whole_folder_is_read_with_and_without_a_manifest(tmp_path: Path) -> None:
    fill(tmp_path)
    assert read_adapter(tmp_path).spec.rank == 2
    publish_folder(tmp_path / "published", fill)
    assert list(read_adapter(tmp_path / "published").matrices) == ["layers.0.q"]


def test_a_published_adapter_is_read_only_as_it_was_published(tmp_path: Path) -> None:
    folder = tmp_path / "published"
    publish_folder(folder, fill)
    weights = bytearray((folder / ADAPTER_WEIGHTS).read_bytes())
    weights[-3] ^= 1  # a number of lora_B: safetensors itself takes it
    (folder / ADAPTER_WEIGHTS).write_bytes(weights)
    with pytest.raises(RunFolderError, match="is damaged .*does not have the recorded hash"):
        read_adapter(folder)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"\x89PNG"),
    lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b""),
    lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((folder / ADAPTER_WEIGHTS).read_bytes()[:-9]),
    lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    lambda folder: (folder / ADAPTER_CONFIG).write_text("[]"),
    lambda folder: (folder / ADAPTER_CONFIG).write_text("[" * 99_999),
    lambda folder: (folder / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA"})),
    setting(r="many"), setting(r=None), setting(lora_alpha=[]), setting(rank_pattern=3), setting(peft_type=["LORA"]),
    setting(modules_to_save=5, task_type="SEQ_CLS"),
])  # fmt: skip
def test_what_is_no_adapter_is_refused_by_its_folder(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    fill(tmp_path)
    damage(tmp_path)
    with pytest.raises(RunFolderError) as refused:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(refused.value) and refused.value.exit_code == 2
