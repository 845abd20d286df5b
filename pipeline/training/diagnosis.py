"""After a step that was not finite: which module broke first, and the batch it broke on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.adapters.attach import Adapters
from pipeline.files import write_json
from pipeline.training.batch import MemberBatch

BATCH, DIAGNOSIS = "batch.safetensors", "diagnosis.json"


def first_bad_module(objective: nn.Module, adapters: Adapters, rows: MemberBatch) -> str | None:
    """Run the forward pass of `rows` again; the module whose output is first not finite, in order of execution.

    Positions that are padding are passed over.
    """
    real = rows.tensors["attention_mask"].bool()
    found: list[str] = []

    def watch(name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(_finite(tensor, real) for tensor in _tensors(output)):
                found.append(f"{name} ({kind})")

        return hook

    handles = [
        module.register_forward_hook(watch(name, type(module).__name__))
        for name, module in adapters.model.named_modules() if name
    ]
    try:
        with adapters.axis.active(rows.plan):  # with autograd, as before: other kernels would run without
            objective(**rows.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(tensor: Tensor, real: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    if tensor.shape[:2] == real.shape:
        tensor = tensor[real]
    return bool(tensor.isfinite().all())


def _tensors(output: Any) -> list[Tensor]:
    """Tensors in what a module returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [tensor for item in output for tensor in _tensors(item)] if isinstance(output, list | tuple) else []


def record_pass(rows: MemberBatch) -> dict[str, Any]:
    """One pass in plain values, for the way to the main process and the disk."""
    inputs = {**rows.tensors, "row_weights": rows.weights}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in inputs.items()}
    members = [asdict(member) for member in rows.plan.members]
    of_rows = rows.members.tolist()
    return {"tensors": tensors, "examples": list(rows.examples), "members": members, "member_of_row": of_rows}


def write_diagnosis(folder: Path, record: dict[str, Any], passes: list[list[dict[str, Any]]]) -> None:
    """batch.safetensors: process_P/micro_batch_M/TENSOR; diagnosis.json: the finding and the plan of each pass."""
    tensors: dict[str, Tensor] = {}
    plans: dict[str, Any] = {}
    for process, own in enumerate(passes):
        for micro, made in enumerate(own):
            key = f"process_{process}/micro_batch_{micro}"
            tensors |= {f"{key}/{name}": tensor for name, tensor in made.pop("tensors").items()}
            plans[key] = made
    save_file(tensors, folder / BATCH)
    write_json(folder / DIAGNOSIS, {**record, "passes": plans})
