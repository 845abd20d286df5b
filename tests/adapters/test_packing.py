"""Weight masks do not care how rows are packed: a packed row is one row, under the draw its examples have alone."""

from __future__ import annotations

import torch
from helpers.families import adapted_llama
from torch import Tensor

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site

SITES = tuple(Site.model_validate({"position": p, "rate": 0.4}) for p in ("lora_A", "lora_B", "lora_rank"))
LENGTHS = (5, 7, 3)


def block_causal() -> Tensor:
    """(1, 1, T, T) True where a query may look: within its own example, not ahead."""
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    return (causal & (owner[:, None] == owner[None, :]))[None, None]


def last_hidden(adapters: Adapters, ids: Tensor, mask: Tensor | None, positions: Tensor, draw: int) -> Tensor:
    plan = adapters.plan([Member(0, draw)], len(ids), MaskKey(3, 11))
    with adapters.axis.active(plan):
        return adapters.model.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state


def gradients(adapters: Adapters, hidden: Tensor) -> dict[str, Tensor]:
    adapters.model.zero_grad()
    direction = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * direction).sum().backward()
    return {name: p.grad.clone() for name, p in adapters.model.named_parameters() if p.requires_grad}


def test_packed_rows_equal_rows_of_their_own_under_one_draw() -> None:
    adapters = adapted_llama(AdapterSpec(rank=4, sites=SITES), layers=2)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 30, (1, n), generator=generator) for n in LENGTHS]
    positions = [torch.arange(n)[None] for n in LENGTHS]
    for draw in range(3):
        single = [last_hidden(adapters, r, None, p, draw) for r, p in zip(rows, positions, strict=True)]
        alone = torch.cat(single, dim=1)
        packed = last_hidden(adapters, torch.cat(rows, 1), block_causal(), torch.cat(positions, 1), draw)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
        expected, found = gradients(adapters, alone), gradients(adapters, packed)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
        other = last_hidden(adapters, torch.cat(rows, 1), block_causal(), torch.cat(positions, 1), draw + 1)
        assert not torch.allclose(other, packed, atol=1e-3)  # the draw matters
