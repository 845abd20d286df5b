"""Rows with a probability per choice: read, encoded, stored, and trained on as cross-entropy with that distribution."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.families import adapted_llama, assert_close_gradients, gradients, stock_double, trained_start
from helpers.reference import dense_model, dense_nll, dense_update
from torch import Tensor

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import joined, training_layout, weighed
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import DataConfig, load_config
from pipeline.config.method import Consistency, Site
from pipeline.data.cache import FILE, StoredExamples, has_several_answers, write_examples
from pipeline.data.encode import Answers, Encoded, encode_candidates, encode_training, weigh
from pipeline.data.encode_classifier import encode_classification
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.data.template import to_row
from pipeline.errors import ConfigError, DataError
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import Supervised, SupervisedLM
from pipeline.loss.terms import GlobalMean
from pipeline.support.tiny import byte_level_tokenizer, tiny_llama
from pipeline.training.batch import lay_out
from pipeline.training.loader import BatchLoader, open_loader

CHOICES = (" no", " yes", " perhaps not")
SHARES = ((0.5, 0.2, 0.3), (0.0, 0.9, 0.1), (0.0, 0.0, 1.0), (0.25, 0.5, 0.25))
SPEC = AdapterSpec(rank=4, sites=())


def row(number: int, shares: Sequence[float], label: int = 0) -> Row:
    return Row(f"r{number}", f"Is {'very ' * number}it?", CHOICES, label, label_probabilities=tuple(shares))


ROWS = [row(number, shares) for number, shares in enumerate(SHARES)]
RECORD: dict[str, Any] = {"prompt": "q", "choices": [" no", " yes"], "label": 0}


def small(one: Encoded) -> Encoded:
    """With tokens that a tiny model knows."""
    ids = tuple(3 + token % 60 for token in one.input_ids)
    labels = tuple(-100 if label == -100 else token for token, label in zip(ids, one.labels, strict=True))
    return replace(one, input_ids=ids, labels=labels)


TOKENIZER = byte_level_tokenizer()
CANDIDATES = [[small(answer) for answer in encode_candidates(one, TOKENIZER, 64)] for one in ROWS]
EXAMPLES = [weigh(answers, one.label_probabilities) for answers, one in zip(CANDIDATES, ROWS, strict=True)]


def loader_of(examples: Sequence[Encoded], *overrides: str, world: int = 1, rank: int = 0) -> BatchLoader:
    train = load_config(None, ["train.global_batch=4", "train.micro_batch=4", *overrides]).train
    return open_loader(train, 64, examples, SPEC, rank, world)


def loss_and_gradients(adapters: Adapters, model: Supervised, loader: BatchLoader) -> tuple[float, dict[str, Tensor]]:
    batch, total = loader.of_step(0), 0.0
    for micro in batch.micros:
        rows = lay_out(adapters, micro.examples, micro.layout, 2, MaskKey(0, 0))
        with adapters.axis.active(rows.plan):
            loss = GlobalMean(batch.supervised).for_engine(TrainingObjective(model, adapters.axis)(**rows.inputs)[0])
            loss.sum().backward()
        total += float(loss.detach().sum())
    return total, gradients(adapters)


def test_probabilities_are_read_and_are_part_of_what_a_row_is() -> None:
    told = to_row({**RECORD, "label_probabilities": "[0.25, 0.75]"}, None, "file:1")
    plain = to_row(RECORD, None, "file:1")
    assert told.label_probabilities == (0.25, 0.75) and told.label == 0 and told.content != plain.content
    assert "label_prob" not in plain.content and to_row({**RECORD, "label_probabilities": ""}, None, "f") == plain
    unlabelled = {**RECORD, "label": None, "label_probabilities": [0.332, 0.666]}
    found = to_row(unlabelled, None, "file:1")
    assert found.label == 1 and sum(found.label_probabilities) == pytest.approx(1.0, abs=1e-15)
    for wrong in ([0.5], [0.5, 0.4], [-0.5, 1.5], [0, 0], ["a", 1], 1.0, [float("nan"), 1.0]):
        with pytest.raises(DataError, match=r"file:1: label_probabilities.*(how probable each choice|not a number)"):
            to_row({**RECORD, "label_probabilities": wrong}, None, "file:1")


def test_one_that_is_certain_is_the_right_answer_and_nothing_else() -> None:
    for encode in (encode_training, encode_classification):
        assert encode(row(1, (0.0, 1.0, 0.0)), TOKENIZER, 64) == encode(row(1, (), 1), TOKENIZER, 64)
    told = encode_training(ROWS[1], TOKENIZER, 64)
    candidates = encode_candidates(ROWS[1], TOKENIZER, 64)
    assert isinstance(told, Answers) and [one.weight for one in told.answers] == [0.9, 0.1]
    assert [replace(one, weight=1.0) for one in told.answers] == candidates[1:]
    assert told.weighed == pytest.approx(0.9 * candidates[1].supervised + 0.1 * candidates[2].supervised)


def test_what_is_stored_is_what_was_encoded(tmp_path: Path) -> None:
    examples = [encode_training(one, TOKENIZER, 64) for one in ROWS]
    told = encode_classification(ROWS[0], TOKENIZER, 64)
    types = [replace(one, token_types=(0,) * len(one.input_ids)) for one in told.answers]
    whole = tuple(kind for one in types for kind in one.token_types or ())
    examples.append(replace(told, token_types=whole, told=tuple(types)))  # type: ignore[call-arg]
    write_examples(examples, tmp_path / FILE)
    stored = StoredExamples(tmp_path / FILE)
    assert list(stored) == examples and has_several_answers(stored) and has_several_answers(examples)
    write_examples(examples[2:3], tmp_path / "one")
    assert not has_several_answers(StoredExamples(tmp_path / "one")) and not has_several_answers(examples[2:3])


@pytest.mark.parametrize("settings", [[], ["train.micro_batch=2"], ["train.micro_tokens=90"]])
def test_loss_and_gradients_are_those_of_the_formula_in_float64(settings: list[str]) -> None:
    """L = Σ_i Σ_c q_ic · -log P(choice c | prompt i) ÷ Σ_i Σ_c q_ic · tokens(c), over padded passes however cut."""
    base = tiny_llama(layers=1)
    double = stock_double(base)
    adapters = trained_start(attach(base, [SPEC], "all-linear", seed=0))
    loader = loader_of(EXAMPLES, *settings)
    loss, found = loss_and_gradients(adapters, SupervisedLM(adapters.model), loader)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    updates: dict[str, Tensor] = {}
    for name, layer in adapters.layers.items():
        bucket = layer.buckets[0]
        A, B = (half.detach()[0].double().requires_grad_() for half in (bucket.lora_A, bucket.lora_B))
        factors[name], updates[name] = (A, B), dense_update(A, B, SPEC.scaling_of(name))
    nll, tokens = torch.zeros((), dtype=torch.float64), 0.0
    for answers, one in zip(CANDIDATES, ROWS, strict=True):
        for answer, q in zip(answers, one.label_probabilities, strict=True):
            ids, labels = torch.tensor([answer.input_ids]), torch.tensor([answer.labels])
            logits = dense_model(double, updates, ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None])
            nll, tokens = nll + q * dense_nll(logits, labels).sum(), tokens + q * answer.supervised
    (nll / tokens).backward()
    assert loss == pytest.approx(float(nll.detach()) / tokens, rel=1e-5)
    for name in adapters.layers:
        for half, wanted in zip(("lora_A", "lora_B"), factors[name], strict=True):
            ours = next(g for key, g in found.items() if key.startswith(f"{name}.") and half in key)[0].double()
            assert wanted.grad is not None and float(wanted.grad.abs().max()) > 1e-6
            assert float((ours - wanted.grad).abs().max()) < 1e-4 * float(wanted.grad.abs().max()), (name, half)


def test_rows_end_to_end_have_the_loss_of_padded_ones() -> None:
    adapters = adapted_llama(SPEC)
    loader = loader_of(EXAMPLES)
    padded, expected = loss_and_gradients(adapters, SupervisedLM(adapters.model), loader)
    adapters.set_end_to_end("sdpa", 64)
    loss, found = loss_and_gradients(adapters, SupervisedLM(adapters.model), loader)
    assert adapters.end_to_end and loss == pytest.approx(padded, rel=1e-5)
    assert_close_gradients(found, expected, 1e-4)


def test_a_classifier_learns_the_distribution_over_its_classes() -> None:
    """The gradient of the logits is softmax(logits) - q, over the number of rows."""
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    examples = [encode_classification(one, TOKENIZER, 64) for one in ROWS]
    batch = loader_of(examples).of_step(0)
    assert batch.supervised == pytest.approx(4.0)
    (micro,) = batch.micros
    order = {f"r{number}": number for number in range(4)}
    of_rows = logits[[order[one.example] for one in micro.examples]]
    losses = -of_rows.log_softmax(-1)[range(len(micro.examples)), [one.labels[0] for one in micro.examples]]
    (losses * torch.tensor(micro.layout.weights, dtype=torch.float64)).sum().div(batch.supervised).backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad, (logits.detach().softmax(-1) - torch.tensor(SHARES)) / 4, atol=1e-7)


def test_answers_of_a_row_share_its_draw_and_the_weight_of_its_pairs() -> None:
    masked = AdapterSpec(rank=4, sites=(Site(position="lora_A", rate=0.5),))
    train = load_config(None, ["train.global_batch=4", "train.micro_batch=4", "train.draws=4"]).train
    examples = [encode_training(one, TOKENIZER, 64) for one in ROWS]
    (micro,) = open_loader(train, 64, examples, masked).of_step(0).micros
    counted: dict[str, float] = {}
    draws: dict[str, set[int]] = {}
    for place, (source, weight) in enumerate(zip(micro.layout.source, micro.layout.weights, strict=True)):
        if weight > 0:
            name = micro.examples[source].example
            counted[name] = counted.get(name, 0.0) + weight
            draws.setdefault(name, set()).add(place // micro.layout.rows)
    assert counted == pytest.approx({f"r{n}": 1.0 for n in range(4)}) and all(len(own) == 1 for own in draws.values())
    term = Consistency(kind="js", weight=1.0, branches="both")
    layout = weighed(training_layout([0, 0, 1], 4, "split", True, term), [0.25, 0.75, 1.0])
    assert layout.pairing is not None and sum(layout.pairing.weights) == pytest.approx(sum(layout.weights) * 3)
    assert sum(joined([layout, layout], [3, 3]).weights) == pytest.approx(4.0)


def test_processes_share_rows_and_not_answers() -> None:
    examples = [encode_training(one, TOKENIZER, 64) for one in ROWS]
    whole = loader_of(examples).of_step(0)
    parts = [loader_of(examples, "train.micro_batch=2", world=2, rank=rank).of_step(0) for rank in (0, 1)]
    assert sum(part.supervised for part in parts) == pytest.approx(whole.supervised)
    assert [len({one.example for one in part.micros[0].examples}) for part in parts] == [2, 2]
    with pytest.raises(ConfigError, match="train.packing"):
        loader_of(examples, "train.packing=true")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows = [{"id": f"p{n}", "prompt": f"Question {n}", "choices": [" no", " yes"], "label": n % 2} for n in range(30)]
    told = [{**one, "label_probabilities": [0.2, 0.8]} for one in rows[:25]]
    for name, content in (("rows", rows), ("told", told)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in content))
    return tmp_path / "rows.jsonl", tmp_path / "told.jsonl"


def test_rows_to_train_on_come_from_a_file_of_their_own(files: tuple[Path, Path]) -> None:
    plain = DataConfig(path=str(files[0]))
    before, after = load_splits(plain), load_splits(plain.model_copy(update={"train_path": str(files[1])}))
    evaluated = {one.id for part in (before.validation, before.calibration, before.test) for one in part}
    assert (after.validation, after.calibration, after.test) == (before.validation, before.calibration, before.test)
    assert {one.id for one in after.train} == {f"p{n}" for n in range(25)} - evaluated and after.leaked > 0
    assert all(one.label_probabilities == (0.2, 0.8) for one in after.train)
    assert after.fingerprint != before.fingerprint
    assert "train_path" not in plain.model_dump() and DataConfig(train_path="x.jsonl").model_dump()["train_path"]
    with pytest.raises(ConfigError, match="data.streaming"):
        DataConfig(train_path="x.jsonl", streaming=True)


@pytest.mark.parametrize(("content", "says"), [
    (None, "data.train_path = .*does not exist"), ('{"prompt": "a", "completion": "b"}', "completion rows"),
    ('{"prompt": "Question 7", "choices": ["a", "b"], "label": 9}', "must be 0 to 1"),
])
def test_a_file_that_nothing_can_be_learnt_from_is_refused(
    content: str | None, says: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "other.jsonl"
    if content is not None:
        path.write_text(content + "\n")
    with pytest.raises(DataError, match=says):
        load_splits(DataConfig(path=str(files[0]), train_path=str(path)))
