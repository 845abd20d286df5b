"""Members that decode together, and the same members run one by one over whole sequences, without a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.families import LORA_DROPOUT, trained_start
from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site
from pipeline.data.collate import example_keys
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.prediction.decode import Decoder, Decoding, TokenSpace
from pipeline.support.tiny import tiny_decoder

KEY = MaskKey(7, "test")
MEMBERS = [Member(None), Member(0), Member(0, 0), Member(1), Member(0, 3)]
SPECS = (AdapterSpec(rank=4, alpha=8.0, sites=LORA_DROPOUT), AdapterSpec(rank=2, alpha=8.0))
BY_TOKEN = (AdapterSpec(rank=4, alpha=8.0, sites=(Site(position="lora_input", rate=0.4),)), SPECS[1])
HIDDEN_KEY = (
    AdapterSpec(rank=4, alpha=8.0, sites=(
        Site(position="attention_logits", pattern="column", rate=0.4), Site(position="ffn_hidden", rate=0.3),
    )), SPECS[1],
)  # fmt: skip
MEAN_FIELD = [Member(None), Member(0), Member(1)]
PROMPTS = [[5, 9, 3, 8], [11, 4], [7, 7, 30, 12, 13, 50, 6]]
CHOSEN = [[20, 3], [6, 40], [9, 9]]
"""Tokens that each row goes on with."""


FAMILIES = ("llama", "qwen3", "gpt2", "mistral", "gemma2", "mixtral")
SINGLE = ("gemma2", "mixtral")
"""Families that transformers does not run in float64: padding becomes NaN, or there is no kernel."""


def adapted(
    family: str = "llama", specs: tuple[AdapterSpec, ...] = SPECS, dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
) -> Adapters:
    """In `dtype`, float32 where the family has no other."""
    targets = "all-linear" if family != "mixtral" else ["q_proj", "v_proj"]
    model = tiny_decoder(family).to(device)
    return trained_start(attach(model if family in SINGLE else model.to(dtype), list(specs), targets, seed=0))


def prompts(ids: Sequence[Sequence[int]] = PROMPTS) -> list[Encoded]:
    return [Encoded(f"row-{n}", tuple(one), (IGNORE_INDEX,) * len(one)) for n, one in enumerate(ids)]


def one_by_one(
    adapters: Adapters, row: int, ids: Sequence[int], space: TokenSpace = "probability",
    members: Sequence[Member] = MEMBERS,
) -> Tensor:
    """(V,): every member in a pass of its own over one whole sequence, no padding, no cache; then the mean."""
    tokens, positions = (torch.tensor([one], device=adapters.device) for one in (list(ids), list(range(len(ids)))))
    logs = []
    for member in members:
        keys = example_keys([f"row-{row}"]).to(adapters.device)
        plan = with_row_keys(adapters.plan([member], 1, KEY), keys, positions)
        with adapters.axis.active(plan), torch.no_grad():
            logits = adapters.model(input_ids=tokens, position_ids=positions, use_cache=False).logits[0, -1]
        logs.append(logits.log_softmax(-1))
    stack = torch.stack(logs)
    if space == "logit":
        return stack.mean(0).log_softmax(-1)
    return stack.exp().mean(0).log()


def farthest(
    adapters: Adapters, members: Sequence[Member] = MEMBERS, space: TokenSpace = "probability"
) -> tuple[float, Decoding]:
    """How far a log-probability of three steps is from that of members run one by one, and the decoding."""
    state, worst = Decoder(adapters, members, KEY, 2, space).prefill(prompts()), 0.0
    for taken in range(3):
        if taken:
            state.step(torch.tensor([one[taken - 1] for one in CHOSEN]))
        for row, (prompt, more) in enumerate(zip(PROMPTS, CHOSEN, strict=True)):
            wanted = one_by_one(adapters, row, [*prompt, *more[:taken]], space, members)
            apart = float((state.log_probs[row] - wanted).abs().max())
            worst = max(worst, apart) if apart == apart else float("inf")
    return worst, state
