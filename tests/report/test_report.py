"""The report on a synthetic run folder: its numbers against direct computation, its page, its refusals."""

import json
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.runs import write_predicted
from scipy.optimize import minimize_scalar
from sklearn.metrics import accuracy_score, log_loss

from pipeline.config import build_config, dump_config, load_config
from pipeline.config.load import with_values
from pipeline.data.rows import Row
from pipeline.errors import ConfigError, RunFolderError
from pipeline.files import write_json, write_text
from pipeline.report.inputs import read_inputs
from pipeline.report.result import build_result
from pipeline.report.scoring import CALIBRATION_RESAMPLES, score_system
from pipeline.report.sentences import ece_text, write_reading
from pipeline.report.systems import System
from pipeline.report.tables import align, format_table
from pipeline.run_folder.labelled import independent_units
from pipeline.run_folder.members import PredictedMember, write_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import (
    ChoicePredictions,
    CompletionPredictions,
    read_predictions,
)
from pipeline.scores.bootstrap import RowMean, bootstrap, percentile_interval
from pipeline.stages.report import write_report
from pipeline.stages.table import STAGES

ROWS = {"validation": 120, "calibration": 150, "test": 200}
DRAWS = 8


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def make_members(draws=DRAWS):
    return [
        PredictedMember("base", "base"),
        PredictedMember("plain", "plain", "../plain/adapter", "ab"),
        PredictedMember("mean_field", "mean_field", "adapter", "cd", extra={"rate": 0.5, "rank": 8}),
        *(PredictedMember(f"draw_{d}", "mask_draw", "adapter", "cd", d) for d in range(draws)),
        *(PredictedMember(f"trial_{k}", "searched", f"../search/{k}/adapter", "ef") for k in range(3)),
    ]


def make_logits(members, truth, random):
    """(M, N): the evidence for choice 1: true log-odds, times overconfidence, plus the member's noise."""
    looks = {"base": (0.4, 0.8), "plain": (3.5, 3.0), "mean_field": (2.0, 1.0), "mask_draw": (2.0, 1.6),
             "searched": (1.5, 1.2)}
    shared = random.normal(size=len(truth))
    return np.stack([
        looks[m.group][0] * truth + looks[m.group][1] * (0.5 * shared + random.normal(size=len(truth)))
        for m in members
    ])


def write_run(root: Path, label="smoke run: no result", seed=0, draws=DRAWS):
    """A run folder as training, evaluation and search leave it; returns the splits that load_splits would."""
    random, paths, members, splits = np.random.default_rng(seed), RunPaths(root), make_members(draws), {}
    config = build_config({"label": label, "evaluate": {"bootstrap_samples": 120}})
    write_text(paths.config, dump_config(config))
    write_json(paths.environment, {"device": "cpu <&>", "versions": {"torch": "2.13.0"}})
    write_members(paths.predictions, members)
    for split, rows in ROWS.items():
        truth = random.normal(scale=1.5, size=rows)
        labels = (random.random(rows) < 1 / (1 + np.exp(-truth))).astype(int)
        ids = [f"{split}-{i}" for i in range(rows)]
        logits = make_logits(members, truth, random)
        log_probs = log_softmax(np.stack([np.zeros_like(logits), logits], axis=-1)).astype(np.float32)
        write_predicted(root, split, ChoicePredictions(tuple(ids), log_probs, seconds=12.5))
        answers = ("bad", "good")
        splits[split] = [
            Row(i, f"<script>{i}</script> &\nGood?", answers, int(y), label_counts=(3.0 - y, 1.0 + 2 * y))
            for i, y in zip(ids, labels, strict=True)
        ][::-1]
    write_training(paths, 0.5)
    write_training(RunPaths(root.parent / "plain"), 0.9)
    write_links(root)
    return splits


def write_training(paths, level):
    rows = [{"kind": "train", "step": s, "loss": 0.7 * 0.97**s, "seconds": 0.5} for s in range(1, 61)]
    rows += [{"kind": "validation", "step": s, "nll": level + 1 / s, "accuracy": 0.8} for s in (20, 40, 60)]
    write_text(paths.metrics, "".join(json.dumps(row) + "\n" for row in rows))


def write_links(root):
    write_json(RunPaths(root).related, {
        "plain": {"run": "../plain", "adapter_sha256": "ab"}, "search": {"folder": str(root.parent / "search")},
    })
    trials = [
        {"name": f"trial_{k}", "config": {"adapter.rate": 0.1 * k, "adapter.rank": 2 ** (2 + k % 3),
                                          "train.learning_rate": 1e-4 * 2.5**k},
         "validation_nll": 0.5 + 0.03 * abs(k - 2), "validation_accuracy": 0.85, "steps": 40,
         "state": "finished" if k else "stopped", "run": f"trials/{k}"}
        for k in range(5)
    ]
    trials.append({"name": "trial_5", "config": trials[0]["config"], "validation_nll": None,
                   "validation_accuracy": None, "steps": 3, "state": "failed", "run": "trials/5"})
    write_json(root.parent / "search" / "search.json", {
        "trials": trials, "best": "trial_2", "ensemble": {},
        "plain": {"trials": [{**one, "name": f"plain_{k}"} for k, one in enumerate(trials)], "best": "plain_1"},
    })


def score(root):
    """The numbers alone: drawing the page takes longer than everything else."""
    return build_result(read_inputs(root))[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run folder with its report, for tests that only look."""
    root = tmp_path_factory.mktemp("finished") / "run"
    splits = write_run(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.report.inputs.load_splits", lambda _: SimpleNamespace(**splits, fingerprint="rows"))
        result = write_report(root)
    return SimpleNamespace(root=root, paths=RunPaths(root), splits=splits, result=result)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run folder whose data configuration leads to the rows it was predicted for."""
    splits = write_run(tmp_path / "run")
    monkeypatch.setattr("pipeline.report.inputs.load_splits", lambda _: SimpleNamespace(**splits, fingerprint="rows"))
    return SimpleNamespace(root=tmp_path / "run", paths=RunPaths(tmp_path / "run"), splits=splits)


def direct_predictions(run, split, subset):
    """The mixture of members, and the labels in its row order, without any of our code but the reader."""
    predictions = read_predictions(run.paths.predictions, split)
    by_id = {row.id: row.label for row in run.splits[split]}
    mixture = np.exp(predictions.log_probs[list(subset)].astype(np.float64)).mean(axis=0)
    return mixture / mixture.sum(axis=1, keepdims=True), np.array([by_id[row_id] for row_id in predictions.row_ids])


def system(result, key):
    return next(s for s in result["systems"] if s["key"] == key)


def test_systems_are_those_of_the_issue(finished):
    result = finished.result
    names = [(s["name"], s["passes"]) for s in result["systems"]]
    assert names[:6] == [
        ("Base model", 1), ("Plain LoRA", 1), ("LoRA Dropout, mean-field", 1),
        ("LoRA Dropout, 2 masks", 2), ("LoRA Dropout, 4 masks", 4), ("LoRA Dropout, 8 masks", 8),
    ]
    assert re.fullmatch(r"Ensemble of [23] searched adapters|Best searched adapter", names[6][0])
    assert system(result, "masks_2")["subsets"] == 28 and system(result, "masks_8")["subsets"] == 1
    assert result["left_out"] == []
    assert json.loads(finished.paths.result.read_text()) == result


def test_scores_equal_scikit_learn(finished):
    result = finished.result
    for key, subset in (("base", [0]), ("mean_field", [2]), ("masks_8", range(3, 11))):
        probabilities, labels = direct_predictions(finished, "test", subset)
        scores = system(result, key)["test"]["before"]
        assert scores["nll"]["value"] == pytest.approx(log_loss(labels, probabilities))
        assert scores["accuracy"]["value"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
        for entry in (scores["nll"], scores["accuracy"], scores["brier"]):
            assert entry["low"] < entry["value"] < entry["high"]


def test_ensembles_are_averaged_first_then_scaled_by_their_own_temperature(finished):
    entry = system(finished.result, "masks_8")
    calibration, calibration_labels = direct_predictions(finished, "calibration", range(3, 11))
    probabilities, labels = direct_predictions(finished, "test", range(3, 11))

    def scaled(p, temperature):
        powered = p ** (1.0 / temperature)
        return powered / powered.sum(axis=1, keepdims=True)

    def penalised(t):
        return 150 * log_loss(calibration_labels, scaled(calibration, t)) + np.log(t) ** 2 / (2 * 0.35**2)

    best = minimize_scalar(penalised, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-8}).x
    assert entry["temperature"]["low"] < best < entry["temperature"]["high"] and entry["temperature"]["carried"]
    assert entry["temperature"]["mean"] == pytest.approx(best, rel=1e-4)
    assert entry["test"]["after"]["nll"]["value"] == pytest.approx(log_loss(labels, scaled(probabilities, best)))
    assert entry["test"]["after"]["accuracy"] == entry["test"]["before"]["accuracy"]


def test_comparisons_are_paired_differences_of_the_scores(finished):
    result = finished.result
    compared = {(c["split"], c["scaling"], c["score"], c["system"], c["versus"]): c for c in result["comparisons"]}
    entry = compared["test", "before", "nll", "mean_field", "plain"]
    values = [system(result, key)["test"]["before"]["nll"] for key in ("mean_field", "plain")]
    assert entry["difference"] == pytest.approx(values[0]["value"] - values[1]["value"])
    assert entry["excludes_zero"] == (entry["low"] > 0 or entry["high"] < 0)
    assert {key[3:] for key in compared if key[0] == "validation"} == {
        ("mean_field", "base"), ("mean_field", "plain"), ("plain", "base")}
    assert ("test", "after", "nll", "masks_8", "base") in compared
    assert not any(c["system"] == c["versus"] for c in compared.values())


def test_ensemble_curve_is_measured_on_every_cached_size(finished):
    result = finished.result
    curve = result["ensemble"]
    assert curve["sizes"] == list(range(1, 9))
    offered = ["mean_field", *(f"masks_{size}" for size in (1, 2, 4, 8)), "greedy", "fitted"]
    assert [one["key"] for one in curve["candidates"]] == offered
    assert curve["chosen"] in {one["key"] for one in curve["candidates"]}
    singles = [log_loss(labels, p) for p, labels in (direct_predictions(finished, "test", [i]) for i in range(3, 11))]
    assert curve["test"]["before"]["nll"][0] == pytest.approx(np.mean(singles))
    assert curve["test"]["before"]["nll_spread"][0] == pytest.approx(np.std(singles, ddof=1))
    full = system(result, "masks_8")["test"]["before"]["nll"]["value"]
    assert curve["test"]["before"]["nll"][7] == pytest.approx(full)


def test_test_labels_choose_nothing(run):
    """Size, adapters and temperatures stay the same when the test labels are turned round."""
    first = score(run.root)
    run.splits["test"][:] = [Row(id=r.id, choices=r.choices, label=1 - r.label) for r in run.splits["test"]]
    second = score(run.root)
    assert first["ensemble"]["chosen_size"] == second["ensemble"]["chosen_size"]
    for one, other in zip(first["systems"], second["systems"], strict=True):
        assert (one["members"], one["temperature"]) == (other["members"], other["temperature"])
        assert one["test"]["before"]["nll"]["value"] != other["test"]["before"]["nll"]["value"]


def test_the_report_is_reproducible(run, finished):
    """Byte for byte, in another folder."""
    write_report(run.root)
    assert run.paths.result.read_bytes() == finished.paths.result.read_bytes()
    assert run.paths.report.read_bytes() == finished.paths.report.read_bytes()


def test_page_stands_alone(finished):
    page = finished.paths.report.read_text()
    assert len(page) < 2_000_000 and page.count("<svg") == 6
    assert not re.search(r"https?:|<script|@import|url\(\s*['\"]?(?!#)|\bsrc=", page)
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'href="([^"]*)"', page))
    assert "default-src 'none'" in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))


def test_page_shows_label_configuration_and_environment_escaped(finished):
    page = finished.paths.report.read_text()
    assert '<p class="label">smoke run: no result</p>' in page
    assert "learning_rate: 0.0005" in page and "versions.torch" in page
    assert "cpu &lt;&amp;&gt;" in page and "cpu <&>" not in page
    assert "trial_2" in page and "failed" in page and "plain_1" in page
    assert "tuned as those of the method were: 6 settings each" in page


def test_page_has_the_texts_of_rows_escaped_and_the_result_their_ids(finished):
    page, result = finished.paths.report.read_text(), finished.result
    for name in ("disagreement", "confidently_wrong"):
        assert len(result["rows_to_see"][name]) == 10
        for one in result["rows_to_see"][name]:
            assert f"<blockquote>&lt;script&gt;{one['id']}&lt;/script&gt; &amp;\nGood?</blockquote>" in page
    assert "Good?" not in finished.paths.result.read_text() and re.search(r"Members: [1-8] × (good|bad)", page)
    curve = result["risk_coverage"]["masks_8"]
    wrong = 1.0 - system(result, "masks_8")["test"]["before"]["accuracy"]["value"]
    assert curve["coverage"][-1] == 1.0 and curve["risk"][-1] == pytest.approx(wrong) and "plot-risk-coverage" in page


def test_agreement_with_raters_is_scored_before_and_after_scaling(finished):
    result, people = finished.result, finished.result["raters"]["entropy"]
    assert "Agreement with human raters" in finished.paths.report.read_text()
    assert f"The raters' own entropy is {people:.3f} nats" in format_table(result)
    probabilities, labels = direct_predictions(finished, "test", range(3, 11))
    shares = np.stack([3.0 - labels, 1.0 + 2 * labels], axis=1) / (4.0 + labels)[:, None]
    scores = system(result, "masks_8")["test"]
    expected = -(shares * np.log(probabilities)).sum(axis=1).mean()
    assert scores["before"]["rater_cross_entropy"]["value"] == pytest.approx(expected) and expected > people
    assert people == pytest.approx(-(shares * np.log(shares)).sum(axis=1).mean())
    assert scores["after"]["rater_divergence"]["value"] != scores["before"]["rater_divergence"]["value"]


def test_reading_says_what_the_intervals_say(finished):
    result = finished.result
    text = " ".join(result["reading"])
    for comparison in result["comparisons"]:
        if comparison["split"] == "validation" and comparison["system"] == "mean_field" \
                and (comparison["versus"], comparison["score"], comparison["scaling"]) == ("base", "nll", "before"):
            assert f"which {'excludes' if comparison['excludes_zero'] else 'includes'} 0" in text
    clear = [c for c in result["comparisons"] if c["excludes_zero"] and c["difference"] < 0
             and (c["split"], c["score"], c["scaling"], c["versus"]) == ("test", "nll", "before", "plain")]
    assert clear, "the synthetic plain LoRA is far worse than the rest"
    assert re.search(r"Against plain LoRA, mean-field.*: better in NLL", text)


def test_a_report_that_was_asked_for_by_itself_is_shown(finished, capsys):
    STAGES["train"].show_outcome(finished.paths.root)
    assert capsys.readouterr().out == ""
    STAGES["report"].show_outcome(finished.paths.root)
    shown = capsys.readouterr().out
    assert re.fullmatch(re.escape(format_table(finished.result)) + r"\n\n  report   \S*report\.html\n", shown)


def test_terminal_table_has_a_line_per_system(finished):
    result = finished.result
    lines = format_table(result).splitlines()
    assert not any("\\n" in line for line in lines), "line breaks of our own are line breaks"
    assert lines[0] == "smoke run: no result"
    start = lines.index(next(line for line in lines if line.startswith("uncertainty ")))
    own = [line for line in lines[start:] if not line.startswith(("200", "T:", "train s", "Chance", "! ", "Next"))]
    assert max(len(line) for line in own) <= 80 and sum(s["name"][:30] in "".join(own) for s in result["systems"]) == 8
    table = lines[1:start]
    assert max(len(line) for line in table) <= 80
    assert all(re.search(r"\[.*\].*\[.*\]", line) for line in table[2:5]), "an accuracy and an NLL in one line"
    for name in (system["name"] for system in result["systems"]):
        first, *more = textwrap.wrap(name, 26, subsequent_indent="  ", break_on_hyphens=False)
        places = [n for n, line in enumerate(table) if line.startswith(f"{first}  ")]
        assert any(table[n + 1 : n + 1 + len(more)] == more for n in places)
    for heading in ("passes", "Accuracy", "NLL", "ECE (debiased)", "train s", "test s"):
        assert any(heading in re.split(" {2,}", line) for line in table)


def test_a_wide_terminal_has_one_table_and_a_narrow_one_all_columns(monkeypatch):
    rows = [["", "one", "two", "three"], ["first", "1" * 30, "2" * 30, "3" * 30], ["second", "", "b", "c"]]
    narrow = align(rows)
    assert max(map(len, narrow)) <= 80 and len(narrow) == 10
    assert [line.split() for line in narrow if line.startswith(" ")] == [["one", "two"], ["three"]]
    assert narrow[7] == "first   " + "3" * 30 and narrow[2].endswith("  " + "2" * 30)
    monkeypatch.setenv("COLUMNS", "120")
    assert len(align(rows)) == 5 and align(rows)[2] == f"first   {'1' * 30}  {'2' * 30}  {'3' * 30}"
    monkeypatch.setenv("COLUMNS", "60")
    assert align(rows) == narrow
    assert align([["", "x" * 90], ["a", "b"]])[2].endswith("b"), "a column alone is as wide as it is"
    rows[2][0] = "a name that is too long for one line, and that tells something"
    lines = align(rows)
    assert max(map(len, lines)) <= 80 and lines[3:6] == [
        f"{'a name that is too long':24}  {'':30}", "  for one line, and that", "  tells something",
    ]



def test_terminal_table_shows_control_characters_of_labels_and_names(finished):
    systems = [{**one, "name": f"{one['name']}\x1b[31m\nforged"} for one in finished.result["systems"]]
    text = format_table({**finished.result, "label": "mine\u202e\nforged", "systems": systems})
    assert text.startswith(r"mine\u202e\nforged") and r"\x1b[31m" in text
    assert "\x1b" not in text and not any(line.startswith("forged") for line in text.splitlines())


def test_absent_parts_are_left_out_in_words(run):
    run.paths.related.unlink()
    run.paths.metrics.unlink()
    run.paths.environment.unlink()
    keep = [0, 2]
    members = make_members()
    write_members(run.paths.predictions, [members[i] for i in keep])
    for split in ROWS:
        old = read_predictions(run.paths.predictions, split)
        write_predicted(run.root, split, ChoicePredictions(old.row_ids, old.log_probs[keep]))
    result = write_report(run.root)
    assert [s["key"] for s in result["systems"]] == ["base", "mean_field"] and result["ensemble"] is None
    assert len(result["left_out"]) == 5
    page = run.paths.report.read_text()
    assert all(sentence in page for sentence in result["left_out"]) and "<h2>Search</h2>" not in page


def test_completion_data(run):
    """NLL per token and perplexity; no accuracy, no temperature."""
    random, members, tokens = np.random.default_rng(4), make_members(draws=4), {}
    write_text(run.paths.config, dump_config(with_values(load_config(run.paths.config), {"ensemble.size": 4})))
    write_members(run.paths.predictions, members)
    for split, rows in ROWS.items():
        offsets = np.concatenate([[0], random.integers(1, 9, rows).cumsum()])
        tokens[split] = -random.exponential(size=(len(members), offsets[-1])).astype(np.float32)
        ids = tuple(row.id for row in run.splits[split])
        write_predicted(run.root, split, CompletionPredictions(ids, tokens[split], offsets))
        run.splits[split][:] = [Row(id=row_id, completion="x") for row_id in ids]
    result = write_report(run.root)
    entry = system(result, "masks_4")["test"]
    mixture = np.exp(tokens["test"][3:7].astype(np.float64)).mean(axis=0)
    assert entry["before"]["nll"]["value"] == pytest.approx(-np.log(mixture).mean())
    assert entry["before"]["perplexity"]["value"] == pytest.approx(np.exp(-np.log(mixture).mean()))
    assert set(entry) == {"before"} and system(result, "masks_4")["temperature"] is None
    assert any("do not apply" in sentence for sentence in result["left_out"])
    assert "Perplexity" in format_table(result) and "<h2>Reliability" not in run.paths.report.read_text()


def test_other_methods_keep_their_names(run):
    config = build_config({"adapter": {"method": "hiddenkey"}, "evaluate": {"bootstrap_samples": 50}})
    predictions = {split: read_predictions(run.paths.predictions, split) for split in ROWS}
    write_text(run.paths.config, dump_config(config))
    with pytest.raises(RunFolderError, match="was made from another configuration"):
        score(run.root)
    for split, found in predictions.items():
        write_predicted(run.root, split, found)
    result = score(run.root)
    assert system(result, "mean_field")["name"] == "HiddenKey" and result["label"] == ""


def test_report_before_evaluate_says_so(run):
    (run.paths.predictions / "calibration.npz").unlink()
    with pytest.raises(RunFolderError, match=r"calibration\.npz: does not exist\. Run the evaluate stage"):
        write_report(run.root)
    assert not run.paths.result.exists() and not run.paths.report.exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match=r"config\.yaml: does not exist"):
        write_report(tmp_path)


def test_predictions_of_other_data_are_refused(run):
    run.splits["test"].pop()
    with pytest.raises(RunFolderError, match="1 rows that the data lack.*evaluate again"):
        score(run.root)


def test_labels_outside_the_predicted_choices_are_refused(run):
    run.splits["test"][0] = Row(id=run.splits["test"][0].id, choices=("a", "b", "c"), label=2)
    with pytest.raises(RunFolderError, match="no prediction for the label 2"):
        score(run.root)


def test_member_count_must_fit(run):
    write_members(run.paths.predictions, make_members()[:-1])
    with pytest.raises(RunFolderError, match="made by other members than members.json names"):
        score(run.root)


def test_damaged_side_files_are_named(run):
    (run.root.parent / "search" / "search.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"search\.json"):
        score(run.root)
    write_links(run.root)
    with run.paths.metrics.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:\d+: is damaged"):
        score(run.root)
    run.paths.config.write_text("train: {max_stepz: 3}\n")
    with pytest.raises(ConfigError, match="max_steps"):
        score(run.root)


def test_what_a_system_costs_is_said_in_passes_and_seconds(finished):
    members = len(make_members())
    for key, passes, train in (("base", 1, None), ("plain", 1, 30.0), ("mean_field", 1, 30.0), ("masks_8", 8, 30.0)):
        entry = system(finished.result, key)
        assert (entry["passes"], entry["train_seconds"]) == (passes, train)
        assert entry["evaluate_seconds"] == pytest.approx(12.5 * passes / members)


def test_intervals_after_scaling_draw_the_calibration_rows_too(finished, monkeypatch):
    """A score under a temperature of 150 rows varies more than under one that is given."""
    splits = SimpleNamespace(**finished.splits, fingerprint="rows")
    monkeypatch.setattr("pipeline.report.inputs.load_splits", lambda _: splits)
    inputs = read_inputs(finished.root)
    scored = score_system(inputs, System("plain", "", "", ((1,),)))
    (statistic,) = scored.statistics["test", "after"]["nll"]
    table = bootstrap([statistic, statistic.fitted], 200, 960)
    both, rows = table.std(axis=0)
    temperatures = statistic.refitted.values.mean(axis=1)
    assert len(temperatures) == CALIBRATION_RESAMPLES and temperatures.std() > 0.0
    assert both**2 == pytest.approx(rows**2 + temperatures.std() ** 2, rel=0.25) and both > rows


def test_rows_of_one_document_are_one_unit(run):
    alone = score(run.root)
    for split in ROWS:
        for number, row in enumerate(run.splits[split]):
            run.splits[split][number] = replace(row, unit=f"document {int(row.id.split('-')[1]) // 5}")
    together = score(run.root)
    assert (alone["units"]["test"], together["units"]["test"]) == (200, 40)
    assert alone["ece"]["bins"] == 15 and together["ece"]["bins"] == 15
    one, other = (system(result, "plain")["test"]["before"] for result in (alone, together))
    assert one["nll"]["value"] == other["nll"]["value"] and one["nll"] != other["nll"]
    assert one["ece"]["value"] != other["ece"]["value"]


def test_an_ece_of_zero_shows_what_it_can_be_at_most():
    assert ece_text({"value": 0.0, "low": 0.0, "high": 0.0452}) == "≤ 0.045"
    assert ece_text({"value": 0.02, "low": 0.0, "high": 0.0452}) == "0.020 [0.000, 0.045]"


def test_every_score_has_its_interval(finished):
    for entry in finished.result["systems"]:
        for split in ("validation", "test"):
            for scores in entry[split].values():
                assert all(one["low"] <= one["value"] <= one["high"] for one in scores.values())
    scores = {(c["score"], c["scaling"]) for c in finished.result["comparisons"]}
    assert {("ece", "before"), ("ece", "after"), ("brier", "before"), ("brier", "after")} <= scores


def test_few_rows_come_with_a_warning(finished):
    assert "too narrow to trust" not in " ".join(finished.result["reading"])
    result = {**finished.result, "units": {**finished.result["units"], "test": 20}}
    assert "With 20 test rows the intervals themselves are too narrow to trust." in write_reading(result)[-1]


def test_rows_of_one_question_are_resampled_together() -> None:
    assert independent_units(["a", "b", "c"]) is None
    units = independent_units(["b", "a", "b", "c", "a"])
    assert units is not None and units.tolist() == [0, 1, 0, 2, 1]
    values = np.repeat(np.random.default_rng(0).normal(size=40), 7)[None]  # 7 equal rows per question
    whole = percentile_interval(0.0, bootstrap([RowMean(values)], 280, 4000, 0, np.repeat(np.arange(40), 7))[:, 0])
    rows = percentile_interval(0.0, bootstrap([RowMean(values)], 280, 4000, 0)[:, 0])
    assert (whole.high - whole.low) / (rows.high - rows.low) == pytest.approx(7**0.5, rel=0.15)
