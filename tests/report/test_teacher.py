"""A distilled run's report: its teacher's predictions beside its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import RunFolderError
from pipeline.report.teacher import with_teacher
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, write_predictions

OWN = PredictedMember("mean-field", "mean_field")
TEACHER = PredictedMember("LoRA Dropout, 4 masks", "teacher", extra={"passes": 4})
LOGS = np.log(np.array([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]))
IDS = {"test": ("a", "b", "c")}


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run whose teacher has answered its rows, in another order."""
    paths = RunPaths(tmp_path)
    paths.teacher.mkdir(parents=True)
    write_members(paths.teacher, [TEACHER])
    write_predictions(paths.teacher, "test", ChoicePredictions(("c", "a", "b"), LOGS[:, [2, 0, 1]]))
    return paths


def split(choices: int = 2) -> dict[str, LabelledSplit]:
    """Three rows, of which the run finds all choices alike."""
    return {"test": LabelledSplit(np.full((1, 3, choices), -np.log(choices)), np.array([1, 0, 0]), None, 1.0)}


def test_a_teacher_is_the_last_member_and_its_rows_are_in_the_runs_order(paths: RunPaths) -> None:
    members, found = with_teacher(paths, [OWN], split(), IDS)
    assert members == [OWN, TEACHER]
    assert np.allclose(found["test"].outputs, np.concatenate([split()["test"].outputs, LOGS]), atol=1e-6)


def test_a_run_without_teacher_or_on_other_rows_stays_as_it_is(paths: RunPaths, tmp_path: Path) -> None:
    own = split()
    assert with_teacher(RunPaths(tmp_path / "other"), [OWN], own, IDS) == ([OWN], own)
    assert with_teacher(paths, [OWN], own, {"test": ("a", "b", "d")}) == ([OWN], own)


def test_other_choices_and_other_members_are_refused(paths: RunPaths) -> None:
    with pytest.raises(RunFolderError, match="is not of one teacher with the run's choices"):
        with_teacher(paths, [OWN], split(choices=3), IDS)
    write_members(paths.teacher, [OWN])
    with pytest.raises(RunFolderError, match="is not of one teacher with the run's choices"):
        with_teacher(paths, [OWN], split(), IDS)
    (paths.teacher / "test.npz").write_bytes(b"PK")
    with pytest.raises(RunFolderError, match="is damaged"):
        with_teacher(paths, [OWN], split(), IDS)
