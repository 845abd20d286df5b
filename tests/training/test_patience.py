"""A training ends when its validation has stopped improving: alone, in a pack, and after a kill in the middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import adapter_hash, losses

from pipeline import Pack, load_config
from pipeline.config import RunConfig
from pipeline.files import MANIFEST, read_json, read_json_lines
from pipeline.plan.resolve import length_text
from pipeline.run_folder.chain import is_trained
from pipeline.run_folder.metrics import Metrics
from pipeline.run_folder.paths import RunPaths, read_status
from pipeline.stages.train import train_run
from pipeline.training import loop
from pipeline.training.checkpoint import Counters, published_checkpoints
from pipeline.training.published import Validation
from pipeline.training.run import Run

NLL = {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.5, 10: 0.4, 12: 0.3}
"""Step -> validation NLL: with a patience of 2 the end is at step 8."""


def counted(nlls: list[float], every: int = 2, afresh: int | None = None) -> tuple[int, int | None]:
    """(validations waited, step of the lowest) after these validations."""
    counters = Counters(0, 0, "hash", "rows")
    for step, nll in zip(range(every, 99, every), nlls, strict=False):
        once = counters.validated(step, nll, afresh=step == afresh)
        counters = once.validated(step, nll)
        assert counters == once, "made up for once more"
    return counters.waited(every), counters.lowest_step


def test_validations_without_improvement_are_counted() -> None:
    assert counted([]) == (0, None)
    assert counted([0.9]) == (0, 2) and counted([0.9, 0.5]) == (0, 4)
    assert counted([0.9, 0.5, 0.5, 0.6]) == (2, 4), "as low is no improvement"
    assert counted([0.9, 0.5, 0.6, 0.4]) == (0, 8)
    assert counted([0.5, 0.9, 0.8, 0.7], afresh=4) == (0, 8), "what was before does not compete"


def test_a_plan_says_that_a_training_may_end_early() -> None:
    assert length_text(load_config(None, ["train.max_steps=9"]).train) == "9 steps"
    text = length_text(load_config(None, ["train.max_steps=9", "train.patience=3"]).train)
    assert text == "9 steps, fewer after 3 validations without improvement"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations have the losses of `NLL`."""

    def scored(found: Validation) -> Validation:
        return replace(found, scores={**found.scores, "nll": NLL[found.step]})

    alone: Callable[..., Validation] = Run.validation_of
    together: Callable[..., list[Validation]] = loop.validations_of
    monkeypatch.setattr(Run, "validation_of", lambda run, *rest: scored(alone(run, *rest)))
    monkeypatch.setattr(loop, "validations_of", lambda runs: [scored(found) for found in together(runs)])


def patient(settings: list[str], *more: str) -> RunConfig:
    length = ["train.max_steps=12", "train.validate_every_steps=2", "train.checkpoint_every_steps=5"]
    return load_config(None, [*settings, *length, "train.patience=2", *more])


def ends(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "ended"]


def assert_ended_at_8(folder: Path, config: RunConfig) -> None:
    paths = RunPaths(folder)
    assert is_trained(paths, config) and len(losses(folder)) == 8
    assert read_status(paths)["train"]["detail"] == "8 steps, best at 4, ended by train.patience"
    assert ends(folder) == [{"kind": "ended", "step": 8, "by": "train.patience", "lowest_step": 4}]
    assert read_json(paths.adapter / MANIFEST)["step"] == 4
    assert [path.name for path in published_checkpoints(paths.checkpoints)][-1] == "step_000008"


class Killed(BaseException):
    """What no code of ours expects."""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["ended", "save"])
def test_a_training_ends_when_patience_does_and_so_does_a_resumed_one(
    tmp_path: Path, tiny_settings: list[str], told: None, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    config, whole, parted = patient(tiny_settings), tmp_path / "whole", tmp_path / "parted"
    result = train_run(config, whole)
    assert (result["steps"], result["best_step"], result["ended_by"]) == (8, 4, "train.patience")
    assert_ended_at_8(whole, config)

    write: Callable[..., None] = Metrics.write
    save: Callable[..., None] = Run.save

    def killed_after_row(metrics: Metrics, kind: str, **values: Any) -> None:
        write(metrics, kind, **values)
        if kind == "ended":
            raise Killed

    def killed_after_save(run: Run) -> None:
        save(run)
        if run.out_of_patience:
            raise Killed

    with monkeypatch.context() as broken:
        if at == "ended":
            broken.setattr(Metrics, "write", killed_after_row)
        else:
            broken.setattr(Run, "save", killed_after_save)
        with pytest.raises(Killed):
            train_run(config, parted)
    assert not is_trained(RunPaths(parted), config)
    assert train_run(config, parted) == result
    assert_ended_at_8(parted, config)
    assert losses(parted) == losses(whole) and adapter_hash(parted) == adapter_hash(whole)


@pytest.mark.slow
def test_in_a_pack_a_run_out_of_patience_leaves_the_others(
    tmp_path: Path, tiny_settings: list[str], told: None
) -> None:
    impatient, other = patient(tiny_settings), patient(tiny_settings, "train.patience=null", "train.seed=4")
    last = patient(tiny_settings, "train.keep_best=false", "train.seed=5")
    pack, ended = Pack(impatient), {}
    for name, config in (("impatient", impatient), ("other", other), ("last", last)):
        pack.admit(config, tmp_path / name)
    for _ in range(14):
        ended |= {one.run_dir.name: one.result for one in pack.advance()}
    assert_ended_at_8(tmp_path / "impatient", impatient)
    assert {name: result["steps"] for name, result in ended.items() if result} == {
        "impatient": 8, "other": 12, "last": 8}
    assert not ends(tmp_path / "other") and ended["other"]["ended_by"] is None
    assert read_json(tmp_path / "last" / "adapter" / MANIFEST)["step"] == 8, "the last is kept, the lowest is counted"
