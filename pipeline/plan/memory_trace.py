"""What one training pass holds at once: the real forward and backward pass, on tensors without data.

The model is built from its configuration on the meta device, its adapters are attached as in training, and the pass
runs under torch's fake tensors, which have shapes, types and storages but no memory. Every storage is counted from the
operation that makes it to its release, so that whatever decides what is kept - the model family, activation
checkpointing, the attention implementation, masks, the member layout - is in the figure without a formula for it.

Two short models (2 and 4 layers) are traced; layers are alike, so the whole follows from the line through both. A
quantized layer is stood in by a plain frozen one: neither keeps its input for the backward pass.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from pipeline.adapters.attach import Adapters, attach, with_row_keys
from pipeline.adapters.end_to_end import lay_end_to_end
from pipeline.adapters.layout import training_layout
from pipeline.adapters.members import MaskKey
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig, TrainConfig
from pipeline.loss.terms import chunked_losses
from pipeline.model.head import head_of, hidden_states
from pipeline.model.load import switch_off_dropout

CPU = torch.device("cpu")
SHORT, LONG = 2, 4
"""Layers of the two traces."""
MAPPED = 32 * 1024**2
"""Bytes from which on glibc gives a block pages of its own, and gives them back (DEFAULT_MMAP_THRESHOLD_MAX). Smaller
ones come from its heap once such a one has been freed."""


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch as far as memory goes."""

    tokens: int
    """T, of the longest row."""
    supervised: int
    """Supervised tokens of a row."""


@dataclass(frozen=True)
class Peaks:
    """Bytes beyond the weights."""

    forward: float
    """Until the backward pass starts: what is kept for it, the logits and their loss."""
    backward: float
    """In the backward pass, with the adapter's gradients as they come."""
    heap: float = 0.0
    """The most of it in blocks that a heap would hold, in either pass."""

    def towards(self, other: Peaks, layers: int) -> Peaks:
        """The line through traces of SHORT (self) and LONG (other) layers, at `layers`."""
        part = (layers - SHORT) / (LONG - SHORT)
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Peaks(*(short + part * (long - short) for short, long in pairs))


def trace_pass(
    adapter: AdapterConfig, train: TrainConfig, attention: str, description: Any, dtype: torch.dtype, batch: Batch
) -> Peaks:
    """Peaks of one micro-batch of the configured training on a causal model.

    Args:
        attention: implementation.
        description: transformers' configuration of the base.
        dtype: compute dtype.
    """
    short, long = (
        _trace(adapter, train, attention, empty_model(shortened(description, layers), dtype, attention), batch)
        for layers in (SHORT, LONG)
    )
    return short.towards(long, layer_count(description))


def empty_model(description: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """The base on the meta device, frozen."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(description, dtype=dtype, attn_implementation=attention)
    model.requires_grad_(False)
    model.config.use_cache = False
    switch_off_dropout(model)
    return model


def layer_count(description: Any) -> int:
    """Layers of the (text) model."""
    return int(description.get_text_config().num_hidden_layers)


def shortened(description: Any, layers: int) -> Any:
    """The same architecture with so many layers; lists with one entry per layer are cut."""
    short = copy.deepcopy(description)
    text, whole = short.get_text_config(), layer_count(description)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short


def _trace(adapter: AdapterConfig, train: TrainConfig, attention: str, model: nn.Module, batch: Batch) -> Peaks:
    adapters = attach(model, [AdapterSpec.from_config(adapter, train.max_steps)], adapter.target_modules, 0)
    adapters.set_end_to_end(attention, batch.tokens)
    if train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model.train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(model)
        live = Live([*model.parameters(), *model.buffers()])
        _run(adapters, train, batch, live)
    return live.peaks()


def _run(adapters: Adapters, train: TrainConfig, batch: Batch, live: Live) -> None:
    spec = adapters.specs[0]
    masked = any(site.rate > 0 for site in spec.sites)
    count = train.micro_batch if train.micro_tokens is None else max(1, train.micro_tokens // batch.tokens)
    layout = training_layout(range(count), train.draws, train.draw_layout, masked, spec.consistency)
    plan = adapters.plan(layout.members, layout.rows, MaskKey(0, 0))
    rows = len(layout.real) if adapters.end_to_end else len(layout.source)
    examples = torch.zeros(rows, dtype=torch.int64) if adapters.needs_row_keys() else None
    positions = torch.zeros(rows, batch.tokens, dtype=torch.int64)
    mask = torch.ones_like(positions)
    if adapters.end_to_end:
        counts = Counter(row // layout.rows for row in layout.real)
        plan = lay_end_to_end(plan, [[batch.tokens] * counts[m] for m in range(plan.size)], CPU, examples)
        positions, mask = positions.view(1, -1), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    elif examples is not None:
        plan = with_row_keys(plan, examples, positions)
    index = torch.zeros(rows * batch.supervised, dtype=torch.int64)
    with live, adapters.axis.active(plan):
        hidden = hidden_states(adapters.model, positions, mask, positions)
        loss = chunked_losses(hidden[index, index], index, head_of(adapters.model)).sum()
        live.start_backward()
        loss.backward()


def _without_data(model: nn.Module) -> None:
    """Replace meta tensors by fake ones of the CPU, so that the kernels chosen are real ones. Ties stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Live(TorchDispatchMode):
    """Bytes of the storages that operations under it have made and that are still held."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._now = self._peak = self._forward = self._heap = self._most_heap = 0
        self._held = {tensor.untyped_storage()._cdata for tensor in given}

    def start_backward(self) -> None:
        """What has been the most so far was the forward pass's."""
        self._forward, self._peak = self._peak, self._now

    def peaks(self) -> Peaks:
        """The most that was held in either pass."""
        return Peaks(float(self._forward), float(self._peak), float(self._most_heap))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it made."""
        made = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, made)
        return made

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held.add(key)
            self._count(storage.nbytes())
            weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._held.discard(key)
        self._count(-size)

    def _count(self, size: int) -> None:
        self._now += size
        self._peak = max(self._peak, self._now)
        if abs(size) < MAPPED:
            self._heap += size
            self._most_heap = max(self._most_heap, self._heap)
