"""The whole line on a tiny random model: every stage is the real one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.files import manifest_faults


@pytest.mark.slow
def test_the_whole_line(tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "tiny"
    command = ["run", "--run-dir", str(run), *tiny_settings, "export.draws=2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for part in ("Base model", "Plain LoRA", "report.html", "adapter", "export"):
        assert part in shown
    for name in (
        "config.yaml",
        "environment.json",
        "status.json",
        "metrics.jsonl",
        "related.json",
        "result.json",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "checkpoints",
        "predictions/validation.npz",
        "predictions/calibration.npz",
        "predictions/test.npz",
        "export/manifest.json",
        "export/adapter/adapter_config.json",
    ):
        assert (run / name).exists(), name

    status = json.loads((run / "status.json").read_text())
    assert {stage: entry["state"] for stage, entry in status.items()} == dict.fromkeys(
        ("train", "evaluate", "report", "export"), "done"
    )
    search = json.loads((tmp_path / "tiny-search" / "search.json").read_text())
    assert len(search["trials"]) == 2 and search["best"] in {trial["name"] for trial in search["trials"]}
    members = json.loads((run / "predictions" / "members.json").read_text())
    groups = [member["group"] for member in members]
    assert groups.count("mask_draw") == 4 and groups.count("searched") == 2 and groups.count("plain") == 1
    with np.load(run / "predictions" / "test.npz", allow_pickle=False) as arrays:
        kept = {"log_likelihoods", "tokens", "characters"}  # for other rules of data.choice_score
        assert set(arrays.files) == {"row_ids", "kind", "log_probs", "seconds", "made_from", *kept}
        assert arrays["log_probs"].shape == (len(members), 60, 2)
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert all(export["ratio"] <= 0.05 for export in manifest["exports"]) and len(manifest["exports"]) >= 3
    assert not manifest_faults(run / "export")
    page = (run / "report.html").read_text()
    assert "<svg" in page and "http-equiv" in page and "<script" not in page

    plain = tmp_path / "tiny-plain"
    whole = {path: path.read_bytes() for folder in (run, plain) for path in folder.rglob("*") if path.is_file()}
    for folder in (run, tmp_path / "tiny-plain", tmp_path / "tiny-search", run / "export"):
        assert main(["verify", str(folder)]) == 0, capsys.readouterr().out
    adapter = run / "adapter" / "adapter_model.safetensors"
    flip(adapter)
    assert main(["verify", str(run)]) == 1
    assert main(command) == 0  # nothing is trained twice: the best step's adapter is published from its checkpoint
    for path in (adapter, run / "predictions" / "test.npz", run / "metrics.jsonl", plain / "metrics.jsonl",
                 plain / "adapter" / adapter.name):
        assert path.read_bytes() == whole[path], path.name
    assert main(["verify", str(run)]) == 0, capsys.readouterr().out
    assert main([*command, "train.seed=9"]) == 2
    assert "another configuration" in capsys.readouterr().err
    assert main(["report", "--run-dir", str(run)]) == 0 and "after temperature scaling" in capsys.readouterr().out
    refuse_what_does_not_belong_together(run, tiny_settings, capsys)
    assert main(["run", "--run-dir", str(tmp_path / "tiny-plain"), *tiny_settings]) == 2
    assert "holds what `train` made" in capsys.readouterr().err
    assert not (tmp_path / "tiny-plain-plain").exists() and not (tmp_path / "tiny-plain-search").exists()


def flip(path: Path) -> None:
    """Other bytes, the same size."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 399):
        content[place] ^= 1
    path.write_bytes(bytes(content))


def refuse_what_does_not_belong_together(run: Path, settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Damage, exchange, an edited configuration: each later stage refuses, and says which file it is."""
    adapter, plain = run / "adapter" / "adapter_model.safetensors", run.with_name("tiny-plain") / "adapter"
    rows = Path(next(word for word in settings if word.startswith("data.path=")).removeprefix("data.path="))

    def swap() -> None:
        shutil.rmtree(run / "adapter")
        shutil.copytree(plain, run / "adapter")

    def edit(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    cases: list[tuple[Path, Callable[[], None], tuple[str, ...], str]] = [
        (run / "adapter", lambda: flip(adapter), ("evaluate", "report", "export"), "adapter"),
        (run / "adapter", swap, ("evaluate", "report", "export"), "adapter"),
        (run / "config.yaml", lambda: edit(run / "config.yaml", "rank: ", "rank: 1"), ("evaluate", "export"),
         "was made from another configuration"),
        (rows, lambda: rows.write_text("\n".join(rows.read_text().splitlines()[::-1][1:]) + "\n"),
         ("evaluate", "report", "export"), "was made from other data"),
        (run / "result.json", lambda: edit(run / "result.json", "adapter_sha256\": \"", "adapter_sha256\": \"0"),
         ("export",), "result.json: was made from another adapter"),
    ]
    for place, damage, stages, said in cases:
        kept = run.with_name("kept")
        (shutil.copytree if place.is_dir() else shutil.copy2)(place, kept)
        damage()
        for stage in stages:
            assert main([stage, "--run-dir", str(run)]) == 2, (place.name, stage)
            assert said in capsys.readouterr().err
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(kept, place)
