"""Adapters with dropout sites on a model of one's own, in a training loop of one's own: PyTorch's, or HF `Trainer`.

    attached = loradrop.attach(model, loradrop.AdapterConfig(method="lora_dropout", rate=0.3))
    for step, batch in enumerate(loader):
        with attached.training(batch["input_ids"], step, draws=2):    # the forward and the backward pass
            model(**batch).loss.backward()
        optimizer.step()
    attached.save("adapter")                                          # PEFT's files

Outside of `training` and `reading` every row belongs to the adapter without masks: `generate` needs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters, with_row_keys
from pipeline.adapters.attach import attach as attach_specs
from pipeline.adapters.members import MaskKey, Member
from pipeline.adapters.peft_format import adapter_matrices, write_adapter
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Attached:
    """A model's adapter and its member axis."""

    adapters: Adapters
    seed: int
    """Of all masks."""

    def parameters(self) -> list[nn.Parameter]:
        """What is trained: lora_A (1, R, I) and lora_B (1, O, R) of every layer."""
        return [parameter for parameter in self.adapters.model.parameters() if parameter.requires_grad]

    @contextmanager
    def training(self, input_ids: Tensor, step: int, draws: int = 1) -> Iterator[None]:
        """Masks of an optimizer step for the passes within, backward included.

        The rows (B, T) of a pass are shared among `draws` mask draws: the first B / draws are under the first, and so
        on. The masks are a function of (seed, step, draw): the passes of a step, accumulated say, have the same ones.

        Raises:
            ConfigError: B is no multiple of `draws`.
        """
        rows = len(input_ids)
        if draws < 1 or rows % draws:
            raise ConfigError(
                "draws", draws, f"does not divide the {rows} rows of the batch", "Drop the last batch, or draw once."
            )
        with self._active([Member(0, draw) for draw in range(draws)], input_ids, MaskKey(self.seed, step)):
            yield

    @contextmanager
    def reading(self, draws: Sequence[int | None], input_ids: Tensor) -> Iterator[None]:
        """Passes of several members at once: rows (M·B, T), the same B under each of M draws, member by member.

        `input_ids.repeat(M, 1)` makes them of (B, T). None is the adapter without masks.

        Raises:
            ConfigError: the rows are no multiple of the members.
        """
        if not draws or len(input_ids) % len(draws):
            raise ConfigError(
                "draws", list(draws), f"are no divisor of {len(input_ids)} rows", "Repeat the rows once per draw."
            )
        with self._active([Member(0, draw) for draw in draws], input_ids, MaskKey(self.seed, "test")):
            yield

    def save(self, folder: str | Path, base: str | None = None) -> None:
        """Write the adapter as PEFT reads it.

        Args:
            base: name or path of the base model; None: as it was loaded.
        """
        target, adapters = Path(folder), self.adapters
        target.mkdir(parents=True, exist_ok=True)
        name = base if base is not None else str(getattr(adapters.model.config, "_name_or_path", ""))
        matrices = adapter_matrices(adapters.layers, 0)
        write_adapter(target, matrices, adapters.specs[0], adapters.layer_count, name, adapters.suffixes)

    @contextmanager
    def _active(self, members: Sequence[Member], input_ids: Tensor, key: MaskKey) -> Iterator[None]:
        rows = len(input_ids) // len(members)
        plan = self.adapters.plan(members, rows, key)
        if self.adapters.needs_row_keys():
            device = input_ids.device
            examples = torch.arange(rows, device=device).repeat(len(members))
            positions = torch.arange(input_ids.shape[1], device=device).expand(len(input_ids), -1)
            plan = with_row_keys(plan, examples, positions)
        with self.adapters.axis.active(plan):
            yield


def attach(model: nn.Module, config: AdapterConfig | None = None, seed: int = 0) -> Attached:
    """Put an adapter onto a causal model or an encoder, in place; everything else is frozen.

    A fresh adapter changes nothing (B = 0). A classification head stays as it is: set `requires_grad` of what of it is
    to be trained, and save it yourself.

    Raises:
        ConfigError: targets that do not match, a site that the model cannot honour; AdaLoRA or a consistency term,
            which live in the loop of `train`.
    """
    config = config or AdapterConfig()
    if config.kind == "adalora":
        raise ConfigError("adapter.kind", "adalora", "prunes ranks in the training loop of loradrop", "Use lora here.")
    spec = AdapterSpec.from_config(config, max_steps=1)
    if spec.consistency.kind != "none":
        raise ConfigError(
            "adapter.method", None, "has a consistency term, which the training loop of loradrop computes",
            "Take the method without it, or train with loradrop.train.",
        )
    if config.init_from is not None:
        raise ConfigError("adapter.init_from", config.init_from, "is read by loradrop.train alone", "Leave it out.")
    return Attached(attach_specs(model, [spec], config.target_modules, seed, fused=config.fused), seed)
