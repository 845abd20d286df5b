"""The adapted linear layer: any base linear plus K stacked adapters, evaluated for M members at once.

Shapes: M members, B rows per member, T tokens, I inputs, O outputs, R rank, K adapters of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from pipeline.adapters.bucket import Bucket
from pipeline.adapters.fused import Matrices, Stack, Users, adapted_linear, fuses
from pipeline.adapters.masks import dropped_hidden, element_mask
from pipeline.adapters.members import Member, MemberAxis, MemberPlan, as_index, kept_index, same_for_all
from pipeline.config.method import Site

PER_TOKEN = "lora_rank, per token"
"""Key, among a layer's masks, of the one on A x: `lora_rank` with the pattern `element`."""


class RankBucket(Bucket):
    """Adapters of equal rank R in one layer, stacked: lora_A (K, R, I), lora_B (K, O, R).

    A starts as kaiming-uniform with a = sqrt(5) (PEFT's choice), B as zero: attaching is the identity.
    """

    names = ("lora_A", "lora_B")
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of one adapter."""
        return {"lora_A": (self.rank, self.inputs), "lora_B": (self.outputs, self.rank)}

    def start(self, place: int, generator: torch.Generator) -> None:
        """A ~ U(-1/sqrt(I), 1/sqrt(I)), B = 0."""
        bound = 1.0 / math.sqrt(self.inputs)
        with torch.no_grad():
            self.lora_B[place].zero_()
            self.lora_A[place].copy_(torch.rand(self.rank, self.inputs, generator=generator) * (2 * bound) - bound)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A (K, R, I) and B (K, O, R)."""
        return self.lora_A, self.lora_B

    def forward(
        self, x_MNI: Tensor, adapters: Sequence[int], masks: dict[str, Tensor | None], means: Sequence[float]
    ) -> Tensor:
        """Updates of the members in `adapters`: s·(t ∘ x (A diag(a))ᵀ diag(r)) (diag(b) B)ᵀ, (M, N, O).

        Args:
            x_MNI: inputs, member-major, N = B·T tokens per member.
            adapters: adapter index of each member.
            masks: `lora_A` (M, I), `lora_B` (M, O), `lora_rank` (M, R), and `PER_TOKEN` (M, N, R) on A x; None =
                nothing dropped.
            means: per member, the mean-field factor of a member without a draw, else 1.
        """
        slots = [self.slot[adapter] for adapter in adapters]
        scale = [self.scalings[slot] * mean for slot, mean in zip(slots, means, strict=True)]
        return low_rank_update(x_MNI, pick(self.lora_A, slots), pick(self.lora_B, slots), masks, scale)


def pick(parameter_K: Tensor, slots: Sequence[int]) -> Tensor:
    """The members' slices of a stacked parameter, (M, …); (1, …), uncopied, where one adapter serves all."""
    if same_for_all(slots):
        return parameter_K[slots[0]].unsqueeze(0)
    return parameter_K.index_select(0, as_index(slots, parameter_K.device))


def low_rank_update(
    x_MNI: Tensor, A: Tensor, B: Tensor, masks: dict[str, Tensor | None], scale: Sequence[float]
) -> Tensor:
    """s·(t ∘ x (A diag(a))ᵀ diag(r)) (diag(b) B)ᵀ of every member, (M, N, O).

    Args:
        A: (M, R, I), or (1, R, I) where all members share it.
        B: (M, O, R), or (1, O, R).
        masks: as `RankBucket.forward`.
        scale: s of each member.
    """
    if (mask_MI := masks.get("lora_A")) is not None:
        A = A * mask_MI.unsqueeze(1)
    if (mask_MO := masks.get("lora_B")) is not None:
        B = B * mask_MO.unsqueeze(2)
    if (mask_MR := masks.get("lora_rank")) is not None:
        B = B * mask_MR[:, : A.shape[1]].unsqueeze(1)  # members of other buckets may be wider
    same = same_for_all(scale)
    B = B * (scale[0] if same else torch.tensor(scale, dtype=B.dtype, device=B.device).view(-1, 1, 1))
    A, B = A.to(x_MNI.dtype), B.to(x_MNI.dtype)
    shared = A.shape[0] == 1
    hidden_MNR = x_MNI @ A[0].T if shared else torch.bmm(x_MNI, A.transpose(1, 2))
    if (mask_MNR := masks.get(PER_TOKEN)) is not None:
        hidden_MNR = (hidden_MNR * mask_MNR).to(x_MNI.dtype)
    return hidden_MNR @ _per_member(B) if shared else torch.bmm(
        hidden_MNR, B.expand(len(scale), -1, -1).transpose(1, 2)
    )


def _per_member(B: Tensor) -> Tensor:
    return B[0].T if B.shape[0] == 1 else B.transpose(1, 2)


class LoRALinear(nn.Module):
    """y_m = base(x_m) + s·(x_m (A diag(a_m))ᵀ)(diag(b_m) B)ᵀ   (arXiv 2404.09610, eq. 2-3; rank never dropped).

    Wraps any linear module (plain, bitsandbytes 4-bit or 8-bit, transposed Conv1D) without touching it. The base
    stays in training mode always: on CPUs with AVX512-BF16 an eval-mode forward of a 4-bit layer repacks the
    weight, after which training forwards silently pass no gradient to their input.
    """

    def __init__(self, base: nn.Module, name: str, axis: MemberAxis) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.buckets = nn.ModuleList()
        """One for each kind and rank."""
        self._axis = axis
        self.input_sites: dict[int, tuple[Site, int]] = {}
        """adapter -> (`lora_input` site, key of this layer)."""
        self.rank_sites: dict[int, tuple[Site, int]] = {}
        """adapter -> (`lora_rank` site of the pattern `element`, key of this layer)."""
        self.mean_factors: dict[int | None, float] = {}
        """adapter -> factor of its mask-free read-out, where it is not 1."""
        self.fused = True
        """Whether passes that can be are computed by one function (`fused`)."""
        self.base.train(True)

    def bucket_of(self, adapter: int | None) -> Bucket | None:
        """What holds an adapter's matrices; None where it has none here."""
        return next((bucket for bucket in self.buckets if adapter in bucket.slot), None)  # type: ignore[return-value, operator]

    def leave(self, adapter: int) -> None:
        """Forget an adapter."""
        for bucket in self.buckets:
            bucket.leave(adapter)  # type: ignore[operator]
        for table in (self.input_sites, self.rank_sites, self.mean_factors):
            table.pop(adapter, None)

    def train(self, mode: bool = True) -> LoRALinear:
        """Set the mode of everything but the base."""
        super().train(mode)
        self.base.train(True)
        return self

    @property
    def weight(self) -> Tensor:
        """The base weight: some model code reads its dtype or device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias."""
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(M·B, …, I) -> (M·B, …, O). Raises `MemberAxisError` where the leading size is not M·B."""
        vectors = x.numel() // x.shape[-1]
        plan = self._axis.plan_for(x.shape[0], self.name, vectors)
        users = self._axis.once((self.name, vectors), lambda: self._users(plan, plan.spans(vectors)))
        if self._fuses(x, users):
            stacks = self._axis.once((self.name, vectors, "stacks"), lambda: self._stacks(plan, users, vectors))
            updates = [
                (stack, Matrices(*bucket.matrices(), *self._dropped_of(plan, chosen, x, bucket.rank)))  # type: ignore[operator]
                for stack, (bucket, chosen) in zip(stacks, users, strict=True)
            ]
            return adapted_linear(x, self.base, updates)
        y = self.base(x)
        if plan.end_to_end is not None:
            return y + self._member_by_member(x, y.shape[-1], plan).to(y.dtype)
        inputs, outputs = x.shape[-1], y.shape[-1]
        x_MNI = x.reshape(plan.size, -1, inputs)
        y_MNO = y.reshape(plan.size, -1, outputs)
        for bucket, chosen in users:
            everyone = len(chosen) == plan.size
            index = None if everyone else as_index(chosen, x.device)
            x_chosen = x_MNI if index is None else x_MNI.index_select(0, index)
            x_chosen = self._drop_input(x_chosen, plan, chosen)
            update = self._plain_update(bucket, x_chosen, plan, chosen).to(y.dtype)
            y_MNO = y_MNO + update if index is None else y_MNO.index_add(0, index, update)
        return y_MNO.reshape(y.shape)

    def _member_by_member(self, x: Tensor, outputs: int, plan: MemberPlan) -> Tensor:
        """Updates of rows laid end to end, (1, N, O): members have different numbers of tokens."""
        x_NI = x.flatten(0, -2)
        updates = []
        for m, (start, stop) in enumerate(plan.spans(len(x_NI))):
            bucket = self.bucket_of(plan.members[m].adapter)
            if bucket is None:
                updates.append(x_NI.new_zeros(stop - start, outputs))
                continue
            own = self._drop_input(x_NI[None, start:stop], plan, [m])
            updates.append(self._plain_update(bucket, own, plan, [m])[0])
        return torch.cat(updates).view(*x.shape[:-1], outputs)

    def _fuses(self, x: Tensor, users: list[tuple[Bucket, list[int]]]) -> bool:
        """Whether one function serves this pass (`fused`), or autograd's own operations do.

        They do under ZeRO-3, which gathers a module's parameters when it is called, and when its own backward begins.
        """
        sharded = any(hasattr(bucket.lora_A, "ds_id") for bucket, _ in users)
        return self.fused and bool(users) and not sharded and fuses(self.base, x)

    def _users(self, plan: MemberPlan, spans: list[tuple[int, int]]) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the members that use them, those without a token left out: a draw may have got no row."""
        found: list[tuple[Bucket, list[int]]] = []
        for bucket in self.buckets:
            using = [m for m, member in enumerate(plan.members) if member.adapter in bucket.slot]  # type: ignore[operator]
            if using:
                found.append((bucket, [m for m in using if spans[m][0] < spans[m][1]] or using))  # type: ignore[arg-type]
        return found

    def _stacks(self, plan: MemberPlan, users: list[tuple[Bucket, list[int]]], vectors: int) -> list[Stack]:
        spans, found = plan.spans(vectors), []
        for bucket, chosen in users:
            like = next(bucket.parameters())
            slots = tuple(bucket.slot[plan.members[m].adapter] for m in chosen)  # type: ignore[index]
            scale = (
                bucket.scalings[slot] * mean * self._rescaled(plan.members[m])
                for m, slot, mean in zip(chosen, slots, self._means(plan, chosen), strict=True)
            )
            masks = self._masks(plan, chosen, like.device)
            given = (masks.get(position) for position in ("lora_A", "lora_B", "lora_rank"))
            using = Users(slots, tuple(spans[m] for m in chosen), tuple(scale), *given)
            found.append(using.stacked(bucket.rank, like))
        return found

    def _dropped_of(self, plan: MemberPlan, chosen: list[int], x: Tensor, rank: int) -> Iterator[Tensor | None]:
        """Entries of x and of A x that the chosen members drop."""
        for sites, size in ((self.input_sites, x.shape[-1]), (self.rank_sites, rank)):
            yield self._dropped(sites, plan, chosen, plan.spans(x.numel() // x.shape[-1]), size) if sites else None

    def _rescaled(self, member: Member) -> float:
        """What is kept of a member's tokens is divided by how much of them is: of x and of A x, once each."""
        found = [_drops(sites, member) for sites in (self.input_sites, self.rank_sites)]
        return math.prod(1.0 / (1.0 - one[0].rate) for one in found if one and one[0].compensation == "inverse")

    def _dropped(
        self, sites: dict[int, tuple[Site, int]], plan: MemberPlan, chosen: list[int],
        spans: list[tuple[int, int]], features: int,
    ) -> Tensor | None:
        """(N, features) bool, where the chosen members drop entries of their tokens; None where none of them does."""
        by_member = [(m, one) for m in chosen if (one := _drops(sites, plan.members[m]))]
        if not by_member:
            return None
        tokens, found = spans[-1][1], None
        keys = plan.keys_for(tokens // plan.size, self.name)
        for (_, (site, layer_key)), group in groupby(
            enumerate(by_member), lambda one: (one[1][0] - one[0], one[1][1])  # neighbours that drop alike
        ):
            members = [m for _, (m, _) in group]
            rows = keys.rows_of(members[0], members[-1] + 1)
            own = dropped_hidden(keys, rows, layer_key, features, site)
            own = own.expand(-1, keys.position.shape[1], -1).reshape(-1, features)
            if len(own) == tokens:
                return own
            found = own.new_zeros(tokens, features) if found is None else found
            found[spans[members[0]][0] : spans[members[-1]][1]] = own
        return found

    def _plain_update(self, bucket: nn.Module, x_MNI: Tensor, plan: MemberPlan, chosen: list[int]) -> Tensor:
        masks = self._masks(plan, chosen, x_MNI.device)
        tokens = [self._element_mask(self.rank_sites, plan, m, x_MNI.shape[1], bucket.rank) for m in chosen]
        if any(mask is not None for mask in tokens):
            whole = x_MNI.new_ones(x_MNI.shape[1], bucket.rank, dtype=torch.float32)  # type: ignore[arg-type]
            masks[PER_TOKEN] = torch.stack([whole if mask is None else mask for mask in tokens])
        adapters = [plan.members[m].adapter for m in chosen]
        return bucket(x_MNI, adapters, masks, self._means(plan, chosen))

    def _masks(self, plan: MemberPlan, chosen: list[int], device: torch.device) -> dict[str, Tensor]:
        """The chosen members' rows of this layer's masks."""
        masks = plan.masks.get(self.name, {})
        if len(chosen) == plan.size:
            return dict(masks)
        index = kept_index(tuple(chosen), device)
        return {position: mask.index_select(0, index) for position, mask in masks.items()}

    def _means(self, plan: MemberPlan, chosen: list[int]) -> list[float]:
        members = [plan.members[m] for m in chosen]
        return [self.mean_factors.get(one.adapter, 1.0) if one.draw is None else 1.0 for one in members]

    def _drop_input(self, x_MNI: Tensor, plan: MemberPlan, chosen: list[int]) -> Tensor:
        """Element-wise dropout on the adapter's input (stock `lora_dropout`)."""
        masks = [self._element_mask(self.input_sites, plan, m, *x_MNI.shape[1:]) for m in chosen]
        if not any(mask is not None for mask in masks):
            return x_MNI
        parts = (x if mask is None else x * mask.to(x.dtype) for x, mask in zip(x_MNI, masks, strict=True))
        return torch.stack(list(parts))

    def _element_mask(
        self, sites: dict[int, tuple[Site, int]], plan: MemberPlan, m: int, inputs: int, features: int
    ) -> Tensor | None:
        """(N, features) of member m, a stateless function of its keys; None where it drops nothing."""
        if (found := _drops(sites, plan.members[m])) is None:
            return None
        site, layer_key = found
        keys, rescale = plan.keys_for(inputs, self.name), site.compensation == "inverse"
        mask = element_mask(keys, keys.rows_of(m, m + 1), layer_key, features, site.rate, rescale)
        return mask.reshape(inputs, features)


def _drops(sites: dict[int, tuple[Site, int]], member: Member) -> tuple[Site, int] | None:
    """By what a member drops entries token by token; None where it does not."""
    return None if member.draw is None or member.adapter is None else sites.get(member.adapter)
