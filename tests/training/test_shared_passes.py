"""Several runs in one pass: each has the loss, the gradients and the masks that it has in a pass of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from helpers.families import LORA_DROPOUT, adapted_llama, assert_close_gradients, examples
from torch import Tensor

from pipeline.adapters.attach import Adapters
from pipeline.adapters.layout import RowLayout, joined, of_adapter, training_layout, weightless
from pipeline.adapters.masks import element_mask
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config.adapter import AdapterConfig
from pipeline.config.method import Consistency, Site
from pipeline.data.encode import Encoded
from pipeline.loss.consistency import TrainingObjective
from pipeline.loss.objective import SupervisedLM
from pipeline.training.batch import MemberBatch, lay_out

PAD = 2
HIDDENKEY = AdapterConfig(method="hiddenkey").resolved_method().sites
INPUT = (Site(position="lora_input", rate=0.3),)


@dataclass(frozen=True)
class Part:
    """One run's micro-batch."""

    spec: AdapterSpec
    rows: list[Encoded]
    draws: int = 2
    kind: str = "split"
    smoothing: float = 0.0

    def layout(self, adapter: int) -> RowLayout:
        masked, term = bool(self.spec.sites), self.spec.consistency
        return of_adapter(training_layout(range(len(self.rows)), self.draws, self.kind, masked, term), adapter)


def term(kind: str, branches: str) -> Consistency:
    return Consistency(kind=kind, branches=branches, weight=0.7)  # type: ignore[arg-type]


PARTS = [
    Part(AdapterSpec(rank=4, sites=LORA_DROPOUT), examples([9, 5, 7, 6, 8], 1)),
    Part(AdapterSpec(rank=3, sites=HIDDENKEY, consistency=term("kl", "one")), examples([6, 4], 2), smoothing=0.1),
    Part(AdapterSpec(rank=4), examples([11], 3), smoothing=0.2),
    Part(AdapterSpec(rank=4, sites=INPUT, consistency=term("js", "both")), examples([5, 7, 4], 4), 4),
    Part(AdapterSpec(rank=2, sites=HIDDENKEY, consistency=term("kl", "one")), examples([8, 8, 3], 5), 2, "replicate"),
    Part(AdapterSpec(rank=4, sites=LORA_DROPOUT, consistency=term("js", "one")), examples([7, 6], 6)),
    Part(AdapterSpec(rank=4, sites=LORA_DROPOUT, consistency=term("kl", "both")), examples([10, 4], 7), 4, "replicate"),
]
KEYS = {adapter: MaskKey(10 + adapter, adapter % 3) for adapter in range(len(PARTS))}


def batch(adapters: Adapters, chosen: list[int]) -> MemberBatch:
    layouts = [PARTS[k].layout(k) for k in chosen]
    layout = joined(layouts, [len(PARTS[k].rows) for k in chosen])
    rows = [row for k in chosen for row in PARTS[k].rows]
    return lay_out(adapters, rows, layout, PAD, KEYS, smoothing={k: PARTS[k].smoothing for k in chosen})


def run(adapters: Adapters, chosen: list[int]) -> tuple[list[tuple[float, float]], dict[tuple[str, int], Tensor]]:
    """Both losses of each run, and the gradient of its own loss by (parameter, adapter)."""
    built = batch(adapters, chosen)
    with adapters.axis.active(built.plan):
        nll, apart = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)(**built.inputs)
        assert nll.shape == apart.shape == (len(chosen),)
        weights = torch.tensor([PARTS[k].spec.consistency.weight for k in chosen])
        ((nll + weights * apart) * torch.tensor([1.0 / (k + 1) for k in chosen])).sum().backward()
    found = {}
    for name, layer in adapters.layers.items():
        for bucket in layer.buckets:
            for adapter, place in bucket.slot.items():
                for part in bucket.names:
                    gradient = getattr(bucket, part).grad
                    if adapter in chosen:
                        found[f"{name}.{part}", adapter] = gradient[place].clone()
                    else:
                        assert gradient is None or not gradient[place].any()
    adapters.model.zero_grad(set_to_none=True)
    return list(zip(nll.tolist(), apart.tolist(), strict=True)), found


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    return adapted_llama(*(part.spec for part in PARTS), layers=2)


def test_a_shared_pass_is_the_passes_of_its_runs(adapters: Adapters) -> None:
    together, gradients = run(adapters, list(range(len(PARTS))))
    for k in range(len(PARTS)):
        (alone,), own = run(adapters, [k])
        assert together[k] == pytest.approx(alone, rel=1e-5)
        assert (alone[1] > 0) == (PARTS[k].spec.consistency.kind != "none")
        assert all(gradient.any() for gradient in own.values())
        assert_close_gradients(
            {name: gradients[name, k] for name, _ in own}, {name: gradient for (name, _), gradient in own.items()}
        )


def test_masks_are_those_of_the_run_alone_to_the_bit(adapters: Adapters) -> None:
    built, start = batch(adapters, list(range(len(PARTS)))), 0
    for k in range(len(PARTS)):
        alone = batch(adapters, [k])
        members = slice(start, start := start + alone.plan.size)
        for name, by_position in alone.plan.masks.items():
            for position, mask in by_position.items():
                theirs = built.plan.masks[name][position][members]
                assert torch.equal(theirs[:, : mask.shape[1]], mask)
        assert built.plan.members[members] == alone.plan.members
        for m in range(alone.plan.size):
            ours = _real(alone, m)
            theirs = _real(built, members.start + m)
            assert ours and all(torch.equal(theirs[example], mask) for example, mask in ours.items())


def _real(built: MemberBatch, m: int) -> dict[str, Tensor]:
    """Example -> mask of its tokens under member m, of some layer's activation site."""
    assert built.plan.row_keys is not None
    found = {}
    for row in range(m * built.plan.rows, (m + 1) * built.plan.rows):
        mask = element_mask(built.plan.row_keys, slice(row, row + 1), 77, 5, 0.4)[0]
        found[built.examples[row]] = mask[built.tensors["attention_mask"][row].bool()]
    return found


def test_what_is_not_finite_stays_with_its_run(adapters: Adapters) -> None:
    """Bit for bit: the others' losses and gradients are those of the pass without the fault."""
    everyone = list(range(len(PARTS)))
    before, gradients = run(adapters, everyone)
    bucket = next(b for b in adapters.layers["model.layers.0.self_attn.q_proj"].buckets if 3 in b.slot)
    kept = bucket.lora_B.detach().clone()
    with torch.no_grad():
        bucket.lora_B[bucket.slot[3]] = torch.nan
    try:
        after, broken = run(adapters, everyone)
    finally:
        with torch.no_grad():
            bucket.lora_B.copy_(kept)
    assert any(value != value for value in after[3])  # NaN
    assert not all(gradient.isfinite().all() for (_, k), gradient in broken.items() if k == 3)
    for k in set(everyone) - {3}:
        assert after[k] == before[k]
        assert all(torch.equal(broken[name], gradients[name]) for name in gradients if name[1] == k)


def test_fillers_and_weightless_passes_add_nothing(adapters: Adapters) -> None:
    layout = joined([PARTS[0].layout(0), weightless(PARTS[1].layout(1))], [5, 2])
    assert len(set(map(len, (layout.source, layout.weights)))) == 1
    assert sum(layout.weights) == 5 and layout.rows == 3 and len(layout.members) == 3
    assert layout.weights.count(0.0) == 1 + 3 and set(layout.source) == set(range(7))
    built = lay_out(adapters, [*PARTS[0].rows, *PARTS[1].rows], layout, PAD, KEYS)
    with adapters.axis.active(built.plan):
        nll, apart = TrainingObjective(SupervisedLM(adapters.model), adapters.axis)(**built.inputs)
    assert nll[1] == apart[1] == apart[0] == 0.0
    assert float(nll[0].detach()) == pytest.approx(run(adapters, [0])[0][0][0])
