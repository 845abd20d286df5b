"""AdamW of bitsandbytes beside PyTorch's: the same update, the same bits after a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.config.train import Optimizer
from pipeline.model.adamw import MOMENTS, build_adamw, moment_names, restore_moments

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
SIZES = {"paged": (400, 256), "large": (96, 128), "small": (8, 16)}
"""Above the 100,000 numbers from which moments are paged, and above and below the 4,096 from which they have 8 bits."""


def parameters(device: str) -> dict[str, nn.Parameter]:
    random = torch.Generator().manual_seed(3)
    return {name: nn.Parameter(torch.randn(size, generator=random).to(device)) for name, size in SIZES.items()}


def made(name: Optimizer, trained: dict[str, nn.Parameter]) -> Any:
    """An optimizer with two groups, as LoRA+ has them."""
    groups = [{"params": [one], "lr": 0.01 * n, "ratio": n} for n, one in enumerate(trained.values(), start=1)]
    return build_adamw(name, groups, 0.01, 0.1)


def steps(optimizer: Any, trained: dict[str, nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        for parameter in trained.values():
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.device)
        optimizer.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_it_is_adamw_up_to_its_moments_precision(name: Optimizer, device: str) -> None:
    if device == "cpu" and name.startswith("paged"):
        pytest.skip("nothing is paged on a CPU")
    reference, trained = parameters(device), parameters(device)
    steps(made("adamw", reference), reference, 0, 6)
    steps(made(name, trained), trained, 0, 6)
    start = parameters(device)
    rough = 0.05 if "8bit" in name else 1e-5
    for key, rounding in (("paged", rough), ("large", rough), ("small", 1e-5)):
        moved = (reference[key] - start[key]).norm()
        assert float((trained[key] - reference[key]).norm() / moved) < rounding, key


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_it_goes_on_with_the_same_bits_from_what_a_checkpoint_keeps(name: Optimizer, device: str) -> None:
    if device == "cpu" and name.startswith("paged"):
        pytest.skip("nothing is paged on a CPU")
    trained = parameters(device)
    optimizer = made(name, trained)
    assert moment_names(optimizer) == ("state1", "state2", "absmax1", "absmax2")
    assert moment_names(made("adamw", trained)) == MOMENTS
    steps(optimizer, trained, 0, 3)
    kept: dict[str, dict[str, Tensor]] = {
        key: {n: value.detach().cpu().clone() for n in moment_names(optimizer)
              if (value := optimizer.state[one].get(n)) is not None}
        for key, one in trained.items()
    }
    assert kept["large"]["state1"].dtype == torch.uint8 and kept["large"]["absmax1"].shape == (96 * 128 // 256,)
    assert set(kept["small"]) == {"state1", "state2"} and kept["small"]["state1"].dtype == torch.float32
    resumed = copy.deepcopy(trained)
    other = made(name, resumed)
    restore_moments(other, 3, {resumed[key]: moments for key, moments in kept.items()})
    for those, own in ((optimizer, trained), (other, resumed)):
        steps(those, own, 3, 6)
    for key, one in trained.items():
        assert torch.equal(one, resumed[key]), key
