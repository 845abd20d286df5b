"""One adapted linear under every mix of members: as one function, on the plain path, and dense in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from helpers.families import LORA_DROPOUT, trained_start
from helpers.reference import dense_linear, dense_update
from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.fused import Matrices, Users, adapted_linear
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.method import Site

RANK = Site(position="lora_rank", rate=0.4)
SPECS = (
    AdapterSpec(rank=4, sites=(*LORA_DROPOUT, RANK)), AdapterSpec(rank=4, alpha=7.0),
    AdapterSpec(rank=2, sites=(RANK,)),
)
"""Two adapters in one stack, of other scales, and one of another rank."""
MIXED = (Member(0, 0), Member(None), Member(2, 1), Member(0), Member(1, 0), Member(0, 3), Member(2), Member(1))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of the largest entry: a few roundings of the dtype."""
KEY = MaskKey(0, 0)
SHAPE = (12, 9)
"""Inputs, outputs."""


class Host(nn.Module):
    """One linear."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def hosted(
    dtype: torch.dtype = torch.float32, specs: Sequence[AdapterSpec] = SPECS, shape: tuple[int, int] = SHAPE,
    device: str | torch.device = "cpu", quantized: bool = False,
) -> Adapters:
    """Trained-looking adapters on one linear, which is 4-bit where `quantized`."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(*shape)
    if quantized:
        from bitsandbytes.nn import Linear4bit

        plain, linear = linear, Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
        linear.load_state_dict(plain.state_dict())
        linear.bias.data = linear.bias.data.to(dtype)
    model = Host(linear if quantized else linear.to(dtype)).to(device)
    return trained_start(attach(model, specs, ["linear"], seed=0), size=0.5)


def rows_of(
    members: int, rows: int = 3, tokens: int = 5, dtype: torch.dtype = torch.float32, inputs: int = SHAPE[0]
) -> Tensor:
    """Random inputs (M·B, T, I)."""
    return torch.randn(members * rows, tokens, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)


def results(
    adapters: Adapters, members: Sequence[Member], x: Tensor, fused: bool, positions: Tensor | None = None
) -> dict[str, Tensor]:
    """Output and gradients, by name, of one pass; `fused` or plain. `positions`: of the tokens of a member's rows."""
    (layer,) = adapters.layers.values()
    layer.fused = fused
    leaf = x.to(adapters.device).clone().requires_grad_()
    plan = adapters.plan(members, len(x) // len(members), KEY)
    if positions is not None:
        count = len(members)
        plan = with_row_keys(plan, torch.arange(plan.rows).repeat(count), positions.repeat(count, 1))
    with adapters.axis.active(plan):
        y = adapters.model(leaf)
    return _with_gradients(adapters, leaf, y, x.dtype)


def dense_results(adapters: Adapters, members: Sequence[Member], x: Tensor) -> dict[str, Tensor]:
    """The same in float64 on the CPU, each member's W + ΔW built in full."""
    rows, (layer,) = len(x) // len(members), adapters.layers.values()
    weight, bias = frozen_weight(layer.base), layer.base.bias.cpu()  # type: ignore[union-attr]
    leaf = x.double().requires_grad_()
    masks = {name: mask.cpu() for name, mask in adapters.plan(members, rows, KEY).masks.get("linear", {}).items()}
    trained = {name: p for name, p in adapters.model.named_parameters() if p.requires_grad}
    parts = []
    for m, member in enumerate(members):
        update: Tensor = torch.zeros(weight.shape, dtype=torch.float64)
        if member.adapter is not None:
            bucket, spec = layer.bucket_of(member.adapter), adapters.specs[member.adapter]
            A, B = (p[bucket.slot[member.adapter]].cpu() for p in (bucket.lora_A, bucket.lora_B))  # type: ignore[union-attr, index]
            a, b, r = (None if p not in masks else masks[p][m] for p in ("lora_A", "lora_B", "lora_rank"))
            update = dense_update(A, B, spec.alpha / spec.rank, a, b, None if r is None else r[: len(A)])
        parts.append(dense_linear(leaf[m * rows : (m + 1) * rows], weight, bias, update))
    found = _with_gradients(adapters, leaf, torch.cat(parts), x.dtype)
    assert found.keys() == {"y", "x", *trained}
    return found


def unequal_members(
    dtype: torch.dtype, shape: tuple[int, int] = SHAPE, rank: int = 3, device: str | torch.device = "cpu",
    times: int = 1,
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """(what they are, ours, in float64) of members with other numbers of tokens, and none."""
    torch.manual_seed(0)
    inputs, outputs = shape
    base = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    spans = tuple((times * a, times * b) for a, b in ((0, 4), (4, 8), (8, 8), (8, 11), (13, 20), (20, 20)))
    stack = [torch.randn(2, rank, inputs), torch.randn(2, outputs, rank)]
    tokens = 20 * times
    mixed, alike = (0, 1, 0, 1, 1, 0), (1,) * 6
    for kind, slots, masked, by_token in (
        ("adapters in turn, masked", mixed, True, False), ("one adapter", alike, False, False),
        ("one adapter, masked", alike, True, False), ("adapters in turn, masked and by token", mixed, True, True),
        ("one adapter, by token", alike, False, True), ("one adapter, masked and by token", alike, True, True),
    ):
        masks = [torch.rand(6, n).gt(0.4) * 2.0 if masked else None for n in (inputs, outputs, rank + 1)]
        scale = (0.5, 2.0, 1.0, 1.0, 3.0, 1.0) if masked else (0.5,) * 6
        x, direction = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
        leaves = [p.to(device).clone().requires_grad_() for p in (x, *stack)]
        masks += [torch.rand(tokens, n).lt(0.3) if by_token else None for n in (inputs, rank)]
        on_device = [None if mask is None else mask.to(device) for mask in masks]
        stacked = Users(slots, spans, scale, *on_device[:3]).stacked(rank, leaves[1])
        y = adapted_linear(leaves[0], base.to(device), [(stacked, Matrices(leaves[1], leaves[2], *on_device[3:]))])
        ours = dict(zip("yxAB", (y, *torch.autograd.grad(y, leaves, direction.to(device))), strict=True))
        exact = [p.double().requires_grad_() for p in (x, *stack)]
        weight, bias = base.weight.cpu(), base.bias.cpu()
        parts, at = [], 0
        for m, (start, stop) in enumerate(spans):
            parts.append(dense_linear(exact[0][at:start], weight, bias, torch.zeros(outputs, inputs)))
            A, B = exact[1][slots[m]], exact[2][slots[m]]
            a, b, r = (None if mask is None else mask[m] for mask in masks[:3])
            own, r = exact[0][start:stop], None if r is None else r[:rank]
            parts.append(dense_linear(own, weight, bias, dense_update(A, B, scale[m], a, b, r)))
            if by_token:  # y = x Wᵀ + bias + s (t ∘ (k ∘ x) (A diag(a))ᵀ) (diag(b) B diag(r))ᵀ
                keeps = (1.0 - mask[start:stop].double() for mask in masks[3:])
                k, t = keeps
                one = torch.ones((), dtype=torch.float64)
                a, b, r = (one if mask is None else mask.double() for mask in (a, b, r))
                hidden = t * ((k * own) @ (A * a).T)
                parts[-1] = own @ weight.double().T + bias.double() + scale[m] * hidden @ (B * b.view(-1, 1) * r).T
            at = stop
        theirs = torch.cat(parts)
        wanted = (theirs, *torch.autograd.grad(theirs, exact, direction.double()))
        yield kind, ours, dict(zip("yxAB", wanted, strict=True))


def frozen_weight(base: nn.Module) -> Tensor:
    """W (O, I) of a plain or a 4-bit linear, on the CPU."""
    weight = base.weight
    if type(base).__name__ == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().cpu()  # type: ignore[union-attr, return-value]


def _with_gradients(adapters: Adapters, leaf: Tensor, y: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    trained = {name: p for name, p in adapters.model.named_parameters() if p.requires_grad}
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(y)
    found = torch.autograd.grad(y, [leaf, *trained.values()], direction, allow_unused=True)
    zeros = {name: torch.zeros_like(p) for name, p in trained.items()}
    named = zip(("x", *trained), found, strict=True)
    return {"y": y.detach(), **{name: zeros[name] if g is None else g for name, g in named}}
