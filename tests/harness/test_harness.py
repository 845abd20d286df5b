"""Tasks of lm-evaluation-harness under the members of a run: against evaluate, and against the harness's own model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from pipeline.cli import main
from pipeline.config import RunConfig
from pipeline.data.splits import load_splits
from pipeline.errors import ConfigError, SetupError
from pipeline.harness.command import evaluate_tasks, format_tasks, load_members
from pipeline.harness.likelihoods import Likelihoods
from pipeline.plan.request import Request
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, read_predictions
from pipeline.run_folder.verify import verify_folder
from pipeline.support.tiny import WORDS


def write_tasks(folder: Path, rows: list[dict[str, object]]) -> None:
    """Three task files on one local JSON file: choices, a text behind a context, whole texts."""
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    tasks: dict[str, dict[str, object]] = {
        "mine_choices": {
            "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "label", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "mine_text": {
            "output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{choices[label]}}",
            "target_delimiter": "", "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
        "mine_whole": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{prompt}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "mine_written": {
            "output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "x",
            "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
        },
    }
    tasks["mine_sampled"] = {**tasks["mine_written"], "generation_kwargs": {"do_sample": True, "until": ["\n"]}}
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own}))


@pytest.fixture(scope="module")
def run(finished_run: tuple[RunPaths, RunConfig], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A copy of a finished run, its test rows as tasks, and its members."""
    pytest.importorskip("lm_eval")
    root = tmp_path_factory.mktemp("harness")
    shutil.copytree(finished_run[0].root, root / "run")
    config, paths = finished_run[1], RunPaths(root / "run")
    test = read_predictions(paths.predictions, "test")
    by_id = {row.id: row for row in load_splits(config.data).test}
    rows = [by_id[name] for name in test.row_ids]
    plain = [{"prompt": row.prompt, "choices": list(row.choices), "label": row.label} for row in rows]
    write_tasks(root / "tasks", plain)
    likelihoods = load_members(config, paths.adapter)[0]
    return SimpleNamespace(paths=paths, config=config, tasks=root / "tasks", test=test, rows=rows, found=likelihoods)


def requests(rows: list[SimpleNamespace]) -> list[SimpleNamespace]:
    """What the harness asks of a model for the choices of rows."""
    return [SimpleNamespace(args=(row.prompt, choice)) for row in rows for choice in row.choices]


@pytest.mark.slow
def test_likelihoods_of_members_are_those_of_evaluate(run: SimpleNamespace) -> None:
    from pipeline.harness.model import MembersLM

    assert isinstance(run.test, ChoicePredictions) and run.test.likelihoods is not None
    ours = run.test.likelihoods.log_likelihoods
    keys = ["base", "adapter", *(f"draw {draw}" for draw in range(4))]
    assert list(run.found.systems) == [*keys, "4 draws"]
    for place, key in enumerate(keys):
        theirs = MembersLM(run.found, key, greedy=False).loglikelihood(requests(run.rows), disable_tqdm=True)
        np.testing.assert_allclose([one for one, _ in theirs], ours[place].ravel(), rtol=0, atol=1e-5)
    mixed = MembersLM(run.found, "4 draws", greedy=False).loglikelihood(requests(run.rows), disable_tqdm=True)
    expected = np.log(np.exp(ours[2:6].astype(np.float64)).mean(axis=0)).ravel()
    np.testing.assert_allclose([one for one, _ in mixed], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_base_is_the_harnesss_own_model(run: SimpleNamespace) -> None:
    """Likelihoods, greedy answers, empty contexts, blanks at the end of contexts, texts longer than the model."""
    from lm_eval.models.huggingface import HFLM

    from pipeline.harness.model import MembersLM
    from pipeline.model.load import load_base

    base = load_base(run.config.model, torch.device("cpu"))  # quantized as the run's
    stock = HFLM(pretrained=base.model, tokenizer=base.tokenizer, device="cpu", batch_size=4)
    own = MembersLM(run.found, "base", greedy=True)
    assert own.max_length == stock.max_length
    more = [SimpleNamespace(args=args) for args in (("", " good film"), ("the film ", "was"))]
    asked = [*requests(run.rows[:6]), *more]
    asked += [SimpleNamespace(args=("the film was", f" {word}")) for word in WORDS]  # of which one may be the best
    theirs, found = stock.loglikelihood(asked, disable_tqdm=True), own.loglikelihood(asked, disable_tqdm=True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in theirs], rtol=0, atol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in theirs] and any(greedy for _, greedy in found)
    long = [SimpleNamespace(args=("the film was good and " * 40,)), SimpleNamespace(args=("a poor plot",))]
    expected = stock.loglikelihood_rolling(long, disable_tqdm=True)
    np.testing.assert_allclose(own.loglikelihood_rolling(long, disable_tqdm=True), expected, rtol=1e-5)
    settings = {"max_gen_toks": 5, "until": ["\n", "good"], "do_sample": False}
    asked = [SimpleNamespace(args=(row.prompt, dict(settings))) for row in run.rows[:5]]
    assert own.generate_until(asked) == stock.generate_until(asked, disable_tqdm=True)


@pytest.mark.slow
def test_a_greedy_answer_of_an_average_is_that_of_its_predictive_distribution(run: SimpleNamespace) -> None:
    """Written token by token from the likelihoods themselves: each token is more probable than any other."""
    context, text = tuple(run.found.task.base.tokenizer.encode("the film was")), ()
    vocabulary = range(run.found.task.base.model.config.vocab_size)
    for _ in range(2):
        scores = run.found.of("4 draws", [(context, (*text, token)) for token in vocabulary])
        text = (*text, int(scores.argmax()))
    other = (*text[:-1], (text[-1] + 1) % len(vocabulary))
    assert run.found.is_greedy("4 draws", [(context, text), (context, other)]) == [True, False]


@pytest.mark.slow
def test_the_command_scores_local_tasks_under_every_system(
    run: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.harness.command.load_members", lambda *_: (run.found, "hash"))
    command = ["eval", "--run-dir", str(run.paths.root), "--include-path", str(run.tasks), "--limit", "30", "--tasks"]
    assert main([*command, "mine_choices,mine_text,mine_whole,mine_written"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80 and "mine_choices (30 rows)" in printed and "4 draws" in printed
    result = json.loads((run.paths.root / "harness.json").read_text())
    assert format_tasks(result) in printed
    ours = run.test.log_probs[:, :30].argmax(axis=-1) == [row.label for row in run.rows[:30]]
    for place, found in enumerate(list(result["systems"].values())[:6]):
        assert found["results"]["mine_choices"]["acc,none"] == pytest.approx(ours[place].mean())
    assert {one.name: one.state for one in verify_folder(run.paths.root)}.get("harness.json") is None
    with pytest.raises(ConfigError, match=r"--tasks = 'mine_sampled': samples its texts"):
        evaluate_tasks(Request(run_dir=str(run.paths.root), tasks="mine_sampled", include_path=str(run.tasks)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "more", "said"),
    [
        (None, {}, "names no task"), ("no_such_task", {}, "is no task of lm-eval"),
        ("x", {"include_path": "nowhere"}, "is no folder"), ("x", {"limit": 0}, "is too small"),
    ],
)
def test_faults_are_named_before_a_model_is_loaded(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tasks: str | None, more: dict[str, object], said: str
) -> None:
    monkeypatch.setattr("pipeline.harness.command.load_members", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError, match=said):
        evaluate_tasks(Request(run_dir=str(run.paths.root), tasks=tasks, **more))  # type: ignore[arg-type]


@pytest.mark.slow
def test_without_the_package_the_extra_is_named(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.harness.command.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r'pip install "loradrop\[eval\]"'):
        evaluate_tasks(Request(run_dir=str(run.paths.root), tasks="arc_easy"))


def test_a_text_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def predicted(adapters: object, rows: list[object], members: object, settings: object) -> tuple[object, object]:
        asked.append(len(rows))
        return np.log([[0.5] * len(rows), [0.25] * len(rows)]), np.arange(len(rows) + 1)

    monkeypatch.setattr("pipeline.harness.likelihoods.predict_completions", predicted)
    monkeypatch.setattr("pipeline.harness.likelihoods.replace", lambda passes, **_: passes)
    task = SimpleNamespace(passes=None, shares_keys=False)
    found = Likelihoods(task, None, [], {"one": (0,), "both": (0, 1)})  # type: ignore[arg-type]
    pairs = [((1,), (2,)), ((1,), (3,)), ((1,), (2,))]
    np.testing.assert_allclose(found.of("one", pairs), np.log([0.5] * 3))
    np.testing.assert_allclose(found.of("both", pairs), np.log([0.375] * 3))
    assert asked == [2]
