"""members.json: what is written is read, and what is damaged is named."""

import pytest

from pipeline.errors import RunFolderError
from pipeline.files import write_json
from pipeline.run_folder.members import PredictedMember, read_members, write_members


def test_a_missing_file_says_evaluate(tmp_path):
    with pytest.raises(RunFolderError, match=r"members\.json: does not exist\. Run the evaluate stage"):
        read_members(tmp_path)


def test_members_round_trip_with_free_fields(tmp_path):
    draw = PredictedMember("d3", "mask_draw", "adapter", "ff", 3, {"rate": 0.5, "rank": 8})
    members = [PredictedMember("base", "base"), draw]
    write_members(tmp_path, members)
    assert read_members(tmp_path) == members


LINES = [{"name": "a\nssh-ed25519 AAAA", "group": "base"}]  # shown and logged, it would write a line of its own


@pytest.mark.parametrize(
    "entries", [[{"name": "a", "group": "other"}], [{"group": "base"}], ["a"], {"a": 1}, [], LINES]
)
def test_damaged_members_are_named(tmp_path, entries):
    write_json(tmp_path / "members.json", entries)
    with pytest.raises(RunFolderError, match=r"members\.json"):
        read_members(tmp_path)
