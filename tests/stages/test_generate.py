"""Texts of a tiny run: written beside predictions, kept, scored, shown; refused where they belong to something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipeline.config import dump_config, load_config
from pipeline.config.evaluate import GenerateConfig, check_generation
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError, RunFolderError, SetupError
from pipeline.files import read_json_lines, write_text
from pipeline.run_folder.generated import texts_path
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.verify import verify_folder
from pipeline.scores.generated import text_scores
from pipeline.stages import evaluate
from pipeline.stages.report import print_report, write_report
from pipeline.stages.train import train_run

SYSTEMS = ["base", "mean_field", "masks_3"]


def write_rows(path: Path) -> Path:
    """Two right answers for every prompt, in rows of their own; a third stands in a column."""
    rows = [
        {"prompt": f"Review: {a} {b} film was {c} Sentiment:", "completion": f" {c} {end}", "references": ["so"]}
        for a in ("the", "a", "it", "so", "not") for b in ("story", "plot", "actor", "very") for c in ("good", "bad")
        for end in ("film", "plot")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[RunPaths]:
    """Trained for a few steps, evaluated and reported with texts; a test leaves it as it found it."""
    folder = tmp_path_factory.mktemp("texts")
    config = load_config(None, [
        f"model.path={tiny_folder / 'model'}", f"data.path={write_rows(folder / 'rows.jsonl')}",
        "data.validation_rows=12", "data.calibration_rows=4", "data.test_rows=24", "data.max_tokens=64",
        "train.max_steps=12", "train.global_batch=8", "train.micro_batch=8", "train.learning_rate=0.02",
        "train.validate_every_steps=12", "ensemble.size=3", "adapter.rank=4", "model.compute_dtype=float32",
        "evaluate.bootstrap_samples=100", "evaluate.generate.max_tokens=8", "evaluate.generate.rows=10",
    ])  # fmt: skip
    paths = RunPaths(folder / "run")
    claim(paths.root, "run")
    write_text(paths.config, dump_config(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "leave_world", lambda: None)  # the process group serves the next test
        train_run(config, paths.root)
        evaluate.evaluate_run(paths.root)
        write_report(paths.root)
        yield paths


def set_generate(paths: RunPaths, **values: object) -> str:
    """config.yaml under other settings; what it was before."""
    before = paths.config.read_text()
    tree = yaml.safe_load(before)
    tree["evaluate"]["generate"].update(values)
    paths.config.write_text(yaml.safe_dump(tree))
    return before


@pytest.mark.slow
def test_texts_are_written_scored_and_shown(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines = read_json_lines(texts_path(run.predictions, "test"))
    assert list(head["writers"]) == SYSTEMS and len(head["writers"]["masks_3"]) == 3
    test = load_splits(load_config(run.config).data).test
    prompts = list(dict.fromkeys(row.prompt for row in test))[:10]
    assert len(prompts) == 10 and len(lines) == 30
    first = {row.prompt: row.id for row in reversed(test)}
    assert [line["id"] for line in lines[:10]] == [first[prompt] for prompt in prompts]
    entry = json.loads(run.result.read_text())["texts"]
    assert [system["key"] for system in entry["systems"]] == SYSTEMS
    references = [
        [text.strip() for row in test if row.prompt == prompt for text in (row.completion or "", *row.references)]
        for prompt in prompts
    ]
    assert entry["prompts"] == 10 and entry["references"] == sum(map(len, references)) == 40
    for system in entry["systems"]:
        texts = [line["text"] for line in lines if line["system"] == system["key"]]
        for name, score in text_scores(texts, references).items():
            assert system["scores"][name]["value"] == pytest.approx(score.point())
            assert system["scores"][name]["low"] <= score.point() <= system["scores"][name]["high"]
    base, own, _ = (system["scores"]["rouge_l"]["value"] for system in entry["systems"])
    assert own > base + 10.0, "the adapter has learnt nothing"
    apart = entry["differences"]
    assert {(one["system"], one["versus"]) for one in apart} == {("masks_3", "mean_field")}
    print_report(run.root)
    shown, page = capsys.readouterr().out, run.report.read_text()
    assert "ROUGE-L" in shown and "10 prompts of the test rows with 40 references; greedy" in shown
    assert "<h2>Texts</h2>" in page and prompts[0] in page and "and 1 more" in page
    states = {finding.name: finding.state for finding in verify_folder(run.root)}
    assert states["predictions/generated_test.jsonl"] == "whole" and set(states.values()) == {"whole"}


@pytest.mark.slow
def test_texts_are_kept_or_written_again(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    path = texts_path(run.predictions, "test")
    before = path.read_text()
    evaluate.evaluate_run(run.root)
    assert "predictions are complete" in capsys.readouterr().err and path.read_text() == before
    path.unlink()
    with pytest.raises(RunFolderError, match=r"generated_test\.jsonl.*does not exist"):
        write_report(run.root)
    evaluate.evaluate_run(run.root)
    again = list(read_json_lines(path))
    path.write_text(before)
    assert list(read_json_lines(path))[1:] == again[1:]
    config = set_generate(run, beams=3, no_repeat_ngram=2)
    with pytest.raises(RunFolderError, match="under other settings"):
        write_report(run.root)
    assert {one.name: one.state for one in verify_folder(run.root)}["predictions/generated_test.jsonl"] == "foreign"
    evaluate.evaluate_run(run.root)
    assert write_report(run.root)["texts"]["settings"]["beams"] == 3
    run.config.write_text(config)
    path.write_text(before)
    write_report(run.root)


@pytest.mark.slow
def test_damaged_texts_are_refused(run: RunPaths) -> None:
    path = texts_path(run.predictions, "test")
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    for damaged in ("".join(lines[:-1]), lines[0], "", before.replace('"tokens": ', '"tokens": -'), "{}\n" + before):
        path.write_text(damaged)
        with pytest.raises(RunFolderError, match=r"generated_test\.jsonl.*is damaged"):
            write_report(run.root)
        found = {one.name: one.state for one in verify_folder(run.root)}
        assert found["predictions/generated_test.jsonl"] == "damaged" and found["result.json"] == "foreign"
    path.write_text(before)


def test_other_rows_and_missing_packages_are_refused_before_a_model_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    check_generation(None, "choice")
    check_generation(GenerateConfig(), "completion")
    with pytest.raises(ConfigError, match=r"evaluate\.generate.*choice rows are not answered by one"):
        check_generation(GenerateConfig(), "choice")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r'pip install "loradrop\[eval\]"'):
        check_generation(GenerateConfig(), "completion")


def test_runs_without_texts_keep_their_identity() -> None:
    config = load_config(None, [])
    assert "generate" not in config.model_dump(mode="json")["evaluate"] and "generate" not in dump_config(config)
    asked = load_config(None, ["evaluate.generate={}"])
    assert asked.evaluate.generate == GenerateConfig() and asked.training_sha256() == config.training_sha256()
    assert asked.reading_sha256() != config.reading_sha256()
