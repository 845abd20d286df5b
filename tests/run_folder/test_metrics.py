"""What a run says in numbers: padding, operations, memory; TensorBoard and Weights & Biases beside metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import load_config
from pipeline.distributed.devices import machine_memory, peak_flops, resident_high_water
from pipeline.errors import RunFolderError, SetupError
from pipeline.files import LONGEST_LINE, read_json_lines, write_json
from pipeline.report.inputs import read_training
from pipeline.run_folder.metrics import Metrics, check_loggers, read_metrics
from pipeline.run_folder.paths import RunPaths
from pipeline.training.throughput import Meter, Work


class Heard:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []
        self.closed = 0

    def write(self, kind: str, step: int, values: Any) -> None:
        self.rows.append((kind, step, dict(values)))

    def close(self) -> None:
        self.closed += 1


def test_loggers_hear_the_numbers_of_each_row(tmp_path: Path) -> None:
    heard = Heard()
    metrics = Metrics(tmp_path / "metrics.jsonl", True)
    metrics.write("train", step=1, loss=3.0)
    metrics.send_to([heard])
    metrics.write("train", step=2, loss=2.5, mfu=None, note="text")
    metrics.close()
    metrics.close()
    assert heard.rows == [("train", 2, {"loss": 2.5})] and heard.closed == 1
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    setting = "logging.tensorboard=true" if package == "tensorboard" else "logging.wandb.mode=offline"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_loggers(load_config(None, []).logging)
    with pytest.raises(SetupError, match=rf"logging\.{package}.*pip install {package}"):
        check_loggers(load_config(None, [setting]).logging)


def test_operations_are_those_of_lora_on_a_frozen_base() -> None:
    # Per token: forward 2N + 2n, backward 2N for activations, 2n for activations and 2n for the adapter's weights.
    work = Work(base=100, adapter=10, head=7, recomputed=False)
    assert work.model_flops(3, 2) == 3 * (200 + 20 + 200 + 20 + 20) + 2 * (2 * 7 + 2 * 7)
    assert work.hardware_flops(3, 2) == work.model_flops(3, 2)
    again = Work(base=100, adapter=10, head=7, recomputed=True)
    assert again.hardware_flops(3, 2) == work.model_flops(3, 2) + 3 * (200 + 20)


def test_padding_and_fillers_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.training.throughput.peak_flops", lambda name, dtype: 1000.0)
    meter = Meter(Work(base=10, adapter=0, head=5, recomputed=False), torch.device("cpu"), "bfloat16")
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, -100, 0], [-100, 1, 1, 1]])
    meter.add({"input_ids": mask, "attention_mask": mask, "labels": labels}, torch.tensor([1.0, 0.5, 0.0]))
    numbers = meter.read(seconds=2.0)
    assert numbers["padding_share"] == pytest.approx(5 / 12, abs=1e-4)
    assert numbers["mfu"] == numbers["hfu"] == (40 * 7 + 20 * 3) / 2000
    assert numbers["memory_gib"] == pytest.approx(resident_high_water() / 2**30, rel=0.1)
    assert meter.read(1.0)["padding_share"] is None


def test_peaks_are_those_of_the_device_and_the_precision() -> None:
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-40GB": 312e12,
             "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "Tesla T4": None, "cpu": None}
    assert {name: peak_flops(name, "bfloat16") for name in names} == names
    assert peak_flops("Tesla T4", "float16") == 65e12 and peak_flops("Tesla V100-PCIE-16GB", "float16") == 112e12
    assert peak_flops("NVIDIA H100 PCIe", "float32") is None
    assert 2**30 < resident_high_water() + 2**30 < 2 * machine_memory() + 2**30


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(tmp_path: Path, tiny_settings: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from pipeline.stages.train import train_run
    from pipeline.training.run import Stopped

    settings = [*tiny_settings, "logging.tensorboard=true", "logging.wandb.mode=offline"]
    run = tmp_path / "run"

    def stop(row: dict[str, float]) -> None:
        if row["step"] == 3:
            write_json(RunPaths(run).stop_request, {"signal": "TEST"})

    with pytest.raises(Stopped):
        train_run(load_config(None, settings), run, stop)
    identity = (run / "wandb.json").read_text()
    train_run(load_config(None, settings), run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = [row for row in read_json_lines(RunPaths(run).metrics) if row["kind"] == "train"]
    for name in ("loss", "gradient_norm", "learning_rate", "padding_share", "memory_gib", "supervised_tokens"):
        curve = events.Scalars(f"train/{name}")
        assert [event.step for event in curve] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in curve] == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert [event.step for event in events.Scalars("validation/nll")] == [3, 6]
    assert all(row["mfu"] is None and row["memory_gib"] > 0.1 for row in rows)
    assert (run / "wandb.json").read_text() == identity
    name = json.loads(identity)["id"]
    assert len(list((run / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))) == 2


def test_rows_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "profile")
    with pytest.raises(RunFolderError, match="symbolic link"):
        Metrics(tmp_path / "metrics.jsonl", True).write("train", step=1, loss=1.0)
    assert (tmp_path / "profile").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\xff\n", "metrics.jsonl:1: is damaged"),
        (b'{"kind": "train", "step": 1, "loss": 2.0}\n\xff\xfe\n', "metrics.jsonl:2: is damaged"),
        (b"[1]\n", "metrics.jsonl:1: is damaged (no JSON object)"),
        (b"[" * 100_000 + b"\n", "metrics.jsonl:1: is damaged"),
        (b'{"kind": "train", "step": ' + b"9" * 5000 + b"}\n", "metrics.jsonl:1: is damaged"),
        (b'{"step": 1}\n', "metrics.jsonl:1: is damaged: no kind"),
        (b'{"kind": ["x"], "step": -1}\n', "metrics.jsonl:1: is damaged: no step, no kind"),
        (b'{"kind": "train", "step": 1, "loss": "low"}\n', "metrics.jsonl:1: is damaged: no loss"),
        (b'{"kind": "train", "step": 1, "loss": ' + b"9" * 400 + b"}\n", "metrics.jsonl:1: is damaged: no loss"),
        (b'{"kind": "' + b"x" * LONGEST_LINE, "metrics.jsonl:1: is damaged (more than 16 MiB)"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_whoever_reads_it(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    readers: list[Callable[[], object]] = [
        lambda: read_training(path), lambda: list(read_metrics(path, train=["loss"])),
    ]
    if "no loss" not in expected:
        readers.append(lambda: Metrics(path, enabled=True).keep_until(5, validated=True))
    for read in readers:
        with pytest.raises(RunFolderError) as caught:
            read()
        assert expected in str(caught.value)


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1, "loss": NaN}\n{"kind": "train", "step": 2, "lo\xc3')
    assert [row["step"] for row in read_metrics(path, train=["loss"])] == [1]


def test_a_metrics_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "authorized_keys"
    other.write_text("")
    (tmp_path / "metrics.jsonl").symlink_to(other)
    with pytest.raises(RunFolderError, match="is a symbolic link to .*authorized_keys: nothing is appended"):
        Metrics(tmp_path / "metrics.jsonl", enabled=True).write("train", step=1)
    assert other.read_text() == ""
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunFolderError, match="is no regular file"):
        list(read_metrics(tmp_path / "metrics.jsonl"))
