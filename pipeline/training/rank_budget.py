"""Which triplets of an AdaLoRA adapter are kept while it is trained (arXiv 2303.10512, section 3.2, eq. 7-11).

Element w of P, Λ, Q with gradient g, after step t:
    I = |w · g|     Ī ← β₁ Ī + (1-β₁) I     U ← β₂ U + (1-β₂) |I - Ī|     s = Ī · U
Triplet i of a layer: S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij). The b(t) triplets of largest S over all layers
keep their λ; the others' is set to 0. Until the ranks are settled the optimizer may raise such a λ again.

As in PEFT w is the weight after the step, and g the gradient that made it: of the whole loss with its orthogonality
term, averaged over the global batch, clipped. A factor common to all gradients (a loss scale) would not change which
triplets are kept; clipping does, because it weighs steps against one another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.adapters.adalora import SvdBucket, orthogonality
from pipeline.adapters.linear import LoRALinear
from pipeline.adapters.spec import RankSchedule
from pipeline.distributed import zero


class RankBudget:
    """The importance of every triplet and who is kept. With an adapter that has none, every method does nothing.

    Costs up to three fp32 copies of the adapter in every process, until the ranks are settled; deterministic, so that
    all processes choose the same.
    """

    def __init__(self, layers: Mapping[str, LoRALinear], schedule: RankSchedule | None, max_norm: float) -> None:
        """
        Args:
            layers: the adapted layers, with one adapter each.
            schedule: None = no AdaLoRA.
            max_norm: the global norm at which the optimizer clips gradients.
        """
        self.schedule, self.max_norm = schedule, max_norm
        found = {name: bucket for name, layer in layers.items() for bucket in layer.buckets}
        self.buckets = {name: bucket for name, bucket in found.items() if isinstance(bucket, SvdBucket)}
        self.parameters: dict[str, nn.Parameter] = {
            f"{name}.{part}": getattr(bucket, part) for name, bucket in self.buckets.items() for part in bucket.names
        }
        self.gradients: dict[str, Tensor] = {}
        self.sensitivity: dict[str, Tensor] = {}
        """Ī of every parameter."""
        self.uncertainty: dict[str, Tensor] = {}
        """U of every parameter."""
        self.kept: dict[str, Tensor] = {}
        """layer -> (1, R) bool: the last choice."""
        self.distance = torch.zeros(())
        """The last orthogonality term, unweighted."""

    def penalty(self) -> Tensor | float:
        """The weighted orthogonality term of the loss; 0 where there is none."""
        if self.schedule is None or self.schedule.orthogonality == 0.0:
            return 0.0
        term = orthogonality(list(self.buckets.values()))
        self.distance = term.detach()
        return self.schedule.orthogonality * term

    def observe(self, step: int) -> None:
        """Keep the whole gradients that optimizer step `step` (1 = the first) is about to use. A collective."""
        if self.schedule is not None and step < self.schedule.settled:
            for name, parameter in self.parameters.items():
                gradient = zero.full_gradient(parameter)
                self.gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.float().clone()

    def apply(self, step: int, norm: float) -> None:
        """After optimizer step `step`: take its gradients into account, choose where it is time, and prune.

        Args:
            norm: global norm of the gradients before clipping.
        """
        if self.schedule is None:
            return
        if self.gradients:
            self._weigh(self.schedule, min(1.0, self.max_norm / (norm + 1e-6)))
        if self.schedule.prunes(step):
            self.kept = self._chosen(self.schedule.budget(step, len(self.buckets)))
        if self.schedule.prunes(step) or step >= self.schedule.settled:
            for name, kept in self.kept.items():
                parameter = self.buckets[name].lora_E
                zero.set_full_fp32(parameter, parameter.detach().masked_fill(~kept, 0.0))
        if step >= self.schedule.settled:
            self.sensitivity, self.uncertainty = {}, {}

    def supersedes(self, step: int, best: int) -> bool:
        """Whether a validation at `step` replaces the best one, at step `best`, whatever the scores are.

        Before the ranks are settled an adapter spends more than its budget: it does not compete with those after.
        """
        return self.schedule is not None and best < self.schedule.settled <= step

    def settles_after(self, step: int) -> bool:
        """Whether ranks are still to be settled after `step`."""
        return self.schedule is not None and step < self.schedule.settled

    def progress(self) -> dict[str, float]:
        """For the metrics: triplets kept, and how far P and Q are from orthogonal."""
        if self.schedule is None:
            return {}
        every = self.schedule.initial_rank * len(self.buckets)
        kept = sum(int(kept.sum()) for kept in self.kept.values()) if self.kept else every
        return {"triplets": kept, "orthogonality": float(self.distance)}

    def describe(self) -> list[str]:
        """For people, before the first step."""
        if (plan := self.schedule) is None:
            return []
        layers = len(self.buckets)
        return [
            f"rank budget  {plan.initial_rank} -> {plan.target_rank} on average ({plan.budget(0, layers):,} ->"
            f" {plan.budget(plan.total, layers):,} triplets), pruned in steps {plan.warmup + 1} to {plan.settled}"
        ]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the parameters, on the CPU."""
        parts = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}
        return {f"{part}/{name}": value.cpu() for part, values in parts.items() for name, value in values.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state`."""
        for key, value in state.items():
            part, _, name = key.partition("/")
            owner = self.buckets[name].lora_E if part == "kept" else self.parameters[name]
            getattr(self, part)[name] = value.to(owner.device)

    def _weigh(self, plan: RankSchedule, clipping: float) -> None:
        for name, parameter in self.parameters.items():
            importance = (parameter.detach() * (self.gradients[name] * clipping)).abs()
            before = torch.zeros_like(importance)
            average = plan.beta1 * self.sensitivity.get(name, before) + (1 - plan.beta1) * importance
            spread = (importance - average).abs()
            self.sensitivity[name] = average
            self.uncertainty[name] = plan.beta2 * self.uncertainty.get(name, before) + (1 - plan.beta2) * spread
        self.gradients = {}

    def _chosen(self, budget: int) -> dict[str, Tensor]:
        """layer -> (1, R) bool: the `budget` triplets of largest score over all layers (fewer where scores tie)."""
        scores = {name: self._scores(name) for name in self.buckets}
        flat = torch.cat([score.flatten() for score in scores.values()])
        pruned = len(flat) - budget
        if pruned == 0:
            return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
        threshold = torch.kthvalue(flat, pruned).values
        return {name: score > threshold for name, score in scores.items()}

    def _scores(self, layer: str) -> Tensor:
        """S, (1, R)."""
        A, B, E = (
            self.sensitivity[f"{layer}.{part}"] * self.uncertainty[f"{layer}.{part}"] for part in SvdBucket.names
        )
        return E + (A.mean(dim=2) + B.mean(dim=1))
