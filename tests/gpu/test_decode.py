"""Eight members that decode together, on the device."""

from __future__ import annotations

import pytest
import torch
from helpers.acceptance import Figures
from helpers.decodes import BY_TOKEN, HIDDEN_KEY, MEMBERS, SPECS, adapted, farthest

from pipeline.adapters.members import Member

pytestmark = pytest.mark.gpu
EIGHT = [*MEMBERS, Member(0, 1), Member(0, 2), Member(1)]


def test_members(device: torch.device, figures: Figures) -> None:
    """The average of eight members, step by step, is that of each run by itself over whole sequences, in float32."""
    for name, specs in (("LoRA Dropout", SPECS), ("masks by token", BY_TOKEN), ("HiddenKey", HIDDEN_KEY)):
        apart, _ = farthest(adapted("llama", specs, torch.float32, device), EIGHT)
        figures.within(f"log-probabilities, {name}", apart, 1e-4)
