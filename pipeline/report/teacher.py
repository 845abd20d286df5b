"""The ensemble that a distilled run was taught, as one more member of the run's own predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.errors import RunFolderError
from pipeline.run_folder.labelled import LabelledSplit
from pipeline.run_folder.members import PredictedMember, read_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import read_predictions

DISTIL_AGAIN = "Run distill again: what has been answered and trained is kept."


def with_teacher(
    paths: RunPaths, members: list[PredictedMember], splits: dict[str, LabelledSplit],
    row_ids: Mapping[str, Sequence[str]],
) -> tuple[list[PredictedMember], dict[str, LabelledSplit]]:
    """Members and what they said of every split, the teacher last; as they are where the run has none.

    They are left as they are, too, where the run is evaluated on other rows than its teacher was (`data.evaluation` has
    changed since): nothing could be set side by side.

    Args:
        row_ids: of each split, in the order of its rows.

    Raises:
        RunFolderError: the teacher's files are damaged, or not of one member that has the run's choices.
    """
    if not paths.teacher.is_dir():
        return members, splits
    teacher = read_members(paths.teacher)
    found = {split: read_predictions(paths.teacher, split) for split in splits}
    if any(set(found[split].row_ids) != set(row_ids[split]) for split in splits):
        return members, splits
    joined = {}
    for split, own in splits.items():
        said = type(found[split]).merged([found[split]], row_ids[split]).outputs
        if [one.group for one in teacher] != ["teacher"] or said.shape != (1, *own.outputs.shape[1:]):
            raise RunFolderError(str(paths.teacher), None, "is not of one teacher with the run's choices", DISTIL_AGAIN)
        joined[split] = replace(own, outputs=np.concatenate([own.outputs, said]))
    return [*members, *teacher], joined
