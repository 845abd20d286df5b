"""The cache of quantized bases: the same bits, made again where it is damaged, never in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import CPU

from pipeline.config import ModelConfig
from pipeline.files import remove_folder
from pipeline.model import load, quantized
from pipeline.model.load import BaseModel, load_base
from pipeline.model.quantized import _make_room, cached_folder, same_bits
from pipeline.support.tiny import write_tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder of quantized bases; nothing is too small for it."""
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST_BYTES", 0)
    return tmp_path / "cache" / "quantized"


@pytest.fixture
def read_from(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that weights are read from, and whether they are quantized then."""
    seen: list[str] = []
    real = load._load_weights

    def note(resolved: str, classes: int | None, settings: dict[str, Any]) -> Any:
        seen.append("quantizing" if settings.get("quantization_config") else Path(resolved).parent.name)
        return real(resolved, classes, settings)

    monkeypatch.setattr(load, "_load_weights", note)
    return seen


def base(folder: Path, hold: str = "quantized", **settings: Any) -> BaseModel:
    return load_base(ModelConfig(path=str(folder), hold=hold, **settings), CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "dtype", "double"), [
    ("llama", "float32", True), ("gpt2", "bfloat16", True), ("qwen2", "float32", False),
])  # fmt: skip
def test_a_kept_base_has_the_same_bits(
    cache: Path, read_from: list[str], tmp_path: Path, family: str, dtype: str, double: bool
) -> None:
    write_tiny_model(tmp_path / "model", family)
    settings = {"compute_dtype": dtype, "double_quantization": double}
    first, again = base(tmp_path / "model", **settings), base(tmp_path / "model", **settings)
    assert read_from == ["quantizing", "quantized", "quantized"]  # made, read to see that it is the same, read
    assert same_bits(first.model, again.model) and first.identity == again.identity
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        assert torch.equal(first.model(ids).logits, again.model(ids).logits)
    held = base(tmp_path / "model", "dequantized", **settings)
    with torch.no_grad():
        assert torch.equal(first.model(ids).logits, held.model(ids).logits)


def test_same_bits_sees_weights_scales_and_scales_of_scales(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    one = base(tmp_path).model

    def differs(change: Callable[[Any], Any]) -> bool:
        other = base(tmp_path).model
        assert same_bits(one, other)
        weight = other.model.layers[1].mlp.down_proj.weight  # type: ignore[index, union-attr]
        with torch.no_grad():
            change(weight)
        return not same_bits(one, other)

    assert differs(lambda weight: weight.data[0].bitwise_xor_(1))
    assert differs(lambda weight: weight.quant_state.absmax[0].bitwise_xor_(1))
    assert differs(lambda weight: weight.quant_state.state2.absmax.mul_(2))


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_folder_is_made_again(cache: Path, read_from: list[str], tmp_path: Path, damage: str) -> None:
    write_tiny_model(tmp_path / "model")
    first = base(tmp_path / "model")
    (file,) = cache.glob("*/model.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    match damage:
        case "cut":
            file.write_bytes(content[:-9])
        case "flip":
            file.write_bytes(content)
        case _:
            file.unlink()
    again = base(tmp_path / "model")
    assert read_from[2:] == ["quantizing", "quantized"] and same_bits(first.model, again.model)


def test_a_family_that_reads_back_other_bits_is_not_kept(
    cache: Path, read_from: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "same_bits", lambda one, other: False)
    write_tiny_model(tmp_path / "model")
    base(tmp_path / "model")
    assert not list(cache.glob("[!.]*"))


@pytest.mark.parametrize("fault", ["cache", "disk"])
def test_what_cannot_be_kept_is_quantized(
    cache: Path, read_from: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "cache":
        (tmp_path / "cache").touch()
    else:
        monkeypatch.setattr("pipeline.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    write_tiny_model(tmp_path / "model")
    for _ in range(2):
        base(tmp_path / "model")
    assert read_from == ["quantizing", "quantizing"]


def test_the_name_of_a_folder_follows_from_all_that_decides_it(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_model(folder)
    config = ModelConfig(path=str(folder))

    def name(config: ModelConfig = config, dtype: torch.dtype = torch.float32) -> Path | None:
        return cached_folder(config, config.path, dtype, CPU)

    first = name()
    assert first is not None and first == name()
    others = [name(dtype=torch.bfloat16), name(config.model_copy(update={"double_quantization": False}))]
    os.utime(folder / "model.safetensors", (1, 1))
    others.append(name())
    assert len({first, *others}) == 4 and None not in others


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "none"}, {"trust_remote_code": True}])
def test_what_is_not_kept(cache: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = ModelConfig(path=str(tmp_path), **settings)
    assert cached_folder(config, str(tmp_path), torch.float32, CPU) is None
    plain = ModelConfig(path=str(tmp_path))
    assert cached_folder(plain, str(tmp_path), torch.float32, torch.device("cuda")) is None
    assert cached_folder(plain, "owner/name", torch.float32, CPU) is None


def test_only_models_of_some_size_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(100))

    def kept() -> bool:
        return cached_folder(ModelConfig(path=str(tmp_path)), str(tmp_path), torch.float32, CPU) is not None

    assert not kept()
    monkeypatch.setattr(quantized, "LEAST_BYTES", 100)
    assert kept()
    monkeypatch.setattr(quantized, "MOST_BYTES", 99)
    assert not kept()


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    _make_room(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["middle", "new"]
    remove_folder(tmp_path / "middle")
    _make_room(tmp_path, 99)
    assert not list(tmp_path.iterdir())


def test_a_sharded_base_is_not_kept(cache: Path, read_from: list[str], tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    load_base(ModelConfig(path=str(tmp_path / "model")), CPU, sharded=True)
    assert read_from == ["quantizing"] and not cache.exists()
