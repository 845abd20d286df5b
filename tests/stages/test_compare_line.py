"""A whole comparison on a tiny model: every stage is the real one, but all in one process (`compare_stub`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from pipeline.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USER
from pipeline.files import ADAPTER_WEIGHTS, read_json_lines, sha256_file
from pipeline.run_folder.mark import claim

METHODS = ("[none, {name: hiddenkey, adapter: {method: hiddenkey}, vary: {adapter.consistency.weight: [0.1]}}, {name: "
           "both, adapter: {method: lora_dropout+hiddencut, rates: {lora_B: 0.0}}, train: {max_steps: 8}}]")
NAMES = [f"{method}-lr{rate}{own}" for method, own in (("none", ""), ("hiddenkey", "-lambda0.1"), ("both", ""))
         for rate in ("0.01", "0.003")]


def compare(stop_at: int, arguments: list[str]) -> tuple[int, list[str], str]:
    """(exit code, trainings that were started, what was shown)."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "compare_stub.py"), str(stop_at), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    trained = [line.removeprefix("trained ") for line in done.stdout.splitlines() if line.startswith("trained ")]
    return done.returncode, trained, done.stdout + done.stderr


@pytest.mark.slow
def test_a_comparison_is_stopped_continued_and_reported(tmp_path: Path, tiny_settings: list[str]) -> None:
    folder = tmp_path / "tiny-compare"
    command = ["compare", "--run-dir", str(tmp_path / "tiny"), *tiny_settings, "ensemble.size=2",
               "launch.processes=1", "compare.learning_rates=[0.01, 3e-3]", f"compare.methods={METHODS}",
               "compare.evaluate=all"]
    code, trained, _ = compare(3, command)
    assert (code, trained) == (EXIT_STOPPED, NAMES[:3])
    first = sha256_file(folder / "trainings" / NAMES[0] / "adapter" / ADAPTER_WEIGHTS)

    blocked = folder / "trainings" / NAMES[5] / "checkpoints"
    claim(blocked.parent, "run")
    blocked.write_text("no folder")  # the last training cannot save
    code, trained, shown = compare(0, command)
    assert (code, trained) == (EXIT_FAILED, NAMES[2:])  # the first two were done, the third goes on from its checkpoint
    assert f"{NAMES[5]} failed: " in shown and "continuing from step_000002" in shown
    rows = read_json_lines(folder / "trainings" / NAMES[2] / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    blocked.unlink()
    code, trained, shown = compare(0, command)
    assert (code, trained) == (EXIT_OK, NAMES[5:])
    assert sha256_file(folder / "trainings" / NAMES[0] / "adapter" / ADAPTER_WEIGHTS) == first
    for part in ("Base model", "Plain LoRA, lr 0.01", "HiddenKey, lr 0.003, lambda 0.1", "both, 2 masks", "report"):
        assert part in shown

    members = json.loads((folder / "predictions" / "members.json").read_text())
    assert len(members) == 1 + 6 + 2 * 2  # base, every adapter, two draws of the two chosen ones with masks
    with np.load(folder / "predictions" / "test.npz", allow_pickle=False) as arrays:
        log_probs = arrays["log_probs"]
    assert log_probs.shape == (11, 60, 2)
    draws = [index for index, member in enumerate(members) if member["draw"] is not None]
    assert all(np.abs(log_probs[i] - log_probs[j]).max() > 1e-4 for i in draws for j in range(11) if i != j)
    for member in members:
        if member["adapter"] is not None:
            assert member["adapter_sha256"] == sha256_file(Path(member["adapter"]) / ADAPTER_WEIGHTS)
    result = json.loads((folder / "result.json").read_text())
    assert [system["key"] for system in result["systems"]].count("plain") == 1
    costs = {(system["passes"], system["train_steps"]) for system in result["systems"] if system["key"] != "base"}
    assert costs == {(1, 6), (1, 8), (2, 6), (2, 8)}
    assert any(line.startswith("Deep ensemble left out") for line in result["left_out"])
    compared = {c["system"] for c in result["comparisons"] if c["split"] == "test"}
    assert len(compared) == 7 and not compared & {"base", "plain"}  # five adapters and two ensembles
    assert "<h2>Trainings</h2>" in (folder / "report.html").read_text()

    code, trained, shown = compare(0, command[:-1])  # the chosen settings alone: a part of what was predicted
    assert (code, trained) == (EXIT_OK, []) and "predictions are complete" in shown
    names = {member["name"] for member in json.loads((folder / "predictions" / "members.json").read_text())}
    assert len(names) == 1 + 3 + 2 * 2 and names < {member["name"] for member in members}
    assert "3 trainings of settings that validation did not choose" in shown.replace("\n", " ")

    code, _, shown = compare(0, [*command, "data.train_rows=32"])
    assert code == EXIT_USER and "another configuration" in shown


@pytest.mark.slow
def test_a_packed_comparison_is_stopped_continued_and_reported(tmp_path: Path, tiny_settings: list[str]) -> None:
    """One pack of all methods but AdaLoRA's, which trains alone."""
    folder = tmp_path / "tiny-compare"
    ada = "adapter: {method: none, kind: adalora, adalora: {warmup: 1, final: 2}}, vary: {train.learning_rate: [0.01]}"
    methods = f"[none, {{name: hiddenkey, adapter: {{method: hiddenkey}}}}, {{name: ada, {ada}}}]"
    command = ["compare", "--run-dir", str(tmp_path / "tiny"), *tiny_settings, "ensemble.size=2",
               "compare.learning_rates=[0.01, 3e-3]", f"compare.methods={methods}", "compare.evaluate=all"]
    code, trained, shown = compare(1, command)
    assert (code, trained) == (EXIT_STOPPED, ["tiny-compare"]), shown
    code, trained, shown = compare(0, command)
    assert (code, trained) == (EXIT_OK, ["tiny-compare", "ada-lr0.01"]), shown
    assert "4 of 5 trainings, together on one base" in shown and "continuing from step_000002" in shown
    for name in ("none-lr0.01", "none-lr0.003", "hiddenkey-lr0.01", "hiddenkey-lr0.003", "ada-lr0.01"):
        rows = read_json_lines(folder / "trainings" / name / "metrics.jsonl")
        assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    for part in ("Plain LoRA, lr 0.01", "HiddenKey, lr 0.003", "ada, lr 0.01"):
        assert part in shown
    code, trained, _ = compare(0, command)
    assert (code, trained) == (EXIT_OK, []), "what is done is done again"
