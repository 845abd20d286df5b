"""DropLoRA (entries of A x, token by token) and rank dropout (ranks, for a whole draw) against float64 and statistics.

    element:  y = x Wᵀ + s (t ∘ x Aᵀ) Bᵀ,   t (tokens, R)        column:  y = x Wᵀ + s x Aᵀ diag(r) Bᵀ,   r (R,)
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.families import adapted_llama, examples
from helpers.reference import phi_z, reference_bits, reference_key, z_score
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.layout import replicate_layout
from pipeline.adapters.members import MaskKey, Member, MemberAxisError
from pipeline.adapters.peft_format import StoredAdapter, in_inverse_convention
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import RunConfig
from pipeline.config.evaluate import ExportConfig
from pipeline.config.method import Site
from pipeline.data.splits import Splits
from pipeline.errors import RunFolderError
from pipeline.export.order import Exported, Order
from pipeline.export.peft import plan_adapter, plan_draws
from pipeline.loss.objective import SupervisedLM
from pipeline.training.batch import lay_out

KEY = MaskKey(7, 3)
TOKENS = 5


def rank_site(pattern: str = "element", rate: float = 0.4, compensation: str = "inverse") -> Site:
    return Site(position="lora_rank", pattern=pattern, rate=rate, compensation=compensation)  # type: ignore[arg-type]


class One(nn.Module):
    """A model of one linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def one_layer(*specs: AdapterSpec, width: int = 6) -> Adapters:
    torch.manual_seed(0)
    adapters = attach(One(width), specs, ["linear"], seed=0)
    for parameter in adapters.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return adapters


def plan_of(adapters: Adapters, members: list[Member], ids: list[int], tokens: int, key: MaskKey = KEY) -> object:
    """Every member on the same rows."""
    position = torch.arange(tokens).repeat(len(ids) * len(members), 1)
    return with_row_keys(adapters.plan(members, len(ids), key), torch.tensor(ids).repeat(len(members)), position)


def token_mask(site: Site, draw: int, example: int, rank: int, tokens: int = TOKENS) -> Tensor:
    """(tokens, R) of one row, from plain integers."""
    seed, layer = reference_key(KEY.seed, KEY.phase, "activation"), reference_key("linear", "lora_rank")
    kept = 1.0 / (1.0 - site.rate) if site.compensation == "inverse" else 1.0
    limit = round(site.rate * 2**32) - 2**31
    bits = [[reference_bits(seed, layer, draw, example, t, r) for r in range(rank)] for t in range(tokens)]
    return torch.tensor([[0.0 if b < limit else kept for b in row] for row in bits], dtype=torch.float64)


@pytest.mark.parametrize("compensation", ["inverse", "none"])
def test_droplora_equals_the_dense_reference(compensation: str) -> None:
    """Adapters of equal and of other rank and method in one pass; forward and gradients; mean field and base beside."""
    site = rank_site(compensation=compensation)
    specs = (
        AdapterSpec(rank=3, alpha=6.0, sites=(site,)),
        AdapterSpec(rank=3, alpha=3.0, sites=(rank_site("column"),)),
        AdapterSpec(rank=2, alpha=6.0, sites=(site, Site(position="lora_B", rate=0.5))),
    )
    adapters, ids = one_layer(*specs), [11, 2**40 + 5]
    members = [Member(0, 0), Member(1, 0), Member(0), Member(None), Member(2, 1), Member(0, 2), Member(1)]
    plan = plan_of(adapters, members, ids, TOKENS)
    x = torch.randn(14, TOKENS, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    with adapters.axis.active(plan):  # type: ignore[arg-type]
        ours = adapters.model(x)
    layer = adapters.layers["linear"]
    matrices = {k: [p[b.slot[k]] for p in (b.lora_A, b.lora_B)] for b in layer.buckets for k in b.slot}
    masks = plan.masks["linear"]  # type: ignore[attr-defined]
    parts = []
    for m, member in enumerate(members):
        for row, example in enumerate(ids):
            inputs = x[2 * m + row].double()
            y = inputs @ layer.base.weight.double().T + layer.base.bias.double()
            if member.adapter is not None:
                k = member.adapter
                A, B = (matrix.double() for matrix in matrices[k])
                hidden, scaling = inputs @ A.T, (2.0, 1.0, 3.0)[k]
                if member.draw is None:
                    scaling *= 0.6 if compensation == "none" and k == 0 else 1.0
                elif k == 1:
                    hidden = hidden * masks["lora_rank"][m, :3].double()
                else:
                    hidden = hidden * token_mask(site, member.draw, example, len(A))
                    B = B * masks["lora_B"][m].double().unsqueeze(1)
                y = y + scaling * hidden @ B.T
            parts.append(y)
    theirs = torch.stack(parts)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    leaves = [x, *(p for p in adapters.model.parameters() if p.requires_grad)]
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction.double()),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


def dropped_by(pattern: str, rate: float, draws: int = 4, rows: int = 12, tokens: int = 32, rank: int = 16) -> Tensor:
    """bool (draws, rows, tokens, R), read off the output of a layer in which A, B are the identity and W is 0."""
    adapters = one_layer(AdapterSpec(rank=rank, alpha=rank, sites=(rank_site(pattern, rate),)), width=rank)
    layer = adapters.layers["linear"]
    with torch.no_grad():
        for parameter in (layer.base.weight, layer.base.bias):
            parameter.zero_()
        for parameter in (layer.buckets[0].lora_A[0], layer.buckets[0].lora_B[0]):
            parameter.copy_(torch.eye(rank))
        plan = plan_of(adapters, [Member(0, draw) for draw in range(draws)], list(range(rows)), tokens)
        with adapters.axis.active(plan):  # type: ignore[arg-type]
            out = adapters.model(torch.ones(draws * rows, tokens, rank))
    assert set(out.unique().tolist()) <= {0.0, float(torch.tensor(1.0 / (1.0 - rate)))}
    return (out == 0).view(draws, rows, tokens, rank)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_token_has_a_mask_of_its_own_and_the_rate_is_the_rate(rate: float) -> None:
    """In all, by draw, row, token and rank, within 5 standard deviations; no two axes know of each other."""
    dropped = dropped_by("element", rate)
    for kept in ((), (0,), (1,), (2,), (3,)):
        counts = dropped.double().sum([axis for axis in range(4) if axis not in kept]).flatten()
        assert max(abs(z_score(float(c), dropped.numel() / len(counts), rate)) for c in counts) < 5
    pairs = [(dropped.narrow(axis, 0, dropped.shape[axis] - 1), dropped.narrow(axis, 1, dropped.shape[axis] - 1))
             for axis in range(4)]  # fmt: skip
    assert max(abs(phi_z(*pair)) for pair in pairs) < 5


def test_rank_dropout_is_the_same_for_all_tokens_of_a_draw() -> None:
    dropped = dropped_by("column", 0.5)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert len({mask.numpy().tobytes() for mask in dropped[:, 0, 0]}) == 4


@pytest.mark.parametrize("compensation", ["inverse", "none"])
def test_the_mean_over_draws_is_the_mean_field_read_out(compensation: str) -> None:
    """Var[y_o] = p/(1-p) Σ_r c_or², c_or = s B_or (A x)_r (times (1-p)² without rescale)."""
    site, rate, draws = rank_site(compensation=compensation), 0.4, 2000
    adapters = one_layer(AdapterSpec(rank=4, alpha=4.0, sites=(site,)))
    bucket = adapters.layers["linear"].buckets[0]
    x = torch.randn(6, generator=torch.Generator().manual_seed(2))
    members = [Member(0), *(Member(0, draw) for draw in range(draws))]
    with torch.no_grad(), adapters.axis.active(plan_of(adapters, members, [0], 1)):  # type: ignore[arg-type]
        y = adapters.model(x.expand(draws + 1, 1, 6)).double()[:, 0]
    terms = bucket.lora_B[0].double() * (bucket.lora_A[0].double() @ x.double())
    spread = (rate / (1 - rate) * terms.square().sum(1)).sqrt() * (1.0 if compensation == "inverse" else 1 - rate)
    error = (y[1:].mean(0) - y[0]) / (spread.detach() / draws**0.5)
    assert float(error.abs().max()) < 5
    assert float((y[1:].std(0) / spread.detach() - 1).abs().max()) < 0.15


def test_a_mask_free_read_out_is_a_plain_lora_and_a_draw_is_none() -> None:
    """Rescale `none` is stored as `inverse` with alpha × (1-rate); draws cannot be asked for."""
    spec = AdapterSpec(rank=4, alpha=8.0, sites=(rank_site(rate=0.25, compensation="none"),))
    stored = in_inverse_convention(spec, ["x"], 1)
    assert stored.alpha == 6.0 and stored.sites == (rank_site(rate=0.25),)
    adapter = StoredAdapter(stored, {}, "", None)
    assert plan_adapter(ordered(adapter)) == [Exported("adapter", Member(0))] and not plan_draws(ordered(adapter))
    with pytest.raises(RunFolderError, match="lora_rank per token is no plain LoRA"):
        plan_draws(ordered(adapter, draws=2))
    columns = replace(adapter, spec=replace(stored, sites=(rank_site("column"),)))
    assert [one.member for one in plan_draws(ordered(columns, draws=2))] == [Member(0, 0), Member(0, 1)]


def ordered(adapter: StoredAdapter, draws: int | None = None) -> Order:
    config = RunConfig(export=ExportConfig(draws=draws))
    return Order(config, Splits([], [], [], [], ""), adapter, adapter, {}, "causal", False)


def test_masks_are_recomputed_under_checkpointing_and_need_row_keys() -> None:
    """Loss and gradients bit for bit."""
    found = []
    for checkpointing in (False, True):
        adapters = adapted_llama(AdapterSpec(rank=4, sites=(rank_site(),)))
        assert adapters.needs_row_keys()
        adapters.model.train()
        if checkpointing:
            adapters.model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        built = lay_out(adapters, examples([7, 4, 9]), replicate_layout(3, 2), 2, KEY)
        with adapters.axis.active(built.plan):
            loss = SupervisedLM(adapters.model)(**built.tensors, row_weights=built.weights)
            parameters = [p for p in adapters.model.parameters() if p.requires_grad]
            found.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with adapters.axis.active(adapters.plan([Member(0, 1)], 1, KEY)), pytest.raises(MemberAxisError, match="row keys"):
        adapters.model(input_ids=torch.ones(1, 4, dtype=torch.int64))
