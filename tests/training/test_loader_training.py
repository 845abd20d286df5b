"""Packing and passes cut by tokens, trained for real: ZeRO stages, several processes, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import adapter_hash, first_moments, launch, losses

from pipeline.config import load_config
from pipeline.files import write_json
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import RunPaths
from pipeline.stages.train import train_run
from pipeline.training.run import Stopped


def train(folder: Path, settings: list[str], processes: int = 1) -> Path:
    """One process trains here, several through the launcher."""
    if processes > 1:
        assert launch(folder, [*settings, f"launch.processes={processes}"]) == 0
    else:
        train_run(load_config(None, settings), folder)
    return folder


def assert_same_training(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=2e-4), found.name
    ours, theirs = first_moments(found), first_moments(expected)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3, found.name


@pytest.mark.slow
def test_passes_cut_by_tokens_train_what_fixed_ones_train(tmp_path: Path, tiny_settings: list[str]) -> None:
    common = [*tiny_settings, "train.max_gradient_norm=1e6"]
    fixed = train(tmp_path / "fixed", common)
    few = "train.micro_tokens=30"  # passes of one or two rows, another number of them in every step
    assert_same_training(train(tmp_path / "two", [*common, few], processes=2), fixed)
    for stage in ("zero0", "zero1", "zero3"):
        assert_same_training(train(tmp_path / stage, [*common, few, f"train.deepspeed={stage}"]), fixed)
    assert_same_training(train(tmp_path / "one pass", [*common, "train.micro_tokens=4000"]), fixed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora_dropout", "hiddenkey"])
def test_rows_end_to_end_train_what_padded_rows_train(
    tmp_path: Path, tiny_settings: list[str], method: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The default lays rows end to end: no padding is computed, and nothing else changes."""
    settings = [*tiny_settings, f"adapter.method={method}", "train.max_gradient_norm=1e6"]
    found = train(tmp_path / "end to end", settings)
    assert "rows         end to end, without padding" in capsys.readouterr().err
    monkeypatch.setattr("pipeline.stages.train.choose_rows", lambda *arguments: "asked for")
    padded = train(tmp_path / "padded", settings)
    assert "rows         padded: asked for" in capsys.readouterr().err
    assert_same_training(found, padded)
    shares = [read_metrics(RunPaths(folder).metrics, train=["padding_share"]) for folder in (found, padded)]
    assert all(row["padding_share"] == 0.0 for row in shares[0] if row["kind"] == "train")
    assert max(row["padding_share"] for row in shares[1] if row["kind"] == "train") > 0.1


@pytest.mark.slow
def test_packed_rows_train_alike_on_any_number_of_processes_and_resume(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny_settings, "train.max_gradient_norm=1e6", "train.packing=true", "train.global_batch=4",
                "train.micro_batch=2", "data.max_tokens=40"]
    one = train(tmp_path / "one", settings)
    assert "packed rows" in capsys.readouterr().err
    assert_same_training(train(tmp_path / "two", settings, processes=2), one)
    assert_resumes(settings, tmp_path / "parted", one)


@pytest.mark.slow
def test_streamed_rows_resume_where_they_were(tmp_path: Path, tiny_settings: list[str]) -> None:
    settings = [*tiny_settings, "data.streaming=true", "data.shuffle_rows=10", "data.train_rows=20"]
    whole = train(tmp_path / "whole", settings)  # 6 steps of 8 rows: over two ends of an epoch
    assert_resumes(settings, tmp_path / "parted", whole)


def assert_resumes(settings: list[str], folder: Path, whole: Path) -> None:
    """Stopped at a validation and started again, a run ends in the bytes of the whole one."""

    def ask_to_stop(row: dict[str, float]) -> None:
        write_json(RunPaths(folder).stop_request, {"signal": "TEST"})

    with pytest.raises(Stopped):
        train_run(load_config(None, settings), folder, ask_to_stop)
    train_run(load_config(None, settings), folder)
    assert losses(folder) == losses(whole) and adapter_hash(folder) == adapter_hash(whole)
