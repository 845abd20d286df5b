"""How much memory a training process will need, before anything is loaded: what `--dry-run` prints.

Weights, states and buffers are counted from shapes; what a pass holds is traced (`pipeline.plan.memory_trace`). The
peak is the largest of four moments: loading, the forward pass with its loss, the backward pass, the optimizer's step.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.attach import Adapters, attach, is_linear, linear_shape
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import AdapterConfig, ModelConfig, TrainConfig
from pipeline.config.deepspeed import read_ds_config, zero_stage
from pipeline.distributed.devices import accelerator_memory, machine_memory
from pipeline.errors import LoradropError, UserError
from pipeline.model.embedded import is_embedded
from pipeline.model.held import is_held_dequantized
from pipeline.model.kind import MODEL_FAULTS
from pipeline.model.load import compute_dtype
from pipeline.plan.memory_trace import Batch, Peaks, empty_model, trace_pass

__all__ = ["Batch", "MemoryPlan", "NoPlan", "plan_memory"]

MIB = 1024**2
NF4_BLOCK, NESTED_BLOCK = 64, 256
"""Weights per scale of bitsandbytes' 4-bit types; scales per second-level scale (double quantization)."""
PER_QUANTIZED_LAYER = {False: 64, True: 64 + 1024}
"""Bytes of the code tables that every 4-bit layer carries: 16 fp32 values, and 256 more for its nested scales."""
OVERHEAD = {"cpu": 495 * MIB, "cuda": 0}
"""Python with torch, transformers and DeepSpeed (450 MiB), tokenizer and process group. On CPU measured (SmolLM2's
tokenizer); torch's count of allocated GPU memory holds none of it, but see `CONTEXT`."""
HOLES = 1.5
"""Part of a pass's blocks that glibc's heap takes once more, at the most. torch aligns blocks to 64 bytes, and a freed
block is too small, by the margin that glibc's memalign asks for, for the next of its size: holes stay, whether shapes
vary or not. From 0.3 to 1.5 in runs of a few steps of SmolLM2-135M (`benchmarks/memory_plan.py --heap`
measures it)."""
PAGES = "MALLOC_MMAP_THRESHOLD_"
"""glibc's variable for the size from which on blocks are no part of the heap."""
SMALL = 1024**2
"""A value of it under which there are no holes to speak of."""
CONTEXT = 600 * MIB
"""What a CUDA context and the libraries' workspaces take of a GPU beside torch's allocations: a usual value."""
STEP_COPIES = 3
"""fp32 copies of its share that DeepSpeed and AdamW make while they step: flattened gradients, and two temporaries."""
DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's zero_optimization.reduce_bucket_size, in elements."""


class NoPlan(LoradropError):
    """The plan cannot be made here; why."""


@dataclass(frozen=True)
class Weights:
    """What the base and the adapter hold, in bytes unless said otherwise."""

    weights: int
    """In quantized layers (a number)."""
    quantized: int
    """4- or 8-bit weights."""
    scales: int
    """Their quantization state."""
    others: int
    """Embeddings, head, norms, and everything else that is not quantized, in its own type."""
    trained: int
    """Adapter parameters (a number)."""
    largest: int
    """The largest quantized layer's weight in the compute type: each product dequantizes one."""
    stored: int
    """The checkpoint's files."""
    dequantized: bool = False
    """Whether the 4-bit weights are held in the compute type: `quantized` is what that takes."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process at its worst moments."""

    weights: Weights
    adapter: int
    """The adapter's parameters."""
    gradients: int
    """Reduced gradients: this process's share under ZeRO."""
    kept: int
    """Gradients that are there while a pass runs: none without accumulation."""
    bucket: int
    """What gradients are reduced in, from the backward pass to its end."""
    optimizer: int
    """fp32 masters where there are any, and AdamW's two moments."""
    passes: Peaks
    step: int
    """Temporaries of the optimizer's step."""
    overhead: int
    holes: int
    """Free memory inside the heap that it keeps, on CPU."""
    device: str
    capacity: int
    """Of the device; on CPU this process's share of the machine."""

    @property
    def base(self) -> int:
        """The frozen base."""
        return self.weights.quantized + self.weights.scales + self.weights.others

    @property
    def load_peak(self) -> int:
        """While the base is loaded: its files (on CPU they are mapped, and what was read counts), the base as it grows,
        and the largest layer before it is quantized."""
        mapped = self.weights.stored if self.device == "cpu" else 0
        return self.base + mapped + self.weights.largest + self.overhead

    @property
    def resident(self) -> int:
        """What is there from the second step on, whatever happens."""
        return self.base + self.adapter + self.optimizer + self.overhead

    @property
    def moments(self) -> dict[str, int]:
        """Moment -> bytes."""
        dequantizing = 0 if self.weights.dequantized else self.weights.largest
        running = self.resident + self.kept + dequantizing + self.holes
        allocated = self.bucket if self.device == "cuda" else 0  # on CPU it fills as activations go
        return {
            "loading": self.load_peak,
            "forward pass": running + int(self.passes.forward),
            "backward pass": running + allocated + int(self.passes.backward),
            "optimizer step": self.resident + self.gradients + max(self.bucket, self.step),
        }

    @property
    def peak(self) -> int:
        """The most at any moment."""
        return max(self.moments.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it, a CUDA context included."""
        return self.peak + (CONTEXT if self.device == "cuda" else 0) <= self.capacity


def plan_memory(
    base: ModelConfig, adapter: AdapterConfig, train: TrainConfig, processes: int, batch: Batch
) -> MemoryPlan:
    """The plan of one of `processes` (all of one node) for passes like `batch`.

    Raises:
        NoPlan: the base's configuration is not at hand, or this kind of run is not planned.
    """
    accelerators = accelerator_memory()
    capacity = min(size for _, size in accelerators) if accelerators else machine_memory() // processes
    device, dtype = planned_on(base)
    folder, description = base_description(base)
    model = empty_model(description, dtype, base.attention)
    adapters = attach(model, [AdapterSpec.from_config(adapter, train.max_steps)], adapter.target_modules, 0)
    weights = weigh(adapters, base, dtype, folder)
    held = weights.weights * dtype.itemsize
    if is_held_dequantized(base, device, held, processes):
        weights = replace(weights, quantized=held, scales=0, dequantized=True)
    try:
        passes = trace_pass(adapter, train, base.attention, description, dtype, batch)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise NoPlan(f"a pass of this model cannot be traced without its weights ({first_line(error)})") from error
    states = states_of(train, weights.trained, processes, device)
    holes = int(HOLES * passes.heap) if device == "cpu" and not heap_is_bounded() else 0
    return MemoryPlan(weights=weights, passes=passes, overhead=OVERHEAD[device], holes=holes, device=device,
                      capacity=capacity, **asdict(states))


def heap_is_bounded() -> bool:
    """Whether the environment, which training processes inherit, has glibc give every larger block its own pages."""
    value = os.environ.get(PAGES, "")
    return value.isdecimal() and int(value) <= SMALL


def planned_on(base: ModelConfig) -> tuple[str, torch.dtype]:
    """Kind of device, and the compute dtype on it: of a GPU that this torch cannot reach that of a usual one."""
    device = "cuda" if accelerator_memory() else "cpu"
    known = device == "cpu" or torch.cuda.is_available()
    return device, compute_dtype(base, torch.device(device)) if known else torch.bfloat16


def base_description(model: ModelConfig) -> tuple[Path | None, Any]:
    """(the folder where it is local, transformers' configuration of the base); nothing is fetched for an embedded one.

    Raises:
        NoPlan: not made yet, not reachable, or not a causal model.
    """
    from transformers import AutoConfig

    from pipeline.model.embedded import embedded_folder
    from pipeline.model.kind import model_kind

    if is_embedded(model.path):
        folder = embedded_folder(model.path)
        if folder is None:
            raise NoPlan(f"{model.path} is not in the cache yet: it is made at the first start")
    else:
        local = Path(model.path).expanduser()
        folder = local if local.is_dir() else None
    try:
        if model_kind(model) != "causal":
            raise NoPlan("only causal models are planned")
        settings = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
        return folder, AutoConfig.from_pretrained(str(folder or model.path), **settings)
    except (UserError, *MODEL_FAULTS) as error:
        raise NoPlan(f"the configuration of {model.path} cannot be read ({first_line(error)})") from error


def weigh(adapters: Adapters, config: ModelConfig, dtype: torch.dtype, folder: Path | None) -> Weights:
    """Bytes of the base on the meta device as it will be loaded, and the number of trained parameters."""
    model = adapters.model
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = {
        id(module.weight): linear_shape(module)
        for module in model.modules() if is_linear(module) and module is not head
    } if config.quantization != "none" else {}
    sizes = [quantized_bytes(inputs * outputs, outputs, config) for inputs, outputs in linears.values()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rest = [p for p in model.parameters() if not p.requires_grad and id(p) not in linears]
    others = sum(p.numel() for p in rest) * dtype.itemsize
    largest = max((inputs * outputs for inputs, outputs in linears.values()), default=0) * dtype.itemsize
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder is not None else 0
    return Weights(
        weights=sum(inputs * outputs for inputs, outputs in linears.values()), quantized=sum(size for size, _ in sizes),
        scales=sum(scales for _, scales in sizes), others=others, trained=trained, largest=largest, stored=stored,
    )


def quantized_bytes(numbers: int, outputs: int, config: ModelConfig) -> tuple[int, int]:
    """(bytes of the weight, bytes of its scales): NF4 has one scale per 64 weights, int8 one per output.

    Double quantization (arXiv 2305.14314, section 3) stores scales in 8 bits with one fp32 scale per 256 of them.
    """
    if config.quantization == "int8":
        return numbers, 4 * outputs
    blocks = -(-numbers // NF4_BLOCK)
    nested = blocks + 4 * -(-blocks // NESTED_BLOCK)
    scales = nested if config.double_quantization else 4 * blocks
    return -(-numbers // 2), scales + PER_QUANTIZED_LAYER[config.double_quantization]


@dataclass(frozen=True)
class States:
    """Bytes that training adds to the base in one process; see `MemoryPlan`."""

    adapter: int
    gradients: int
    kept: int
    bucket: int
    optimizer: int
    step: int


def states_of(train: TrainConfig, trained: int, processes: int, device: str) -> States:
    """ZeRO-0: fp32 parameters, their gradients, two moments.

    ZeRO-1 and 2: the same parameters, and a share of fp32 masters, of moments, and of reduced gradients (ZeRO-1
    accumulates whole ones). The bucket in which gradients are reduced is allocated whole: on a GPU it counts, on CPU
    only what is written to.

    Raises:
        NoPlan: ZeRO-3, or an offloaded optimizer.
    """
    settings = read_ds_config(train.deepspeed)
    stage, full = zero_stage(settings), 4 * trained
    if stage == 3:
        raise NoPlan("ZeRO-3 is not planned yet; while loading it holds what zero2 does, later less")
    zero = settings.get("zero_optimization", {})
    if zero.get("offload_optimizer"):
        raise NoPlan("offloading is not planned yet")
    accumulates = train.micro_tokens is not None or train.global_batch > train.micro_batch * processes
    share = full if stage == 0 else full // processes
    kept = (share if stage == 2 else full) if accumulates else 0
    elements = 0 if stage == 0 else zero.get("reduce_bucket_size", DEFAULT_BUCKET)
    bucket = 4 * (elements if device == "cuda" else min(elements, trained))
    moments = share // 2 if train.optimizer.endswith("8bit") else 2 * share  # two bytes for each number, or eight
    masters = 0 if stage == 0 else share
    return States(full, share, kept, bucket, masters + moments, STEP_COPIES * share)


def first_line(error: BaseException) -> str:
    """The beginning of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
