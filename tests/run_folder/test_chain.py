"""What is made from what: a damaged, exchanged or foreign artefact is named by whoever reads it, and by `verify`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.config import RunConfig, build_config, dump_config
from pipeline.config.load import with_values
from pipeline.ensemble.readout import read_result
from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, publish_folder, read_json, sha256_file, write_json, write_text
from pipeline.run_folder.chain import (
    Origin,
    is_trained,
    is_validated,
    other_members,
    own_member,
    predictions_from,
    require_adapter,
    require_predictions,
    require_same_adapter,
)
from pipeline.run_folder.mark import claim
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.run_folder.predictions import ChoicePredictions, read_predictions, write_predictions
from pipeline.run_folder.verify import verify_folder
from pipeline.stages.evaluate import Entry, read_entry

CONFIG = build_config({"adapter": {"rank": 4}, "ensemble": {"size": 1, "seed": 7}})
ORIGIN = Origin(CONFIG.training_sha256(), "rows")
SPLITS = ("validation", "calibration", "test")


def write_adapter(paths: RunPaths, weights: str = "weights", origin: Origin = ORIGIN) -> str:
    def fill(folder: Path) -> None:
        write_text(folder / ADAPTER_WEIGHTS, weights)
        write_json(folder / MANIFEST, {"step": 3, "validation_nll": 0.5, "origin": origin.as_dict()})

    publish_folder(paths.adapter, fill)
    return sha256_file(paths.adapter / ADAPTER_WEIGHTS)


def members_of(paths: RunPaths, sha256: str) -> list[PredictedMember]:
    own = own_member(paths.adapter, sha256)
    draw = PredictedMember("draw 0", "mask_draw", str(paths.adapter), sha256, 0, {"seed": 7})
    return [PredictedMember("base", "base"), own, draw]


def write_whole(paths: RunPaths, members: list[PredictedMember], origin: Origin = ORIGIN) -> None:
    write_members(paths.predictions, members)
    for split in SPLITS:
        rows, log_probs = (f"{split} 0", f"{split} 1"), np.log(np.full((len(members), 2, 2), 0.5, dtype=np.float32))
        made_from = predictions_from(origin, members)
        write_predictions(paths.predictions, split, ChoicePredictions(rows, log_probs, made_from=made_from))


def write_run(root: Path, config: RunConfig = CONFIG) -> RunPaths:
    """A run folder as all stages leave it."""
    paths = RunPaths(root)
    claim(root, "run")
    write_text(paths.config, dump_config(config))
    write_json(paths.environment, {"data_fingerprint": "rows"})
    write_text(paths.metrics, '{"kind": "train", "step": 1}\n')
    sha256 = write_adapter(paths)
    update_status(paths, "train", "done", config_sha256=config.training_sha256())
    write_whole(paths, members_of(paths, sha256))
    files = {split: sha256_file(paths.predictions / f"{split}.npz") for split in SPLITS}
    made = {"adapter_sha256": sha256, "predictions": files, "settings_sha256": config.reading_sha256()}
    write_json(paths.result, {"made_from": {**ORIGIN.as_dict(), **made}})
    write_text(paths.report, "<html>")
    update_status(paths, "report", "done", made={p.name: sha256_file(p) for p in (paths.result, paths.report)})

    def fill(folder: Path) -> None:
        write_text(folder / "adapter" / ADAPTER_WEIGHTS, "weights")
        entry = {"origin": ORIGIN.as_dict(), "adapter_sha256": sha256, "result_sha256": sha256_file(paths.result),
                 "settings_sha256": config.export_sha256()}
        write_json(folder / MANIFEST, entry)

    publish_folder(paths.export, fill)
    return paths


def flip(path: Path, places: int = 3) -> None:
    """Damage bytes, and leave the size as it is."""
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + places):
        content[place % len(content)] ^= 1
    path.write_bytes(bytes(content))


def test_the_hash_of_a_training_is_that_of_what_decides_its_adapter() -> None:
    same = {
        "ensemble.size": 32, "evaluate.bootstrap_samples": 50, "export.forms": ["adapter"], "search.trials": 3,
        "launch.processes": 4, "label": "x", "model.trust_remote_code": True, "train.micro_batch": 1,
        "model.hold": "dequantized", "adapter.fused": False, "data.choice_score": "per_token",
        "data.evaluation": {"path": "x", "splits": dict.fromkeys(SPLITS, "y")}, "select.by": "nll",
    }  # fmt: skip
    for key, value in same.items():
        assert with_values(CONFIG, {key: value}).training_sha256() == CONFIG.training_sha256(), key
    other = {"train.seed": 5, "adapter.rank": 8, "data.seed": 5, "model.path": "x/y", "train.learning_rate": 0.5}
    hashes = {with_values(CONFIG, {key: value}).training_sha256() for key, value in other.items()}
    assert len(hashes | {CONFIG.training_sha256()}) == len(other) + 1


def test_a_training_is_done_only_for_the_configuration_that_its_record_names(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    assert is_trained(paths, CONFIG) and is_trained(paths, with_values(CONFIG, {"ensemble.size": 4}))
    assert not is_trained(paths, with_values(CONFIG, {"adapter.rank": 8}))
    flip(paths.adapter / ADAPTER_WEIGHTS)
    assert not is_trained(paths, CONFIG)
    write_adapter(paths, origin=Origin("another", "rows"))
    assert not is_trained(paths, CONFIG)
    write_adapter(paths)
    assert is_trained(paths, CONFIG)
    update_status(paths, "train", "stopped")
    assert not is_trained(paths, CONFIG)
    paths.status.write_text('{"train": 5, "evaluate": []}')
    assert not is_trained(paths, CONFIG)


def test_an_adapter_is_used_only_whole_and_for_its_own_configuration_and_data(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    require_adapter(paths, ORIGIN)
    with pytest.raises(RunFolderError, match=r"adapter: was made from other data\. Put back"):
        require_adapter(paths, Origin(ORIGIN.config_sha256, "other rows"))
    with pytest.raises(RunFolderError, match="was made from another configuration"):
        require_adapter(paths, Origin("other", "rows"))
    write_json(paths.adapter / MANIFEST, {"files": json.loads((paths.adapter / MANIFEST).read_text())["files"]})
    with pytest.raises(RunFolderError, match="does not say what it was made from"):
        require_adapter(paths, ORIGIN)
    flip(paths.adapter / ADAPTER_WEIGHTS)
    with pytest.raises(RunFolderError, match="is damaged .*does not have the recorded hash"):
        require_adapter(paths, ORIGIN)
    with pytest.raises(RunFolderError, match="is damaged"):
        read_entry(Entry("mean_field", "mean-field", paths.adapter))
    shutil.rmtree(paths.adapter)
    with pytest.raises(RunFolderError, match="Run the train stage first"):
        require_adapter(paths, ORIGIN)


def test_predictions_are_used_only_for_those_who_made_them(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    found, members = read_predictions(paths.predictions, "test"), members_of(paths, sha256)
    require_predictions(paths, "test", found, ORIGIN, members)
    moved = [PredictedMember(m.name, m.group, "elsewhere", m.adapter_sha256, m.draw, m.extra) for m in members]
    require_predictions(paths, "test", found, ORIGIN, moved)  # a run folder may be moved
    for origin, others, what in (
        (Origin("other", "rows"), members, "another configuration"), (Origin(*["rows"] * 2), members, "another"),
        (Origin(ORIGIN.config_sha256, "others"), members, "other data"), (ORIGIN, members[:2], "other members"),
        (ORIGIN, members_of(paths, "another adapter"), "other members"),
    ):  # fmt: skip
        with pytest.raises(RunFolderError, match=rf"test\.npz: was made (from|by) {what}"):
            require_predictions(paths, "test", found, origin, others)
    require_same_adapter(paths, sha256, "predictions/", "")
    with pytest.raises(RunFolderError, match="is not the adapter that predictions/ was made from"):
        require_same_adapter(paths, "another", "predictions/", "")


@pytest.mark.parametrize("value", [1, "x", [1], {"report": 1}])
def test_verify_says_of_entries_of_any_kind_that_they_are_not_ours(tmp_path: Path, value: object) -> None:
    paths = write_run(tmp_path / "run")
    status, manifest = read_json(paths.status), read_json(paths.adapter / MANIFEST)
    write_json(paths.status, status | {"report": {"made": value}})
    write_json(paths.adapter / MANIFEST, manifest | {"origin": value})
    states = {found.name: found.state for found in verify_folder(paths.root)}
    assert states["result.json"] == states["report.html"] == "damaged"
    assert states["adapter"] == "foreign"
    write_json(paths.result, read_json(paths.result) | {"made_from": value})
    assert verify_folder(paths.root)


def test_a_trial_counts_only_with_the_predictions_of_its_adapter(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    assert not is_validated(paths, CONFIG, sha256)  # evaluated, by more members
    write_whole(paths, [own_member(paths.adapter, sha256)])
    assert is_validated(paths, CONFIG, sha256)
    assert not is_validated(paths, CONFIG, "another")
    assert not is_validated(paths, with_values(CONFIG, {"adapter.rank": 8}), sha256)
    (paths.predictions / "validation.npz").write_bytes(b"PK")
    assert not is_validated(paths, CONFIG, sha256)


def test_an_export_takes_the_temperature_of_its_own_adapter_alone(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    sha256 = sha256_file(paths.adapter / ADAPTER_WEIGHTS)
    assert read_result(paths, ORIGIN, sha256)["made_from"]["adapter_sha256"] == sha256
    with pytest.raises(RunFolderError, match=r"result\.json: was made from another adapter"):
        read_result(paths, ORIGIN, "another")
    with pytest.raises(RunFolderError, match=r"result\.json: was made from other data"):
        read_result(paths, Origin(ORIGIN.config_sha256, "others"), sha256)
    whole = (paths.predictions / "calibration.npz").read_bytes()
    (paths.predictions / "calibration.npz").write_bytes(whole + b"x")
    with pytest.raises(RunFolderError, match=r"result\.json: was made from other predictions of calibration"):
        read_result(paths, ORIGIN, sha256)  # evaluated again, and not reported
    shutil.rmtree(paths.predictions)
    assert read_result(paths, ORIGIN, sha256)
    for content in ("[]", "{}", '{"made_from": 5}', '{"made_from": [5]}', "{"):
        paths.result.write_text(content)
        with pytest.raises(RunFolderError, match=r"result\.json"):
            read_result(paths, ORIGIN, sha256)
    paths.result.unlink()
    assert read_result(paths, ORIGIN, sha256) == {}


def test_a_result_of_other_settings_is_not_exported(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    sha256, settings = sha256_file(paths.adapter / ADAPTER_WEIGHTS), CONFIG.reading_sha256()
    assert read_result(paths, ORIGIN, sha256, settings)
    for key, value in (("ensemble.average", "logit"), ("ensemble.size", 2), ("data.choice_score", "per_token")):
        with pytest.raises(RunFolderError, match=r"result\.json: was made under other settings"):
            read_result(paths, ORIGIN, sha256, with_values(CONFIG, {key: value}).reading_sha256())
    assert settings == with_values(CONFIG, {"evaluate.batch_tokens": 9, "export.draws": 1}).reading_sha256()


def test_predictions_of_other_mask_draws_are_not_those_that_are_asked_for() -> None:
    own = PredictedMember("mean-field", "mean_field", "adapter", "ab", None, {"rates": {"lora_A": 0.5}})
    draws = [PredictedMember(f"draw {n}", "mask_draw", "adapter", "ab", n, {"seed": 7}) for n in range(8)]

    def fault(drawn: int, **ensemble: object) -> str:
        config = build_config({"ensemble": {"size": 8, "seed": 7, **ensemble}})
        return other_members([own, *draws[:drawn]], config.ensemble)

    assert not fault(8) and not fault(4, size=4) and not fault(0, size=0) and not fault(4, stop_when_flat=True)
    assert "4 mask draws, and ensemble.size is 8" in fault(4)
    assert "0 mask draws, and ensemble.size is 8" in fault(0)
    assert fault(0, stop_when_flat=True) and fault(8, size=4, stop_when_flat=True)
    assert "other masks than those of ensemble.seed = 9" in fault(8, seed=9)
    plain = PredictedMember("mean-field", "mean_field", "adapter", "ab", None, {"rates": {}})
    assert not other_members([plain], CONFIG.ensemble)  # there is nothing to draw


def test_verify_takes_other_rows_where_data_evaluation_has_changed_and_all_is_made_of_the_same(tmp_path: Path) -> None:
    paths, now = write_run(tmp_path / "run"), Origin(CONFIG.training_sha256(), "other rows")
    members = members_of(paths, sha256_file(paths.adapter / ADAPTER_WEIGHTS))
    write_whole(paths, members, now)

    def foreign() -> set[str]:
        return {found.name for found in verify_folder(paths.root) if found.state == "foreign"}

    predicted = {f"predictions/{split}.npz" for split in SPLITS}
    assert foreign() == {*predicted, "result.json"}  # as if the data had been exchanged
    source = {"path": "x", "splits": dict.fromkeys(SPLITS, "y")}
    write_text(paths.config, dump_config(with_values(CONFIG, {"data.evaluation": source})))
    assert foreign() == {"result.json", "export"}  # of the rows before
    found = read_predictions(paths.predictions, "validation")
    made_from = predictions_from(ORIGIN, members)
    mixed = ChoicePredictions(found.row_ids, found.outputs, made_from=made_from)
    write_predictions(paths.predictions, "validation", mixed)
    assert "predictions/validation.npz" in foreign()


def swap_adapter(paths: RunPaths) -> None:
    write_adapter(paths, "of another run")


def swap_predictions(paths: RunPaths) -> None:
    write_predictions(paths.predictions, "test", read_predictions(paths.predictions, "calibration"))


def predict_elsewhere(paths: RunPaths) -> None:
    members = members_of(paths, "an adapter of another run")
    found = read_predictions(paths.predictions, "test")
    made_from = predictions_from(ORIGIN, members)
    write_predictions(paths.predictions, "test", ChoicePredictions(found.row_ids, found.outputs, made_from=made_from))


def ask_for_more_draws(paths: RunPaths) -> None:
    write_text(paths.config, dump_config(with_values(CONFIG, {"ensemble.size": 4})))


def average_otherwise(paths: RunPaths) -> None:
    write_text(paths.config, dump_config(with_values(CONFIG, {"ensemble.average": "logit", "export.draws": 1})))


def edit_config(paths: RunPaths) -> None:
    write_text(paths.config, dump_config(with_values(CONFIG, {"adapter.rank": 8})))


DAMAGE: dict[str, tuple[Callable[[RunPaths], object], dict[str, str]]] = {
    "nothing": (lambda paths: None, {}),
    "adapter flipped": (lambda paths: flip(paths.adapter / ADAPTER_WEIGHTS), {
        "adapter": "damaged", "predictions/members.json": "foreign", "export": "foreign"}),
    "adapter swapped": (swap_adapter, {"predictions/members.json": "foreign", "export": "foreign"}),
    "file put into the adapter": (lambda paths: write_text(paths.adapter / "mine.txt", ""), {"adapter": "foreign"}),
    "config edited": (edit_config, {
        "adapter": "foreign", "predictions/test.npz": "foreign", "predictions/validation.npz": "foreign",
        "predictions/calibration.npz": "foreign", "result.json": "foreign", "export": "foreign"}),
    "ensemble edited": (ask_for_more_draws, {
        "predictions/members.json": "foreign", "result.json": "foreign"}),
    "average and export edited": (average_otherwise, {"result.json": "foreign", "export": "foreign"}),
    "config broken": (lambda paths: paths.config.write_text("a: ["), {"config.yaml": "damaged"}),
    "config gone": (lambda paths: paths.config.unlink(), {"config.yaml": "missing"}),
    "predictions flipped": (lambda paths: flip(paths.predictions / "test.npz", 40), {
        "predictions/test.npz": "damaged", "result.json": "foreign"}),
    "predictions of other members": (predict_elsewhere, {
        "predictions/test.npz": "foreign", "result.json": "foreign"}),
    "predictions gone": (lambda paths: (paths.predictions / "test.npz").unlink(), {"result.json": "foreign"}),
    "predictions of another split": (swap_predictions, {"result.json": "foreign"}),
    "members broken": (lambda paths: (paths.predictions / "members.json").write_text("[]"), {
        "predictions/members.json": "damaged"}),
    "result edited": (lambda paths: paths.result.write_text(paths.result.read_text() + " "), {
        "result.json": "damaged", "export": "foreign"}),
    "page edited": (lambda paths: paths.report.write_text("better"), {"report.html": "damaged"}),
    "export flipped": (lambda paths: flip(paths.export / "adapter" / ADAPTER_WEIGHTS), {"export": "damaged"}),
    "metrics binary": (lambda paths: paths.metrics.write_bytes(b"\x00\xff\n" * 9), {"metrics.jsonl": "damaged"}),
    "a file of the user's": (lambda paths: write_text(paths.root / "notes.md", ""), {"notes.md": "foreign"}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_verify_says_what_is_whole_damaged_or_foreign(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_run(tmp_path / "run")
    damage, expected = DAMAGE[name]
    damage(paths)
    before = {path: path.read_bytes() for path in paths.root.rglob("*") if path.is_file()}
    assert {found.name: found.state for found in verify_folder(paths.root) if found.state != "whole"} == expected
    assert main(["verify", str(paths.root)]) == (1 if expected else 0)
    shown = capsys.readouterr().out
    assert all(f"{state:8} {found}" in shown for found, state in expected.items())
    assert {path: path.read_bytes() for path in paths.root.rglob("*") if path.is_file()} == before


def test_an_export_is_verified_wherever_it_was_copied_to(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    shutil.copytree(paths.export, tmp_path / "deployed")
    assert [found.state for found in verify_folder(tmp_path / "deployed")] == ["whole"]
    flip(tmp_path / "deployed" / "adapter" / ADAPTER_WEIGHTS)
    assert [found.state for found in verify_folder(tmp_path / "deployed")] == ["damaged"]
    with pytest.raises(RunFolderError, match="loradrop has not made"):
        verify_folder(tmp_path)


def test_verify_takes_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["a", "b"], ["a", "--run-dir", "b"], [str(tmp_path / "none")], ["--run-dir", str(tmp_path / "no")]):
        assert main(["verify", *words]) == 2
    assert capsys.readouterr().err.count("loradrop: ") == 4


@pytest.mark.parametrize(
    "name", [f"adapter/{ADAPTER_WEIGHTS}", "predictions/test.npz", "result.json", "report.html"]
)
def test_a_file_of_another_size_is_not_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A terabyte with nothing in it takes no place, and an hour to read."""

    def hashed(path: Path) -> str:
        assert path.stat().st_size < 2**40
        return sha256_file(path)

    paths = write_run(tmp_path / "run")
    os.truncate(paths.root / name, 2**40)
    for module in ("files", "run_folder.chain", "run_folder.verify"):
        monkeypatch.setattr(f"pipeline.{module}.sha256_file", hashed, raising=False)
    states = {found.name: found.state for found in verify_folder(paths.root)}
    assert states[name.replace(f"/{ADAPTER_WEIGHTS}", "")] == "damaged"
    if "adapter" in name:
        with pytest.raises(RunFolderError, match="is not the adapter"):
            require_same_adapter(paths, "ab", "predictions/", "Evaluate again.")
