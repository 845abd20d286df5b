"""The mathematics again, written from the equations alone: dense, float64, slow. Nothing here imports the package.

LoRA Dropout (arXiv 2404.09610, eq. 2-3), the update of member m in one linear layer:

    ΔW_m = s · diag(b_m) B diag(r_m) A diag(a_m)        A (R, I), B (O, R), a (I,), b (O,), r (R,)
    y_m  = x_m (W + ΔW_m)ᵀ + bias
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Updates = Mapping[str, Tensor]
"""layer name -> ΔW (O, I), float64."""


def dense_update(
    A: Tensor, B: Tensor, scaling: float, a: Tensor | None = None, b: Tensor | None = None, r: Tensor | None = None
) -> Tensor:
    """ΔW (O, I) in float64, every diagonal matrix built in full."""
    A, B = A.double(), B.double()
    for_rank = torch.eye(len(A), dtype=torch.float64) if r is None else torch.diag(r.double())
    update = B @ for_rank @ A
    if a is not None:
        update = update @ torch.diag(a.double())
    if b is not None:
        update = torch.diag(b.double()) @ update
    return scaling * update


def dense_linear(x: Tensor, W: Tensor, bias: Tensor | None, update: Tensor) -> Tensor:
    """x (W + ΔW)ᵀ + bias in float64; W (O, I)."""
    y = x.double() @ (W.double() + update).T
    return y if bias is None else y + bias.double()


def dense_model(model: nn.Module, updates: Updates, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Logits of a stock float64 model whose linears hold W + ΔW; gradients flow into the updates."""
    weights = {}
    for name, update in updates.items():
        layer = model.get_submodule(name)
        transposed = type(layer).__name__ == "Conv1D"
        weights[f"{name}.weight"] = layer.weight + (update.T if transposed else update)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    return functional_call(model, weights, kwargs=inputs).logits


def dense_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Σ -log p(label) over supervised positions, in nats; labels unshifted, -100 = unsupervised. One number per row."""
    log_probs = logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = log_probs.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -(picked * (targets != -100)).sum(-1)


def splitmix64(state: int, count: int) -> list[int]:
    """The first `count` outputs of Vigna's splitmix64 from `state`, in plain integers."""
    limit = 2**64
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % limit
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % limit
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % limit
        out.append(z ^ (z >> 31))
    return out


def reference_uniforms(key: int, size: int) -> list[float]:
    """Each 64-bit word gives two numbers, its low half first."""
    words = splitmix64(key, (size + 1) // 2)
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    return [half / 2**32 for half in halves[:size]]


def reference_key(*parts: object) -> int:
    """BLAKE2b-64, little-endian, of `type:value` joined by the unit separator."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def reference_mask(key_parts: Sequence[object], size: int, rate: float, kept: float) -> Tensor:
    """The weight mask that a key stands for: 0 where the uniform is below the rate, else `kept`."""
    return torch.tensor([0.0 if u < rate else kept for u in reference_uniforms(reference_key(*key_parts), size)])


def lowbias32(x: int) -> int:
    """C. Wellons' 32-bit mixer, in plain integers."""
    limit = 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % limit
    x = (x ^ (x >> 15)) * 0x846CA68B % limit
    return x ^ (x >> 16)


def reference_bits(seed: int, layer_key: int, branch: int, example: int, position: int, feature: int) -> int:
    """The 32 hashed bits of one activation entry, as a signed integer."""
    limit = 2**32
    key = reference_key(seed, layer_key)
    row = lowbias32((example % limit) ^ (key % limit))
    row = lowbias32(row ^ ((example >> 32) * 0x85EBCA6B % limit) ^ (key >> 32))
    row = lowbias32((row + branch * 0xC2B2AE35) % limit)
    token = lowbias32(row ^ lowbias32((position * 0x27D4EB2F + 0x165667) % limit))
    bits = lowbias32(token ^ lowbias32((feature * 0x9E3779B1 + 0x51ED27) % limit))
    return bits - limit if bits >= limit // 2 else bits


def z_score(successes: float, trials: float, probability: float) -> float:
    """Standardized binomial count."""
    return (successes - trials * probability) / (trials * probability * (1.0 - probability)) ** 0.5


def phi_z(x: Tensor, y: Tensor) -> float:
    """√n times the correlation of two 0/1 samples: standard normal where they are independent."""
    x, y = x.double().flatten(), y.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt() * len(x) ** 0.5)
