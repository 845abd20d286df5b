"""What `model.compute_dtype: auto` becomes on CPUs: measured once, then kept by whoever continues."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import ModelConfig, RunConfig, dump_config, load_config
from pipeline.errors import ConfigError
from pipeline.model import measure_dtype
from pipeline.model.kind import base_sizes
from pipeline.plan import compute_dtype
from pipeline.plan.compute_dtype import pass_shapes, with_compute_dtype
from pipeline.run_folder.belongs import refuse_other


@pytest.fixture
def unmeasured() -> None:
    """Here measurements are what is tested."""


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What the measuring process would print; `runs` counts it. An empty cache, and no accelerator."""
    told: dict[str, Any] = {"float32": 0.2, "bfloat16": 0.1, "runs": []}

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        told["runs"].append((command[-4:], env["OMP_NUM_THREADS"]))
        if "error" in told:
            raise told["error"]
        text = told.get("text", json.dumps({name: told[name] for name in ("float32", "bfloat16")}))
        return subprocess.CompletedProcess(command, 0, stdout=text)

    monkeypatch.setattr("pipeline.plan.compute_dtype.subprocess.run", run)
    monkeypatch.setattr("pipeline.plan.compute_dtype.has_accelerator", lambda: False)
    monkeypatch.setattr("pipeline.distributed.launcher.has_accelerator", lambda: False)
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    return told


def model_folder(folder: Path, **description: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **description}))
    return folder


def large(tmp_path: Path, *more: str) -> RunConfig:
    folder = model_folder(tmp_path / "large", hidden_size=576, intermediate_size=1536)
    return load_config(None, [f"model.path={folder}", "data.max_tokens=64", "train.micro_batch=8", *more])


def choice(config: RunConfig, *folders: Path) -> str:
    return with_compute_dtype(config, folders).model.compute_dtype


@pytest.mark.parametrize(("bfloat16", "expected"), [(0.17, "bfloat16"), (0.18, "float32"), (0.9, "float32")])
def test_bfloat16_has_to_win_by_15_percent(
    stopwatch: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], bfloat16: float, expected: str
) -> None:
    stopwatch["bfloat16"] = bfloat16
    assert choice(large(tmp_path)) == expected
    assert f"auto -> {expected}" in capsys.readouterr().err


def test_one_measurement_per_machine_threads_and_shape(stopwatch: dict[str, Any], tmp_path: Path) -> None:
    config = large(tmp_path, "launch.processes=1")
    for _ in range(2):
        assert choice(config) == "bfloat16"
    assert choice(large(tmp_path, "launch.processes=1", "data.max_tokens=70")) == "bfloat16"  # rounded alike
    assert [words for words, _ in stopwatch["runs"]] == [["8", "32", "512", "2048"]]
    choice(large(tmp_path, "launch.processes=1", "train.micro_batch=4"))
    choice(large(tmp_path, "launch.processes=64", "train.global_batch=512"))
    assert [words for words, _ in stopwatch["runs"][1:]] == [["4", "32", "512", "2048"], ["8", "32", "512", "2048"]]
    assert stopwatch["runs"][2][1] == "1"


@pytest.mark.parametrize("content", ["", "[]", '{"float32": 1}', '{"float32": 0.0, "bfloat16": 1.0}', "{"])
def test_a_damaged_cache_is_made_again(stopwatch: dict[str, Any], tmp_path: Path, content: str) -> None:
    assert choice(large(tmp_path)) == "bfloat16"
    (kept,) = (tmp_path / "cache" / "compute_dtype").iterdir()
    kept.write_text(content)
    assert choice(large(tmp_path)) == "bfloat16"
    assert len(stopwatch["runs"]) == 2 and json.loads(kept.read_text()) == {"float32": 0.2, "bfloat16": 0.1}


@pytest.mark.parametrize(
    "fault", [{"error": subprocess.TimeoutExpired("x", 1)}, {"error": OSError("no"), }, {"text": "nan"}, {"text": ""}]
)
def test_where_nothing_can_be_timed_it_is_float32_and_nothing_is_kept(
    stopwatch: dict[str, Any], tmp_path: Path, fault: dict[str, Any]
) -> None:
    stopwatch.update(fault)
    assert choice(large(tmp_path)) == "float32"
    assert stopwatch["runs"] and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    stopwatch: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "file"))
    assert choice(large(tmp_path)) == "bfloat16"


def test_small_models_given_values_nodes_and_accelerators_are_not_measured(
    stopwatch: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = model_folder(tmp_path / "small", hidden_size=64, intermediate_size=128)
    assert choice(large(tmp_path, f"model.path={small}")) == "float32"
    assert choice(large(tmp_path, "model.compute_dtype=float16")) == "float16"
    nodes = ["launch.nodes=2", "launch.processes=1", "launch.master_addr=a", "launch.master_port=29500"]
    assert choice(large(tmp_path, *nodes)) == "auto"
    monkeypatch.setattr("pipeline.plan.compute_dtype.has_accelerator", lambda: True)
    assert choice(large(tmp_path)) == "auto"
    assert not stopwatch["runs"]


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("name", ["requested.yaml", "config.yaml"])
def test_what_a_folder_has_decided_is_kept(
    stopwatch: dict[str, Any], tmp_path: Path, saved: str, name: str
) -> None:
    """Another machine, another torch, or an older version, which saved `auto`: the same command continues."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(dump_config(large(tmp_path, f"model.compute_dtype={saved}")))
    stopwatch["bfloat16"] = 0.1 if saved == "float32" else 0.3
    config = with_compute_dtype(large(tmp_path), [tmp_path / "not there", folder])
    assert config.model.compute_dtype == saved and not stopwatch["runs"]
    refuse_other(folder / name, config)


@pytest.mark.parametrize("content", ["model: {compute_dtype: int3}", "model: 3", "[", "- 1", ""])
def test_a_saved_file_that_decides_nothing_is_passed_over(
    stopwatch: dict[str, Any], tmp_path: Path, content: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert choice(large(tmp_path), tmp_path) == "bfloat16"


@pytest.mark.parametrize(
    ("description", "sizes"),
    [
        ({"hidden_size": 576, "intermediate_size": 1536}, (576, 1536)),
        ({"n_embd": 768, "n_inner": None}, (768, 3072)),
        ({"d_model": 512, "d_ff": 2048}, (512, 2048)),
        ({"text_config": {"hidden_size": 640, "intermediate_size": 2560}}, (640, 2560)),
        ({"hidden_size": "576"}, None), ({"hidden_size": True}, None), ({"hidden_size": 10**40}, None), ({}, None),
    ],
)
def test_sizes_of_families(tmp_path: Path, description: dict[str, Any], sizes: tuple[int, int] | None) -> None:
    assert base_sizes(ModelConfig(path=str(model_folder(tmp_path / "model", **description)))) == sizes


def test_sizes_of_a_broken_description_and_of_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopwatch: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"config\.json that cannot be read"):
        base_sizes(ModelConfig(path=str(tmp_path)))
    assert base_sizes(ModelConfig(path="nobody/has-this-one")) is None
    assert base_sizes(ModelConfig()) is None  # the embedded default is not in this cache yet
    assert pass_shapes(load_config("default", [])) == (8, 32, 512, 2048)


def test_shapes_are_bounded(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", hidden_size=8192, intermediate_size=2**30)
    words = [f"model.path={folder}", "data.max_tokens=4096", "train.micro_batch=1", "train.micro_tokens=999999"]
    assert pass_shapes(load_config(None, words)) == compute_dtype.LARGEST


def test_the_measurement_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On passes of microseconds, and its end where bfloat16 is hopeless; times are not looked at."""
    monkeypatch.setattr(measure_dtype, "SECONDS", 0.0)
    seconds = measure_dtype.main(2, 4, 64, 64)
    assert seconds.keys() == {"float32", "bfloat16"} and all(0 < value < 60 for value in seconds.values())
    told = iter([1.0, 1.0, 1.0, 3.1])  # warm-up, then the probe: nothing else is timed
    monkeypatch.setattr(measure_dtype, "timed", lambda run: next(told))
    assert measure_dtype.main(2, 4, 64, 64) == {"float32": 1.0, "bfloat16": 3.1}


@pytest.mark.slow
def test_the_measurement_as_it_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path))
    seconds = compute_dtype.measured_seconds((1, 8, 64, 64), "1")
    assert seconds is not None and len(list((tmp_path / "compute_dtype").iterdir())) == 1
