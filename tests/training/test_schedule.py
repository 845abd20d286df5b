"""The learning rate of each step: against closed forms, and against transformers' schedules stepped by themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from pipeline.config import TrainConfig, build_config
from pipeline.errors import ConfigError
from pipeline.training.schedule import schedule_of


def factors(steps: int, **train: Any) -> list[float]:
    factor = schedule_of(TrainConfig(max_steps=steps, **train))
    return [factor(step) for step in range(steps)]


def test_a_schedule_warms_up_and_decays() -> None:
    linear = factors(20, warmup_steps=4)
    assert linear[:4] == [0.25, 0.5, 0.75, 1.0] and linear[4] == 1.0
    assert linear[-1] == pytest.approx(1 / 16) and sorted(linear[4:], reverse=True) == linear[4:]
    half = 0.5 * (1 + math.cos(math.pi * 0.95))
    assert factors(20, warmup_steps=0, schedule="cosine")[-1] == pytest.approx(half)
    for name in ("constant", "constant_with_warmup"):
        assert factors(20, warmup_steps=4, schedule=name) == [0.25, 0.5, 0.75, *[1.0] * 17]


def test_closed_forms() -> None:
    waves = factors(44, warmup_steps=4, schedule="cosine_with_restarts", schedule_cycles=4)
    assert waves[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (4 * s / 40 % 1))) for s in range(40)])
    assert [step for step in range(4, 44) if waves[step] == 1.0] == [4, 14, 24, 34]
    power = factors(24, warmup_steps=4, schedule="polynomial", schedule_power=2.0)
    assert power[4:] == pytest.approx([(1 - s / 20) ** 2 for s in range(20)])
    root = factors(24, warmup_steps=4, schedule="inverse_sqrt")
    assert root[4:] == pytest.approx([math.sqrt(4 / step) for step in range(4, 24)])
    stable = factors(24, warmup_steps=4, schedule="warmup_stable_decay", decay_fraction=0.5)
    assert stable[3:15] == [1.0] * 12
    assert stable[14:] == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", {}), ("cosine", {}), ("cosine_with_restarts", {}), ("constant_with_warmup", {}), ("inverse_sqrt", {}),
     ("polynomial", {"lr_end": 0.0})],
)  # fmt: skip
def test_after_the_warm_up_the_rates_are_those_of_transformers(name: str, options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_scheduler(name, optimizer, 5, 30, options)
    expected = []
    for _ in range(30):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert factors(30, warmup_steps=5, schedule=name)[5:] == pytest.approx(expected[5:])


@pytest.mark.parametrize(
    "name",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt", "warmup_stable_decay"],
)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (3, 3), (3, 9), (7, 6), (7, 0)])
def test_every_schedule_has_a_rate_for_every_step(name: str, steps: int, warmup: int) -> None:
    assert all(0.0 < factor <= 1.0 for factor in factors(steps, warmup_steps=warmup, schedule=name))


def test_a_key_of_another_schedule_is_refused() -> None:
    for key, value in (("schedule_cycles", 3), ("schedule_power", 2.0), ("decay_fraction", 0.5)):
        with pytest.raises(ConfigError, match=rf"train\.{key} = {value:g} is read by train\.schedule = \w+ alone"):
            build_config({"train": {key: value, "schedule": "linear"}})
    with pytest.raises(ConfigError, match=r"train\.schedule"):
        build_config({"train": {"schedule": "cosin"}})
