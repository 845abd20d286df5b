"""Every form of a tiny run, loaded by stock tools in clean processes; what is tampered with is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import RunConfig, dump_config
from pipeline.config.load import with_values
from pipeline.ensemble.ensemble import Ensemble
from pipeline.errors import UserError
from pipeline.files import MANIFEST, manifest_faults, read_json, sha256_file, write_json, write_text
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.verify import verify_folder
from pipeline.stages import export

FORMS = ["adapter", "draws", "merged", "merged_dequantized"]


@pytest.fixture(scope="module")
def shipped(finished_run: tuple[RunPaths, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """export/ of a copy of the run, in all forms."""
    finished, config = finished_run
    paths = RunPaths(shutil.copytree(finished.root, tmp_path_factory.mktemp("shipped") / "run"))
    write_text(paths.config, dump_config(with_values(config, {"export.forms": FORMS, "export.draws": 2})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "leave_world", lambda: None)
        export.export_run(paths.root)
    return paths.export


@pytest.mark.slow
def test_every_form_stands_alone_and_is_what_was_evaluated(
    shipped: Path, finished_run: tuple[RunPaths, RunConfig]
) -> None:
    paths, config = finished_run
    manifest = read_json(shipped / MANIFEST)
    model = Path(config.model.path)
    assert not manifest_faults(shipped) and list(manifest["forms"]) == FORMS
    assert "resolved" not in manifest["base"]
    assert manifest["base"]["files"] == {"model.safetensors": sha256_file(model / "model.safetensors")}
    by_folder = {entry["folder"]: entry for entry in manifest["exports"]}
    assert list(by_folder) == ["adapter", "draws/draw_000", "draws/draw_001", *FORMS[2:]]
    assert all(entry["ratio"] < 1e-3 for entry in manifest["exports"])
    for form in FORMS:
        use = manifest["forms"][form]["use"]
        assert use["max_difference"] < 1e-4 and abs(sum(use["values"]) - 1) < 1e-6
        card = (shipped / form / "README.md").read_text(encoding="utf-8")
        assert "| accuracy |" in card and "## Intended use" in card and "Temperature" in card
        everything = "".join(path.read_text(encoding="utf-8") for path in (shipped / form).rglob("*.json"))
        assert str(model.parent) not in everything + card  # no place of this machine
        assert (shipped / form / "tokenizer.json").is_file()
        (alone,) = verify_folder(shipped / form)
        assert alone.state == "whole", alone
        assert "loradrop" not in (shipped / form / "use.py").read_text(encoding="utf-8")

    reading = read_json(shipped / "draws" / "reading.json")
    assert reading["members"] == ["draw_000", "draw_001"] and reading["weights"] == [0.5] * 2
    assert reading["temperature"] == manifest["ensemble"]["temperature"]["value"]
    row = {name: reading["example"][name] for name in ("prompt", "choices")}
    (answer,) = Ensemble.load(shipped, draws=2).predict([row])
    assert answer.probabilities == pytest.approx(reading["example"]["values"], abs=1e-5)


@pytest.mark.slow
def test_a_merge_into_other_weights_is_measured_and_scored_again(shipped: Path) -> None:
    manifest = read_json(shipped / MANIFEST)
    one, same = manifest["exports"][-2:]
    assert one["form"] == "merged" and one["from_evaluated"] > 10 * same["ratio"]  # 4 bits are other weights
    served = one["served"]
    assert served["temperature"]["value"] != manifest["adapter"]["temperature"]["value"]
    assert served["scores"]["before"]["nll"] != served["evaluated"]["before"]["nll"]
    assert set(served["scores"]["after"]) == {"nll", "accuracy", "ece"} <= set(served["evaluated"]["after"])
    assert read_json(shipped / "merged" / "reading.json")["temperature"] == served["temperature"]["value"]
    assert "served" not in same


def restamped(folder: Path) -> None:
    """Sizes and hashes of today's files, as one who tampers would leave them."""
    manifest = read_json(folder / MANIFEST)
    for name in manifest["files"]:
        manifest["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    write_json(folder / MANIFEST, manifest)


def tamper_with(copy: Path, fault: str) -> None:
    weights = copy / "adapter" / "adapter_model.safetensors"
    if fault == "tampered":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif fault == "missing":
        weights.unlink()
    elif fault == "zero effect":
        save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
        restamped(copy / "adapter")
        restamped(copy)
    elif fault == "wrong rank":
        cut = {name: value[:2] if "lora_A" in name else value[:, :2] for name, value in load_file(weights).items()}
        save_file({name: value.contiguous() for name, value in cut.items()}, weights)
        restamped(copy / "adapter")
        restamped(copy)
    elif fault == "wrong base":
        manifest = read_json(copy / MANIFEST)
        base = Path(shutil.copytree(manifest["base"]["path"], copy.parent / "base"))
        tensors = load_file(base / "model.safetensors")
        name = next(iter(tensors))
        save_file({**tensors, name: tensors[name] + 1}, base / "model.safetensors", {"format": "pt"})
        manifest["base"]["path"] = str(base)
        write_json(copy / MANIFEST, manifest)


FAULTS = {
    "tampered": "adapter_model.safetensors does not have the recorded hash",
    "missing": "adapter_model.safetensors is missing",
    "wrong base": r"another base than the one that this export was made for \(model.safetensors differs\)",
    "zero effect": "has no effect: every update is zero",
    "wrong rank": r"has \(2, \d+\) and .* not \(4, ",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(shipped: Path, tmp_path: Path, fault: str) -> None:
    copy = Path(shutil.copytree(shipped, tmp_path / "export", ignore=shutil.ignore_patterns("model.safetensors")))
    manifest = read_json(copy / MANIFEST)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if (copy / name).is_file()}
    write_json(copy / MANIFEST, manifest)
    tamper_with(copy, fault)
    with pytest.raises(UserError, match=FAULTS[fault]):
        Ensemble.load(copy, draws=0)
    if fault in ("tampered", "missing"):
        (found,) = verify_folder(copy)
        assert found.state == "damaged" and FAULTS[fault] in found.detail
