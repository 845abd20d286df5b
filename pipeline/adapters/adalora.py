"""AdaLoRA's matrices on the member axis (arXiv 2303.10512), with LoRA Dropout's masks (arXiv 2404.09610, eq. 4-6).

P is PEFT's lora_B, Λ its lora_E, Q its lora_A. Shapes as in `linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.adapters.bucket import Bucket
from pipeline.adapters.linear import low_rank_update, pick

DEVIATION = 0.02
"""Of the entries of P and Q at a fresh start (PEFT's and the authors' choice)."""


class SvdBucket(Bucket):
    """AdaLoRA adapters of equal rank R in one layer, stacked: Q = lora_A (K, R, I), Λ = lora_E (K, R), P = lora_B.

    ΔW = s · diag(m_P) P diag(Λ) Q diag(m_Q): rows of P and columns of Q are dropped, Λ never is. Pruned triplets have
    Λ = 0. P, Q ~ N(0, 0.02²) and Λ = 0 at a fresh start: attaching is the identity.
    """

    names = ("lora_A", "lora_B", "lora_E")

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_E: nn.Parameter

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one adapter."""
        return {"lora_A": (self.rank, self.inputs), "lora_B": (self.outputs, self.rank), "lora_E": (self.rank,)}

    def start(self, place: int, generator: torch.Generator) -> None:
        """Q, then P ~ N(0, 0.02²); Λ = 0."""
        with torch.no_grad():
            self.lora_E[place].zero_()
            for matrix in (self.lora_A[place], self.lora_B[place]):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * DEVIATION)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Λ Q (K, R, I) and P (K, O, R)."""
        return self.lora_A * self.lora_E.unsqueeze(2), self.lora_B

    def forward(
        self, x_MNI: Tensor, adapters: Sequence[int], masks: dict[str, Tensor | None], means: Sequence[float]
    ) -> Tensor:
        """Updates of the members in `adapters`, (M, N, O). Arguments as `RankBucket.forward`."""
        slots = [self.slot[adapter] for adapter in adapters]
        A, B = (pick(matrix, slots) for matrix in self.matrices())
        scale = [self.scalings[slot] * mean for slot, mean in zip(slots, means, strict=True)]
        return low_rank_update(x_MNI, A, B, masks, scale)


def orthogonality(buckets: Sequence[SvdBucket]) -> Tensor:
    """Mean over all P and Q of ||PᵀP - I||_F and ||QQᵀ - I||_F.

    As the authors' code and PEFT have it, so that published weights carry over: the paper's section 3.1 writes the sum
    of the squared norms.
    """
    norms = []
    for bucket in buckets:
        identity = torch.eye(bucket.rank, dtype=bucket.lora_A.dtype, device=bucket.lora_A.device)
        A_KRI, B_KOR = bucket.lora_A, bucket.lora_B
        for gram_KRR in (A_KRI @ A_KRI.transpose(1, 2), B_KOR.transpose(1, 2) @ B_KOR):
            norms.append(torch.linalg.matrix_norm(gram_KRR - identity))
    return torch.cat(norms).mean()
