"""Adapters on a model of one's own: in a plain loop, and under transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loradrop
import pytest
import torch
from peft import PeftModel

from pipeline.adapters.members import MaskKey, Member
from pipeline.support.tiny import tiny_llama

ROWS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))


def attached(method: str = "lora_dropout", rate: float = 0.5) -> loradrop.Attached:
    found = loradrop.attach(tiny_llama(), loradrop.AdapterConfig(method=method, rate=rate, rank=4), seed=3)
    for number, parameter in enumerate(found.parameters()):  # else B = 0, and masks change nothing
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
    return found


def logits(found: loradrop.Attached, rows: torch.Tensor = ROWS) -> torch.Tensor:
    return found.adapters.model(input_ids=rows).logits.detach()


def test_each_part_of_a_batch_is_under_its_own_draw() -> None:
    found = attached()
    plain = logits(found)
    with found.training(ROWS, step=5, draws=2):
        shared = logits(found)
    for draw in (0, 1):
        own = ROWS[2 * draw : 2 * draw + 2]
        with found.adapters.axis.active(found.adapters.plan([Member(0, draw)], 2, MaskKey(3, 5))):
            torch.testing.assert_close(shared[2 * draw : 2 * draw + 2], logits(found, own), rtol=0, atol=1e-5)
    assert (shared - plain).abs().amax() > 1e-2
    with found.training(ROWS, step=5, draws=2):
        assert torch.equal(logits(found), shared)
    with found.training(ROWS, step=6, draws=2):
        assert (logits(found) - shared).abs().amax() > 1e-2
    assert torch.equal(logits(found), plain)
    with pytest.raises(loradrop.ConfigError, match="draws = 3: does not divide the 4 rows"), found.training(ROWS, 0, 3):
        pass


def test_several_members_read_in_one_pass() -> None:
    found = attached()
    with found.reading([None, 0, 1], ROWS.repeat(3, 1)):
        by_member = logits(found, ROWS.repeat(3, 1)).view(3, 4, 7, -1)
    torch.testing.assert_close(by_member[0], logits(found), rtol=0, atol=1e-5)
    assert (by_member[1] - by_member[2]).abs().amax() > 1e-2
    with pytest.raises(loradrop.ConfigError, match="no divisor of 4 rows"), found.reading([0, 1, 2], ROWS):
        pass


def test_sites_inside_the_base_are_masked_too() -> None:
    found = attached("dropkey", 0.5)
    plain = logits(found)
    with found.training(ROWS, step=1, draws=2):
        masked = logits(found)
    assert (masked - plain).abs().amax() > 1e-3 and torch.equal(logits(found), plain)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "adalora"}, "prunes ranks"), ({"method": "hiddenkey"}, "consistency term"),
        ({"init_from": "somewhere"}, "read by loradrop.train alone"),
    ],
)
def test_what_needs_our_loop_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(loradrop.ConfigError, match=says):
        loradrop.attach(tiny_llama(), loradrop.AdapterConfig(**settings))


@pytest.mark.slow
def test_under_transformers_trainer(tmp_path: Path) -> None:
    """The example of docs/python.md: the loss falls, the base stays, masks are drawn, stock PEFT reads the result."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    found = loradrop.attach(model, loradrop.AdapterConfig(method="lora_dropout", rate=0.2, rank=4, alpha=16.0))
    seen = []

    class MaskedTrainer(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            with found.training(inputs["input_ids"], self.state.global_step, draws=2):
                seen.append(found.adapters.axis.current)
                return super().training_step(model, inputs, num_items_in_batch)

    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=0.02, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, dataloader_drop_last=True, disable_tqdm=True,
    )
    trainer = MaskedTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert len(seen) == 12 and {plan.keys[0].phase for plan in seen} == set(range(12)) and seen[0].size == 2
    for name, layer in found.adapters.layers.items():
        assert torch.equal(layer.base.weight, base[f"{name}.weight"])
    found.save(tmp_path / "adapter", base="tiny")
    with torch.no_grad():
        ours = logits(found)
        stock = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))(input_ids=ROWS).logits
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-4)
