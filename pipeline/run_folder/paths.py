"""What lies where in a run folder, which folders belong together, and how far each stage has come.

runs/NAME/
  made_by.json                the mark by which the folder is known as ours (mark.py)
  config.yaml  environment.json  status.json  metrics.jsonl
  checkpoints/step_000123/    resumable; published by rename, with a manifest of sizes and hashes
  checkpoints/latest.json     and best.json: which one, its step, metric and hash
  adapter/                    the result, PEFT format
  related.json                other adapters that evaluation compares with, by name, path and hash
  predictions/SPLIT.npz       per-member log-probabilities, no test labels
  predictions/generated_test.jsonl   texts that were written for test rows, where asked for
  result.json  report.html
  diagnosis/step_000124/      only after a step that was not finite: its batch, and the first bad module
  taught/                     of RUN-distilled: what the ensemble of RUN said of each row, and the rows made of it
  harness.json                what eval found on tasks of lm-evaluation-harness
  export/                     what is deployed: manifest.json with measured parity
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig, build_config
from pipeline.config.load import read_yaml
from pipeline.errors import RunFolderError
from pipeline.files import read_json, write_json


@dataclass(frozen=True)
class RunPaths:
    """Where each artefact of one run lies."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.yaml"

    @property
    def requested(self) -> Path:
        """What `run` was asked for, before the search chose values."""
        return self.root / "requested.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, base model and data identity."""
        return self.root / "environment.json"

    @property
    def status(self) -> Path:
        """Stage -> state, and the reason of the last failure."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of published checkpoints."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT format."""
        return self.root / "adapter"

    @property
    def related(self) -> Path:
        """Adapters of other runs that evaluation compares with."""
        return self.root / "related.json"

    @property
    def comparison(self) -> Path:
        """Trainings of other run folders that make this folder a comparison of methods."""
        return self.root / "compare.json"

    @property
    def predictions(self) -> Path:
        """Folder of cached predictions."""
        return self.root / "predictions"

    @property
    def result(self) -> Path:
        """Scores, machine-readable."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """Scores, for people."""
        return self.root / "report.html"

    @property
    def export(self) -> Path:
        """What is deployed."""
        return self.root / "export"

    @property
    def taught(self) -> Path:
        """What an ensemble said of the rows that the run is trained on."""
        return self.root / "taught"

    @property
    def teacher(self) -> Path:
        """What that ensemble said of the rows that it and the run are scored on: predictions of one member."""
        return self.taught / "evaluated"

    @property
    def diagnosis(self) -> Path:
        """Batches that were not finite, one folder per step."""
        return self.root / "diagnosis"

    @property
    def stop_request(self) -> Path:
        """Present while a stop is asked for; all ranks agree on it at the next boundary."""
        return self.root / "stop_request.json"


def step_name(step: int) -> str:
    """Name of the folder of an optimizer step (1 = the first): step_000123."""
    return f"step_{step:06d}"


def read_status(paths: RunPaths) -> dict[str, Any]:
    """Stage -> entry of status.json; empty where it is missing or damaged: it tells, nothing is decided by it alone."""
    with contextlib.suppress(RunFolderError):
        status = read_json(paths.status)
        if isinstance(status, dict):
            return {stage: entry for stage, entry in status.items() if isinstance(entry, dict)}
    return {}


def update_status(
    paths: RunPaths, stage: str, state: str, detail: str = "", config_sha256: str | None = None,
    made: Mapping[str, str] | None = None,
) -> None:
    """Record `state` (starting, running, done, stopped, failed) of a stage in status.json.

    Args:
        config_sha256: of the training that the stage works for (`RunConfig.training_sha256`); None: as recorded.
        made: file -> hash, for files that cannot carry their own; None: as recorded.
    """
    status = read_status(paths)
    before = status.get(stage, {})
    entry = {
        "state": state, "detail": detail, "config_sha256": config_sha256 or before.get("config_sha256"),
        "made": before.get("made") if made is None else dict(made),
    }
    status[stage] = {name: value for name, value in entry.items() if value}
    write_json(paths.status, status)


@dataclass(frozen=True)
class Folders:
    """The run and the folders it refers to."""

    run: Path

    @property
    def plain(self) -> Path:
        """The same budget without dropout."""
        return self.run.with_name(f"{self.run.name}-plain")

    @property
    def search(self) -> Path:
        """Trials and ledger."""
        return self.run.with_name(f"{self.run.name}-search")

    @property
    def distilled(self) -> Path:
        """One plain adapter that was taught what the run's ensemble says."""
        return self.run.with_name(f"{self.run.name}-distilled")

    @property
    def comparison(self) -> Path:
        """Methods compared on the same base, data and budget."""
        return self.run.with_name(f"{self.run.name}-compare")


def load_saved(saved: Path, trusted: bool = False) -> RunConfig:
    """The configuration that a run folder holds. Raises as `read_saved`, and `ConfigError` where it is wrong.

    Args:
        trusted: whether the command said that code of the model may run; the file is not asked.
    """
    return build_config(without_trust(read_saved(saved))).trusting(trusted)


def without_trust(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what lets code of others run: a run folder may come from anywhere.

    That is code that comes with a model, and hosts, whose names are words of an ssh command line.
    """
    kept = dict(tree)
    for section, key in (("model", "trust_remote_code"), ("launch", "hostfile")):
        if isinstance(values := kept.get(section), Mapping):
            kept[section] = {name: value for name, value in values.items() if name != key}
    return kept


def read_saved(saved: Path) -> dict[str, Any]:
    """The plain tree of a run folder's config.yaml.

    Raises:
        RunFolderError: it was written before version 0.2; files and keys had other names.
    """
    tree = read_yaml(saved)
    if isinstance(export := tree.get("export"), dict) and "members" in export:
        raise RunFolderError(
            "--run-dir", str(saved.parent), "was made before loradrop 0.2, which lays run folders out otherwise",
            "Finish it with the version that made it, or give another --run-dir and run again.",
        )
    return tree
