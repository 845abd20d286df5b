"""Rows with a score, and pairs of texts: data, tokens, loss, predictions, scores, and the whole line on a tiny BERT."""

from __future__ import annotations

import copy
import csv
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT
from helpers.encoders import load_encoder, trained_encoder
from helpers.families import LORA_DROPOUT
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.cli import main
from pipeline.config import DataConfig, TemplateConfig, load_config
from pipeline.data.check import check_data
from pipeline.data.collate import collate
from pipeline.data.encode_classifier import encode_classification, encode_regression, encode_text, output_count
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.data.template import check_template, to_row
from pipeline.errors import DataError, RunFolderError
from pipeline.loss.objective import SupervisedClassifier, SupervisedRegressor
from pipeline.prediction.passes import PassSettings, predict_classes, predict_values
from pipeline.prediction.predict import validation_scores
from pipeline.report.tables import format_table
from pipeline.run_folder.predictions import RegressionPredictions, read_predictions, write_predictions
from pipeline.scores.bootstrap import bootstrap
from pipeline.scores.classification import BinaryScore
from pipeline.scores.ensemble import average, choose_adapters
from pipeline.scores.regression import Correlation, RootMeanSquare, gaussian_nll, row_squared_error
from pipeline.scores.selection import regression_loss
from pipeline.stages.data import Look, row_text
from pipeline.stages.evaluate import evaluate_run
from pipeline.stages.report import write_report
from pipeline.stages.train import train_run
from pipeline.support.tiny import WORDS, encoder_tokenizer, write_encoder
from pipeline.training.batch import lay_out

KEY = MaskKey(7, "test")
MEMBERS = [Member(0), Member(None), Member(0, 0), Member(0, 1)]
DROPOUT = AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT)
STSB = TemplateConfig(prompt="{sentence1}", second="{sentence2}", score="similarity")


def pair_tokenizer(segments: bool) -> PreTrainedTokenizerFast:
    """BERT-like, with segments; or RoBERTa-like: two separators and no segments."""
    plain = encoder_tokenizer()
    tail = "[SEP]:0 $B:1 [SEP]:1" if segments else "[SEP] [SEP] $B [SEP]"
    plain.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=f"[CLS] $A {tail}", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if segments else ["input_ids", "attention_mask"]
    marks = {name: str(getattr(plain, name)) for name in ("unk_token", "pad_token", "cls_token", "sep_token")}
    return PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, model_input_names=names, **marks)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_with_a_score_come_from_columns_or_a_template() -> None:
    assert to_row({"prompt": "A", "score": 2.5}, None, "f:1") == Row("", "A", score=2.5)
    values = {"sentence1": "A man", "sentence2": "A woman", "similarity": "3.8", "label": 4, "completion": "x"}
    row = to_row(values, STSB, "f:1")
    assert row == Row("", "A man", second="A woman", score=3.8) and row.kind == "regression"
    pair = to_row({"prompt": "A", "second": "B", "choices": ["x", "y"], "label": 1}, None, "f:1")
    assert pair == Row("", "A", ("x", "y"), 1, second="B") and pair.kind == "choice"


@pytest.mark.parametrize("value", ["", "high", None, float("nan"), float("inf"), True])
def test_a_score_that_is_no_number_is_named(value: object) -> None:
    with pytest.raises(DataError, match=r"f:1: score.*is (not a number|beyond)"):
        to_row({"prompt": "A", "score": value}, None, "f:1")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"score": "s", "choices": ("a", "b")}, "score beside"),
        ({"score": "s", "label": "l"}, "score beside"),
        ({"second": "{b}", "completion": "{c}"}, "second text"),
    ],
)
def test_templates_that_contradict_themselves(template: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_template(TemplateConfig(**template))


def test_pairs_are_one_question_only_with_the_same_second_text() -> None:
    first, second = Row("a", "A", ("x", "y"), 0, second="B"), Row("b", "A", ("x", "y"), 0, second="C")
    assert first.question != second.question and first.question == Row("c", "A", second="B", score=1.0).question
    assert Row("a", "A", second="B C").question != Row("a", "A B", second="C").question


def test_one_output_for_scores_one_for_each_class_and_no_mixture() -> None:
    scored, chosen = Row("s", "A", score=1.0), Row("c", "A", ("x", "y", "z"), 2)
    assert output_count([scored, scored]) == 1 and output_count([chosen]) == 3
    with pytest.raises(DataError, match="row c = 'choice': stands beside rows with a score"):
        output_count([scored, chosen])


def test_causal_models_refuse_scores_and_pairs_before_anything_is_loaded(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for row, said in (({"score": 1.0}, "is a number, and a causal"), ({"second": "B", "choices": ["x", "y"],
                      "label": 0}, "second text of a pair")):
        file.write_text("".join(json.dumps({"prompt": f"A {i}", **row}) + "\n" for i in range(20)))
        sizes = {"validation_rows": 2, "calibration_rows": 2, "test_rows": 2}
        config = DataConfig(path=str(file), **sizes)
        with pytest.raises(DataError, match=said):
            check_data(config, classifier=False)
        check_data(config, classifier=True)
        words = [f"data.{key}={value}" for key, value in sizes.items()]
        words += [f"model.path={tiny_folder / 'model'}", f"data.path={file}"]
        assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run"), *words]) == 2


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [True, False])
def test_pairs_are_tokenized_as_two_segments(segments: bool) -> None:
    tokenizer = pair_tokenizer(segments)
    row = Row("r", "the film was good", ("x", "y"), 1, second="a great actor")
    expected = tokenizer("the film was good", "a great actor")
    encoded = encode_classification(row, tokenizer, 64)
    assert list(encoded.input_ids) == expected["input_ids"]
    assert encoded.labels[0] == 1 and encoded.supervised == 1 and len(encoded.labels) == len(encoded.input_ids)
    assert encoded.token_types == ((0,) * 6 + (1,) * 4 if segments else None)
    short = encode_text(row, tokenizer, 8)
    assert list(short.input_ids) == tokenizer("the film was good", "a great actor", truncation="longest_first",
                                              max_length=8)["input_ids"] and len(short.input_ids) == 8
    with pytest.raises(DataError, match=r"data.max_tokens = 4: leaves no room for a pair"):
        encode_text(row, tokenizer, 4)
    with pytest.raises(DataError, match="row r: second"):
        encode_text(Row("r", "the", second=" "), tokenizer, 64)


def test_the_data_view_shows_the_score() -> None:
    tokenizer = pair_tokenizer(True)
    row = Row("r", "the film", second="good", score=3.75)
    text = row_text(Look(row, encode_regression(row, tokenizer, 64), 6), tokenizer, marks=True).plain
    assert text == "[CLS] the film [SEP] good [SEP]\nscore: 3.75"


def test_batches_carry_segments_and_scores_only_where_there_are_any() -> None:
    tokenizer = pair_tokenizer(True)
    rows = [Row("a", "the film", second="good", score=4.5), Row("b", "bad", second="a fine film was", score=1.25)]
    encoded = [encode_regression(row, tokenizer, 64) for row in rows]
    tensors = collate(encoded, 1, "right").tensors("cpu")
    assert tensors["scores"].tolist() == [4.5, 1.25] and [row.supervised for row in encoded] == [1, 1]
    assert tensors["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1]]
    alone = encode_classification(Row("c", "the film", ("x", "y"), 0), tokenizer, 64)
    assert set(collate([alone], 1).tensors("cpu")) == {"input_ids", "attention_mask", "position_ids", "labels"}


@pytest.mark.parametrize("segments", [True, False])
def test_real_pairs_of_rte_are_tokenized_whole(segments: bool) -> None:
    file = ROOT.parent / "shared" / "data" / "glue_rte" / "dev.tsv"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    with file.open(encoding="utf-8") as lines:
        records = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[:40]
    template = TemplateConfig(prompt="{sentence1}", second="{sentence2}", choices=("entailment", "not_entailment"))
    tokenizer = pair_tokenizer(segments)
    for record in records:
        row = to_row(record, template, "dev.tsv")
        encoded = encode_classification(row, tokenizer, 512)
        assert list(encoded.input_ids) == tokenizer(record["sentence1"], record["sentence2"])["input_ids"]
        assert row.choices[encoded.labels[0]] == record["label"]


# --- loss and predictions ---------------------------------------------------------------------------------------------


def pairs(count: int, score: bool) -> list[Row]:
    random = np.random.default_rng(3)
    texts = [[" ".join(random.choice(WORDS, random.integers(2, 8))) for _ in range(2)] for _ in range(count)]
    if score:
        return [Row(f"r{i}", one, second=two, score=i - 1.5) for i, (one, two) in enumerate(texts)]
    return [Row(f"r{i}", one, ("x", "y", "z"), i % 3, second=two) for i, (one, two) in enumerate(texts)]


def write_pair_encoder(folder: Path, family: str) -> Path:
    write_encoder(folder, family)
    pair_tokenizer(family == "bert").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("score", [True, False])
def test_pairs_give_what_the_stock_model_gives(family: str, score: bool, tmp_path: Path) -> None:
    """Values and classes under all members in one pass, loss of two draws: against a float64 model, pair by pair."""
    base = load_encoder(write_pair_encoder(tmp_path, family), family, classes=1 if score else 3)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, DROPOUT)
    head = adapters.heads["classifier"]
    rows = pairs(5, score)
    encode, predict = (encode_regression, predict_values) if score else (encode_classification, predict_classes)
    encoded = [encode(row, base.tokenizer, 64) for row in rows]
    found = predict(adapters, encoded, MEMBERS, PassSettings(1, 10**6, KEY))
    expected = []
    stock.classifier.load_state_dict({name: p.double() for name, p in head.start.state_dict().items()})
    for row in rows:
        inputs = base.tokenizer(row.prompt, row.second, return_tensors="pt")
        assert ("token_type_ids" in inputs) == (family == "bert")
        expected.append(stock(**inputs).logits[0])
    of_base = torch.stack(expected).detach()
    of_base = of_base[:, 0] if score else of_base.log_softmax(-1)
    np.testing.assert_allclose(found[1], of_base.numpy(), atol=2e-5)
    assert np.abs(found[2] - found[3]).max() > 1e-3, "draws differ"
    alone = np.stack([predict(adapters, encoded, [member], PassSettings(1, 1, KEY))[0] for member in MEMBERS])
    np.testing.assert_allclose(found, alone, atol=2e-5)

    built = lay_out(adapters, encoded, replicate_layout(5, 2), 1, KEY, "right")
    objective = SupervisedRegressor(adapters.model) if score else SupervisedClassifier(adapters.model)
    with adapters.axis.active(built.plan):
        loss = float(objective(**built.tensors, row_weights=built.weights).detach())
    draws = torch.tensor(found[2:]).double()
    if score:
        right = torch.tensor([row.score for row in rows]).double().expand(2, 5)
        wanted = 0.5 * torch.nn.functional.mse_loss(draws, right, reduction="sum")
    else:
        wanted = -0.5 * sum(draws[:, i, row.label].sum() for i, row in enumerate(rows))
    assert loss == pytest.approx(float(wanted), rel=1e-5)


def test_segments_matter_to_bert(tmp_path: Path) -> None:
    base = load_encoder(write_pair_encoder(tmp_path, "bert"), "bert", classes=1)
    adapters = trained_encoder(base, DROPOUT)
    encoded = [encode_regression(row, base.tokenizer, 64) for row in pairs(3, True)]
    blind = [type(row)(row.example, row.input_ids, row.labels, None, row.score) for row in encoded]
    settings = PassSettings(1, 10**6, MaskKey(0, "test"))
    with_segments, without = (predict_values(adapters, rows, [Member(0)], settings) for rows in (encoded, blind))
    assert np.abs(with_segments - without).max() > 1e-3


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def numbers() -> tuple[np.ndarray, np.ndarray]:
    """Two predictors' values (Q, N) with ties, and the scores."""
    random = np.random.default_rng(0)
    scores = random.integers(0, 11, 60) / 2.0
    return np.round(scores + random.normal(scale=[[1.0], [2.5]], size=(2, 60)), 1), scores


def test_correlations_and_rmse_equal_scipy_in_every_resample(numbers: tuple[np.ndarray, np.ndarray]) -> None:
    values, scores = numbers
    weights = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=8).astype(float)
    for kind, reference in (("pearson", pearsonr), ("spearman", spearmanr)):
        statistic = Correlation(values, scores, kind)
        assert statistic.point() == pytest.approx(np.mean([reference(one, scores)[0] for one in values]))
        for s, found in enumerate(statistic.resampled(weights)):
            drawn = np.repeat(np.arange(60), weights[s].astype(int))
            assert found == pytest.approx(reference(values[s % 2][drawn], scores[drawn])[0])
    squares = row_squared_error(values[..., None], scores)
    rmse = RootMeanSquare(squares)
    assert rmse.point() == pytest.approx(np.sqrt(((values - scores) ** 2).mean(axis=1)).mean())
    for s, found in enumerate(rmse.resampled(weights)):
        drawn = np.repeat(np.arange(60), weights[s].astype(int))
        assert found == pytest.approx(np.sqrt(((values[s % 2] - scores)[drawn] ** 2).mean()))
    constant = Correlation(np.ones((1, 60)), scores, "pearson")
    assert constant.point() == 0.0 and not bootstrap([constant], 60, 10).any()


@pytest.mark.parametrize("rate", [0.7, 0.95, 0.0])
def test_matthews_and_f1_equal_scikit_learn_in_every_resample(rate: float) -> None:
    """Also where a class is never chosen."""
    random = np.random.default_rng(4)
    labels = (random.random(80) < 0.7).astype(int)
    chosen = np.where(random.random((2, 80)) < rate, labels, 0)
    log_probs = np.log(np.where(chosen[..., None] == np.arange(2), 0.9, 0.1))
    weights = random.multinomial(80, np.full(80, 1 / 80), size=6).astype(float)
    for kind, reference in (("matthews", matthews_corrcoef), ("f1", partial(f1_score, zero_division=0.0))):
        statistic = BinaryScore.of(log_probs, labels, kind)
        assert statistic.point() == pytest.approx(np.mean([reference(labels, one) for one in chosen]))
        for s, found in enumerate(statistic.resampled(weights)):
            drawn = np.repeat(np.arange(80), weights[s].astype(int))
            assert found == pytest.approx(reference(labels[drawn], chosen[s % 2][drawn]))


def test_selection_goes_by_the_squared_error(numbers: tuple[np.ndarray, np.ndarray]) -> None:
    values, scores = numbers
    rows = [Row(str(i), "A", score=float(score)) for i, score in enumerate(scores)]
    found = [validation_scores(RegressionPredictions(tuple(r.id for r in rows), one[None]), rows) for one in values]
    assert found[0]["rmse"] == pytest.approx(np.sqrt(((values[0] - scores) ** 2).mean()))
    assert found[0]["nll"] < found[1]["nll"] and found[0]["rmse"] < found[1]["rmse"]
    residuals = values[0] - scores
    variance = (residuals**2).mean()
    gaussian = 0.5 * np.log(2 * np.pi * variance) + residuals**2 / (2 * variance)
    assert found[0]["nll"] == pytest.approx(gaussian.mean())
    assert np.isfinite(gaussian_nll(scores[:, None], scores))


def test_ensembles_average_the_numbers(numbers: tuple[np.ndarray, np.ndarray]) -> None:
    values, scores = numbers
    assert average(values[..., None], "value")[:, 0] == pytest.approx(values.mean(axis=0))
    noise = np.random.default_rng(2).normal(size=(3, 60))
    adapters = [scores[:, None] + noise[0][:, None], scores[:, None] - 0.9 * noise[0][:, None], noise[1][:, None] + 9]
    order = choose_adapters(adapters, 3, lambda one: regression_loss("nll", one[None], scores).point(), "value")
    assert order == (1, 0, 2), "errors that cancel; the third comes last"


def test_predicted_numbers_are_cached_and_merged(tmp_path: Path) -> None:
    parts = [RegressionPredictions(("c", "a"), np.array([[3.0, 1.0], [6.0, 4.0]])),
             RegressionPredictions(("b",), np.array([[2.0], [5.0]]))]
    whole = RegressionPredictions.merged(parts, ["a", "b", "c"])
    write_predictions(tmp_path, "test", whole)
    stored = read_predictions(tmp_path, "test")
    assert isinstance(stored, RegressionPredictions) and stored.row_ids == ("a", "b", "c") and stored.members == 2
    assert stored.values.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    with np.load(tmp_path / "test.npz") as arrays:
        assert set(arrays) == {"row_ids", "seconds", "kind", "values", "made_from"}, "no labels in here"
    with pytest.raises(ValueError, match="finite"):
        RegressionPredictions(("a",), np.array([[np.nan]]))
    np.savez(tmp_path / "broken.npz", row_ids=np.array(["a"]), seconds=0.0, kind="regression", made_from="{}",
             values=np.ones((1, 2)))
    with pytest.raises(RunFolderError, match="is damaged"):
        read_predictions(tmp_path, "broken")


# --- the whole line ---------------------------------------------------------------------------------------------------


def write_pairs(path: Path, count: int) -> Path:
    """Score = how many of the second text's words are in the first: to be learnt from pairs alone."""
    random = np.random.default_rng(5)
    lines = []
    for i in range(count):
        first = list(random.choice(WORDS, 4, replace=False))
        good = int(random.integers(0, 5))
        second = ["good"] * good + ["bad"] * (4 - good)
        lines.append(json.dumps({"s1": " ".join([*first, WORDS[i % 19]]), "s2": " ".join(second), "gold": float(good)}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_train_evaluate_and_report_with_scores(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.evaluate.leave_world", lambda: None)  # it serves the next test
    model, data = write_pair_encoder(tmp_path / "encoder", "bert"), write_pairs(tmp_path / "pairs.jsonl", 300)
    template = 'data.template={prompt: "{s1}", second: "{s2}", score: gold}'
    config = load_config(None, [*tiny_settings, f"model.path={model}", f"data.path={data}", template,
                                "train.max_steps=40", "train.validate_every_steps=20",
                                "train.checkpoint_every_steps=40"])
    run = tmp_path / "run"
    trained = train_run(config, run)
    assert trained["validation_accuracy"] is None and np.isfinite(trained["validation_nll"])
    evaluate_run(run)
    result = write_report(run)
    own = next(system for system in result["systems"] if system["key"] == "mean_field")
    base = next(system for system in result["systems"] if system["key"] == "base")
    assert result["kind"] == "regression" and own["temperature"] is None and set(own["test"]) == {"before"}
    assert own["test"]["before"]["pearson"]["value"] > 0.8
    assert own["test"]["before"]["rmse"]["value"] < 0.7 * base["test"]["before"]["rmse"]["value"]
    assert any("no probabilities" in sentence for sentence in result["left_out"])
    assert result["ensemble"]["score"] == "mse" and "mean squared error" in result["ensemble"]["rule"]
    stored = read_predictions(run / "predictions", "test")
    assert isinstance(stored, RegressionPredictions) and stored.values.shape == (1 + 1 + 4, 60)
    right = {row.id: row.score for row in load_splits(config.data).test}
    direct = pearsonr(stored.values[1], [right[name] for name in stored.row_ids])[0]
    assert own["test"]["before"]["pearson"]["value"] == pytest.approx(direct)
    page, table = (run / "report.html").read_text(), format_table(result)
    assert "Spearman" in page and "Reliability" not in page and "Pearson" in table
    assert re.search(r"LoRA Dropout, mean-field +1 +-?\d\.\d+ \[", table), "with its interval"
