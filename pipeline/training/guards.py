"""Numerical guards: a step that is not finite is never applied, and says where it broke.

Per step this costs one norm over the adapter's gradients; its result travels with the loss in the all-reduce that the
loop needs anyway. Everything dearer happens in the first steps, or after the run is lost.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import nn

from pipeline.adapters.attach import Adapters
from pipeline.config import TrainConfig
from pipeline.data.encode import Encoded
from pipeline.distributed.world import World, gather_objects, require_equal, sum_over_processes
from pipeline.errors import LoradropError
from pipeline.files import publish_folder
from pipeline.loss.terms import GlobalMean
from pipeline.run_folder.paths import RunPaths, step_name
from pipeline.training.batch import MemberBatch
from pipeline.training.diagnosis import first_bad_module, record_pass, write_diagnosis
from pipeline.training.engine import Slot

RowsOf = Callable[[int], MemberBatch]
"""Micro-batch of the step at hand -> its rows, made again."""


class NotFinite(LoradropError):
    """A loss or a gradient is NaN or infinite."""


class LossSpike(LoradropError):
    """The loss jumped, and train.spike.action is `stop`."""


class Untrained(LoradropError):
    """A trainable tensor receives no gradient."""


@dataclass(frozen=True)
class StepNumbers:
    """What the guards know about a step that may be applied."""

    loss: float
    """Mean nll of the global batch, nats per supervised token (or row)."""
    gradient_norm: float
    """Global 2-norm before clipping."""
    spike: float | None
    """loss / running median, where that exceeds train.spike.factor and the loss train.spike.floor_nats."""
    consistency: float | None = None
    """Mean consistency term, unweighted, in the same unit as `loss`; None where the step has none."""

    def terms(self) -> dict[str, float]:
        """The parts of the loss by name."""
        return {"loss": self.loss} | ({} if self.consistency is None else {"consistency": self.consistency})


class Guards:
    """Checks between the last backward pass of a step and its update. Collective: every process calls them alike."""

    def __init__(
        self, slot: Slot, objective: nn.Module, adapters: Adapters, train: TrainConfig, paths: RunPaths,
        world: World, losses: Sequence[float] = (),
    ) -> None:
        """`losses` are those of the steps before, so that a resumed run has its running median."""
        self._slot, self._objective, self._adapters = slot, objective, adapters
        self._train, self._paths, self._world = train, paths, world
        self._recent: deque[float] = deque(losses, maxlen=train.spike.window_steps)
        self._moved: set[str] = set()
        masked = any(site.rate > 0 for site in adapters.specs[slot.adapter].sites)
        self._patience = 2 if masked else 0

    def check(
        self, step: int, losses: Sequence[float], mean: GlobalMean, rows_of: RowsOf,
        divergences: Sequence[float] = (), scale: str = "",
    ) -> StepNumbers:
        """Judge a 0-based step by its own losses and by the reduced gradients, before the update.

        Args:
            losses: Σ nll of each micro-batch of this process.
            mean: how sums over the global batch become the loss.
            divergences: Σ consistency term of each micro-batch, where there is one.
            scale: what to add about gradients that are not finite: the loss scale, where there is one.

        Raises:
            NotFinite: naming the first bad module or parameter; the batch is saved under diagnosis/.
            Untrained: in the first steps, a tensor that stays without gradient.
            LossSpike: where train.spike.action is `stop`.
        """
        squares = self._slot.squared_gradient_norm()
        total, apart, squares = sum_over_processes(
            [math.fsum(losses), math.fsum(divergences), squares], self._world.device
        )
        if not math.isfinite(total + apart + squares):
            terms = [sum(terms) for terms in zip_longest(losses, divergences, fillvalue=0.0)]
            self._explain(step, terms, rows_of, scale)
        if step <= self._patience + 1:
            self._require_gradients(step)
        loss = mean.of(total)
        consistency = mean.of(apart) if divergences else None
        return StepNumbers(loss, math.sqrt(squares), self._spike(step, loss), consistency)

    def _spike(self, step: int, loss: float) -> float | None:
        """The ratio to the running median, where it is a spike."""
        settings, enough = self._train.spike, (self._recent.maxlen or 2) // 2
        median = statistics.median(self._recent) if len(self._recent) >= enough else math.inf
        self._recent.append(loss)
        if loss <= max(settings.factor * median, settings.floor_nats):
            return None
        if settings.action == "stop":
            raise LossSpike(
                f"step {step + 1}: the loss is {loss:.4g}, {loss / median:.1f} × the median of the last"
                f" {settings.window_steps} steps, and train.spike.action is stop. The step is not applied. Take a new"
                " --run-dir with a lower train.learning_rate or train.max_gradient_norm, or set"
                " train.spike.action=warn."
            )
        return loss / median

    def _require_gradients(self, step: int) -> None:
        """Every module moves at step 1, every tensor at step 2.

        lora_A has no gradient while lora_B is 0, so at step 1 one tensor of a module suffices. Under masks both get
        two steps more: all rows of a narrow layer may be dropped at once.
        """
        trained = self._slot.sizes
        for name in trained:
            if name not in self._moved:
                gradient = self._slot.gradient(name)  # a collective
                if gradient is not None and bool(gradient.any()):
                    self._moved.add(name)
        moved_modules = {name.rpartition(".")[0] for name in self._moved}
        still = [name for name in trained if name not in self._moved]
        if step <= self._patience:
            still = [name for name in still if name.rpartition(".")[0] not in moved_modules]
        if still and step >= self._patience:
            shown = ", ".join(still[:5]) + (f" and {len(still) - 5} more" if len(still) > 5 else "")
            raise Untrained(
                f"step {step + 1}: {len(still)} of {len(trained)} trainable tensors receive no gradient: {shown}."
                " Likely causes: activation checkpointing that cuts the graph (its input needs no gradient), a base"
                " layer whose kernel has no backward pass, a frozen or detached tensor, or modules that the loss does"
                " not depend on (leave those out of adapter.target_modules)."
            )

    def _explain(self, step: int, losses: Sequence[float], rows_of: RowsOf, scale: str) -> None:
        """Find where it broke, save the global batch, raise `NotFinite`. A collective."""
        by_process = gather_objects(list(losses))
        bad = [(p, m) for p, own in enumerate(by_process) for m, loss in enumerate(own) if not math.isfinite(loss)]
        if bad:
            process, micro = bad[0]
            found = gather_objects(first_bad_module(self._objective, self._adapters, rows_of(micro)))
            where = found[process] or "the loss itself: every module's output is finite"
            what = f"the loss of micro-batch {micro} of process {process} is {by_process[process][micro]}"
            what += f"; first output that is not finite: {where}"
        else:
            process, micro = None, None
            where = self._first_bad_gradient()
            what = f"the losses are finite, a gradient is not{scale}; first in the backward pass: {where}"
        folder = self._paths.diagnosis / step_name(step + 1)
        record = {
            "step": step + 1, "what": what, "where": where, "process": process, "micro_batch": micro,
            "mask_seed": self._train.seed, "mask_phase": step,
            "losses": [[repr(loss) for loss in own] for own in by_process],
        }
        passes = gather_objects([record_pass(rows_of(m)) for m in range(len(losses))])
        if self._world.is_main:
            publish_folder(folder, lambda aside: write_diagnosis(aside, record, passes))
        raise NotFinite(
            f"step {step + 1}: {what}. The step is not applied; what was saved before stays. The batch is in {folder}."
            f" Look at its rows; then take a new --run-dir with a lower train.learning_rate"
            f" (now {self._train.learning_rate:g}), adapter.alpha or train.max_gradient_norm, or a wider"
            " model.compute_dtype (float16 overflows at 65504)."
        )

    def _first_bad_gradient(self) -> str:
        """The bad parameter whose gradient the backward pass makes first, that is the last one of the forward pass."""
        bad = None
        for name in self._slot.sizes:
            gradient = self._slot.gradient(name)  # a collective: no early exit
            if gradient is not None and not bool(gradient.isfinite().all()):
                bad = name
        return bad or "none by itself: the norm over all of them overflows"


def recent_losses(rows: Iterable[Mapping[str, Any]], step: int, window: int) -> list[float]:
    """Losses of the last `window` training rows of metrics.jsonl up to `step`."""
    return [row["loss"] for row in rows if row["kind"] == "train" and row["step"] <= step][-window:]


def require_same_inputs(data_fingerprint: str, examples: Sequence[Encoded], model: nn.Module) -> None:
    """Data, tokens and weights are those of the other processes, nodes included.

    Raises:
        LoradropError: on every process, where they differ.
    """
    ids = repr([example.input_ids for example in examples[:16]])
    require_equal("the rows of the data split", data_fingerprint)
    require_equal("the tokens of the first rows", hashlib.sha256(ids.encode()).hexdigest())
    require_equal("the weights of the model", weights_fingerprint(model))


def weights_fingerprint(model: nn.Module) -> str:
    """Name, shape and first values of every floating-point parameter: cheap, and other weights show in it.

    Packed 4-bit weights are left out: kernels of other devices may round a block differently.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            values = parameter.detach().flatten()[:8].float().cpu().tolist()
            digest.update(f"{name} {tuple(parameter.shape)} {values}\n".encode())
    return digest.hexdigest()
