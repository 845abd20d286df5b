"""Consistency terms on encoders against dense float64 models, and whole trainings through the launcher."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers.consistency_reference import FORMS, draws_of, kl
from helpers.encoders import attach_encoder, load_encoder, texts, trained_encoder, weights_of
from helpers.families import CPU, LORA_DROPOUT
from torch import Tensor
from torch.func import functional_call

from pipeline.adapters.layout import plain_layout, training_layout
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Consistency
from pipeline.config.model import ModelConfig
from pipeline.data.encode import Encoded
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedClassifier, SupervisedRegressor
from pipeline.model.load import load_base
from pipeline.support.tiny import PAD, tiny_llama, tiny_tokenizer
from pipeline.training.batch import lay_out

KEY = MaskKey(11, 4)
SCORES = (0.5, -1.0, 2.0)


def dense_terms(answers: dict[int | None, tuple[Tensor, Tensor]], target: float, term: Consistency) -> Tensor:
    """One example: (loss, D) from the (outputs of the head, what is compared) of its branches, float64."""
    first, second, *_ = list(answers)
    probabilities = {}
    for branch, (_, compared) in answers.items():
        p = compared.softmax(-1)
        probabilities[branch] = p if term.branches == "both" or branch == first else p.detach()

    def loss(branch: int | None) -> Tensor:
        outputs = answers[branch][0]
        return (outputs[0] - target).square() if len(outputs) == 1 else -outputs.log_softmax(-1)[int(target)]

    nll = loss(first) if term.branches == "one" else (loss(first) + loss(second)) / 2
    p, q = probabilities[first], probabilities[second]
    if term.kind == "kl":
        return torch.stack([nll, (kl(p, q) + kl(q, p)) / 2])
    mean = sum(probabilities.values()) / 3
    return torch.stack([nll, sum(kl(each, mean) for each in probabilities.values()) / 3])


@pytest.mark.parametrize(
    ("family", "kind", "term"),
    [("bert", "classes", FORMS[0]), ("bert", "classes", FORMS[3]), ("roberta", "scores", FORMS[1]),
     ("roberta", "scores", FORMS[2])],
)  # fmt: skip
def test_an_encoders_terms_equal_the_dense_model(family: str, kind: str, term: Consistency, tmp_path: Path) -> None:
    """Class probabilities, and the representation of the first token where one number is predicted; heads included."""
    base = load_encoder(tmp_path, family, classes=3 if kind == "classes" else 1)
    stock = copy.deepcopy(base.model).double()
    adapters = trained_encoder(base, AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT))
    rows = texts([3, 7, 5])
    if kind == "scores":
        rows = [Encoded(r.example, r.input_ids, r.labels, score=s) for r, s in zip(rows, SCORES, strict=True)]
    module = SupervisedClassifier if kind == "classes" else SupervisedRegressor
    built = lay_out(adapters, rows, training_layout(range(3), 4, "split", True, term), PAD, KEY, "right")
    objective = TrainingObjective(module(adapters.model), adapters.axis)
    with adapters.axis.active(built.plan):
        nll, apart = objective(**built.inputs)
        (nll + term.weight * apart).backward()
    ours = {name: p.grad for name, p in adapters.model.named_parameters() if p.requires_grad}
    adapters.model.zero_grad()

    members = [Member(0, draw) for draw in (0, 1, 2, 3, None)]
    masks = adapters.plan(members, 1, KEY).masks
    weights = {m.draw: weights_of(adapters, stock, m, masks, i) for i, m in enumerate(members)}
    total = torch.zeros(2, dtype=torch.float64)
    for i, row in enumerate(rows):
        answers: dict[int | None, tuple[Tensor, Tensor]] = {}
        for draw in draws_of(i % 2, term):
            inputs = {"input_ids": torch.tensor([row.input_ids]), "output_hidden_states": True}
            found = functional_call(stock, weights[draw], kwargs=inputs)
            compared = found.logits[0] if kind == "classes" else found.hidden_states[-1][0, 0]
            answers[draw] = (found.logits[0], compared)
        total = total + dense_terms(answers, i % 3 if kind == "classes" else SCORES[i], term)
    (total[0] + term.weight * total[1]).backward()
    assert [float(nll.detach()), float(apart.detach())] == pytest.approx(total.tolist(), rel=2e-5)
    assert float(apart.detach()) > 1e-3
    for name, parameter in adapters.model.named_parameters():
        if parameter.requires_grad:
            scale = max(float(parameter.grad.abs().max()), 1e-3)
            assert float((ours[name] - parameter.grad).abs().max()) <= 5e-5 * scale, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_decoder_that_predicts_a_number_is_compared_by_its_last_token(side: str, tmp_path: Path) -> None:
    """Rows down to a single token, padded on either side, against each row alone in float64."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(ModelConfig(path=str(tmp_path), quantization="none", kind="classifier"), CPU, 1)
    stock = copy.deepcopy(base.model).double()
    adapters = attach_encoder(base, AdapterSpec(rank=4))  # untrained: the base itself
    rows = [Encoded(f"row-{n}", tuple(range(5, 5 + n)), (-100,) * n, score=1.0) for n in (6, 1, 4)]
    built = lay_out(adapters, rows, plain_layout(3), base.tokenizer.pad_token_id, KEY, side)  # type: ignore[arg-type]
    with torch.no_grad(), adapters.axis.active(built.plan):
        features = SupervisedRegressor(adapters.model).features(**built.model_tensors).values
    for i, row in enumerate(rows):
        found = stock(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        torch.testing.assert_close(features[i, 1:].double(), found.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-4)


# --- whole trainings -------------------------------------------------------------------------------------------------


def terms_of(folder: Path) -> list[float]:
    """Both terms of every step."""
    from pipeline.files import read_json_lines
    from pipeline.run_folder.paths import RunPaths

    rows = [row for row in read_json_lines(RunPaths(folder).metrics) if row["kind"] == "train"]
    return [row[name] for row in rows for name in ("loss", "consistency")]


@pytest.mark.slow
def test_processes_stages_accumulation_and_checkpointing_train_the_same(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    """HiddenKey and LoRA Dropout on an NF4 base: terms of every step, Adam's first moment, the adapter's bytes."""
    from helpers.runs import adapter_hash, first_moments, launch

    from pipeline.config import load_config
    from pipeline.stages.train import train_run

    settings = [*tiny_settings, "adapter.method=lora_dropout+hiddenkey", "train.max_gradient_norm=1e6"]
    alone = {
        "one": [],  # accumulation 2
        "large micro batch": ["train.micro_batch=8"],
        "checkpointing": ["train.activation_checkpointing=true"],
        "zero0": ["train.deepspeed=zero0"],
        "zero1": ["train.deepspeed=zero1"],
    }
    for name, extra in alone.items():
        train_run(load_config(None, [*settings, *extra]), tmp_path / name)
    assert launch(tmp_path / "two", [*settings, "launch.processes=2"]) == 0
    expected, moments = terms_of(tmp_path / "one"), first_moments(tmp_path / "one")
    assert len(expected) == 12 and min(expected[1::2]) > 1e-3 and expected[10] < expected[0]
    for name in (*alone, "two"):
        assert terms_of(tmp_path / name) == pytest.approx(expected, rel=2e-3), name
        found = first_moments(tmp_path / name)
        assert float((found - moments).norm() / moments.norm()) < 5e-3, name
    assert terms_of(tmp_path / "checkpointing") == expected
    assert adapter_hash(tmp_path / "checkpointing") == adapter_hash(tmp_path / "one")
    log = (tmp_path / "two" / "logs" / "train.log").read_text()
    assert "consistency  kl, weight 1, 2 pairs, gradient through one branch" in log and "· consistency 0." in log


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["adapter.method=hiddenkey", "adapter.consistency.branches=both"],
     ["adapter.method=hiddenkey", "adapter.consistency.kind=js", "train.draw_layout=replicate", "train.draws=2"],
     ["adapter.method=lora_dropout", "adapter.consistency.kind=js", "adapter.consistency.branches=both"]],
)  # fmt: skip
def test_the_other_forms_train(tmp_path: Path, tiny_settings: list[str], settings: list[str]) -> None:
    from pipeline.config import load_config
    from pipeline.stages.train import train_run

    result = train_run(load_config(None, [*tiny_settings, *settings, "train.max_steps=12"]), tmp_path / "run")
    terms = terms_of(tmp_path / "run")
    assert len(terms) == 24 and all(math.isfinite(x) and x > -1e-6 for x in terms) and max(terms[1::2]) > 1e-3
    assert terms[22] < terms[0] and math.isfinite(result["validation_nll"])
