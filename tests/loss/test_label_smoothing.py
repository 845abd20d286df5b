"""Label smoothing against torch's cross_entropy, in every objective that has labels; warm-up in steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.encoders import load_encoder, texts, trained_encoder
from helpers.families import examples
from torch.nn.functional import cross_entropy

from pipeline.adapters.attach import attach
from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.loss.objective import SupervisedClassifier, SupervisedLM
from pipeline.loss.terms import nll_and_log_probs, token_losses
from pipeline.prediction.passes import PassSettings
from pipeline.prediction.task import RegressionTask
from pipeline.support.tiny import tiny_llama
from pipeline.training.batch import lay_out
from pipeline.training.schedule import schedule_of, warmup_steps


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_token_losses_equal_torch(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are computed in chunks that are recomputed in the backward pass."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 6, generator=random, requires_grad=True)
    weight = torch.randn(11, 6, generator=random, requires_grad=True)
    labels = torch.randint(0, 11, (3, 9), generator=random)
    labels[0, :6] = labels[2, 3] = -100
    expected = cross_entropy(
        (hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
    wanted = torch.autograd.grad(expected, (hidden, weight))
    for chunk in (1000, 4):
        monkeypatch.setattr("pipeline.loss.terms.CHUNK_TOKENS", chunk)
        losses, _ = token_losses(hidden, labels, lambda x: x @ weight.T, smoothing)
        torch.testing.assert_close(losses.sum(), expected)
        for found, one in zip(torch.autograd.grad(losses.sum(), (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(found, one)
    logits, targets = (hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten().clamp(min=0)
    nll, log_probs = nll_and_log_probs(logits, targets, smoothing)
    torch.testing.assert_close(nll, cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing))
    torch.testing.assert_close(log_probs, logits.log_softmax(-1))


def test_objectives_smooth(tmp_path: Path) -> None:
    adapters = attach(tiny_llama(), [AdapterSpec()], "all-linear", 0)
    rows = examples([7, 4])
    built = lay_out(adapters, rows, replicate_layout(2, 1), 2, MaskKey(0, 0))
    found = SupervisedLM(adapters.model)(**built.tensors, row_weights=built.weights, smoothing=0.1)
    logits = [adapters.model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1] for row in rows]
    expected = sum(
        cross_entropy(one, torch.tensor(row.labels[1:]), reduction="sum", label_smoothing=0.1)
        for one, row in zip(logits, rows, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    encoder = trained_encoder(load_encoder(tmp_path), AdapterSpec())
    inputs = texts([5, 3])
    built = lay_out(encoder, inputs, replicate_layout(2, 1), 1, MaskKey(0, 0), "right")
    found = SupervisedClassifier(encoder.model)(**built.tensors, row_weights=built.weights, smoothing=0.2)
    logits = [encoder.model(input_ids=torch.tensor([row.input_ids])).logits for row in inputs]
    expected = sum(cross_entropy(one, torch.tensor([i]), label_smoothing=0.2) for i, one in enumerate(logits))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_numbers_cannot_be_smoothed(tmp_path: Path) -> None:
    passes = PassSettings(pad_id=0, budget_tokens=512, key=MaskKey(0, "test"))
    task = RegressionTask(load_encoder(tmp_path, classes=1), 64, 0.1, passes)
    with pytest.raises(ConfigError, match=r"train.label_smoothing = 0.1: has no meaning for rows with a score"):
        task.objective()


def test_the_warm_up_may_be_given_in_steps() -> None:
    assert warmup_steps(TrainConfig(max_steps=200, warmup_fraction=0.06)) == 12
    assert warmup_steps(TrainConfig(max_steps=200, warmup_steps=50, warmup_fraction=0.06)) == 50
    factors = [schedule_of(TrainConfig(max_steps=200, warmup_steps=50))(step) for step in range(200)]
    assert factors[:2] == [0.02, 0.04] and max(factors) == factors[49] == factors[50] == 1.0
    assert factors[125] == pytest.approx(0.5)
