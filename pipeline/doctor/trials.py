"""`python -m pipeline.doctor.trials WHAT … FILE`: one real step of a library, its findings written into FILE."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from pipeline.config.deepspeed import decided_by, fill_ds_config, read_ds_config
from pipeline.config.model import ModelConfig
from pipeline.config.train import TrainConfig
from pipeline.distributed import zero
from pipeline.distributed.devices import accelerator_memory
from pipeline.distributed.launcher import free_port
from pipeline.doctor.finding import Finding
from pipeline.files import write_json
from pipeline.plan.request import Request


def device() -> torch.device:
    """Where a training of one process would compute."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def torch_step() -> Finding:
    """A product on every device that the driver lists."""
    if accelerator_memory() and not torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        built = torch.version.cuda
        why = f"its CUDA {built} does not reach the driver" if built else "this build has no CUDA"
        remedy = "Update the driver, or install a torch for it." if built else (
            "pip must be configured for an index with torch's CUDA build; then rm -r .venv && bash launch.sh"
        )
        return Finding("torch", "FAIL", f"{torch.__version__} uses no NVIDIA device: {why}", remedy)
    places = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]
    for place in places:
        ones = torch.ones(64, 64, device=place)
        if float((ones @ ones).sum()) != 64.0**3:
            return Finding("torch", "FAIL", f"{torch.__version__} multiplies wrongly on {place}")
    precisions = "bfloat16" if places[0].type == "cpu" or torch.cuda.is_bf16_supported() else "no bfloat16"
    return Finding("torch", "ok", f"{torch.__version__} multiplies on {', '.join(map(str, places))} ({precisions})")


def bitsandbytes_step() -> Finding:
    """A forward and a backward pass through a small model whose linears are quantized to NF4."""
    from pipeline.model.load import load_base
    from pipeline.support.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        base = load_base(ModelConfig(path=str(write_tiny_model(Path(folder))), hold="quantized"), device())
    inputs = base.model.get_input_embeddings().weight  # type: ignore[operator]
    inputs.requires_grad_()
    tokens = torch.arange(1, 17, device=device())[None]
    loss = base.model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    norm = float(inputs.grad.norm())
    layers = base.identity.quantized_modules
    if not (layers and 0.0 < norm < float("inf") and float(loss) < float("inf")):
        told = f"loss {float(loss):.3g}, gradient {norm:.3g} through {layers} 4-bit layers"
        return Finding("bitsandbytes", "FAIL", told)
    return Finding("bitsandbytes", "ok", f"a gradient passes through {layers} 4-bit layers on {device()}")


def deepspeed_step() -> Finding:
    """An update of a small layer under ZeRO-2, in a process group of one."""
    one_process(0, 1, free_port())
    zero.join_process_group()
    train = TrainConfig(global_batch=2, micro_batch=2)
    filled = fill_ds_config(read_ds_config("zero2"), decided_by(train, 1, False), "zero2.json")
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).to(device())
    before = layer.weight.detach().clone()
    engine = zero.build_engine(layer, torch.optim.AdamW(layer.parameters(), lr=0.1), filled)
    engine.backward(engine(torch.ones(2, 8, device=device())).square().mean())
    engine.step()
    moved = float((zero.full_fp32(layer.weight) - before.cpu()).abs().max())
    torch.distributed.destroy_process_group()
    if not 0.0 < moved < 1.0:
        return Finding("deepspeed", "FAIL", f"a step of ZeRO-2 moved the weights by {moved:.3g}")
    return Finding("deepspeed", "ok", f"a step under ZeRO-2 on {device()}")


def nccl_step() -> Finding:
    """A sum over all visible devices."""
    devices = torch.cuda.device_count()
    if not devices:
        return Finding("nccl", "skipped", "no NVIDIA device: processes meet over gloo")
    torch.multiprocessing.spawn(sum_over_devices, (devices, free_port()), devices)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return Finding("nccl", "ok", f"{version} sums over {devices} device{'s' if devices > 1 else ''}")


def sum_over_devices(rank: int, size: int, port: int) -> None:
    """What each process of `nccl_step` does. Raises where the sum is wrong."""
    one_process(rank, size, port)
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl", rank=rank, world_size=size)
    ones = torch.ones(1, device="cuda")
    torch.distributed.all_reduce(ones)
    if float(ones) != size:
        raise RuntimeError(f"{size} ones add up to {float(ones)}")
    torch.distributed.destroy_process_group()


def one_process(rank: int, size: int, port: int) -> None:
    """The launcher's variables for one of `size` processes on this machine."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), LOCAL_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )


STEPS: dict[str, Callable[[], Finding]] = {
    "torch": torch_step, "bitsandbytes": bitsandbytes_step, "deepspeed": deepspeed_step, "nccl": nccl_step,
}


def tried(what: str) -> Finding:
    """A step's finding; of an exception what it was raised from, which names the fault."""
    try:
        return STEPS[what]()
    except Exception as error:
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        return Finding(what, "FAIL", f"{type(first).__name__}: {first}"[:300])


def main(words: list[str]) -> int:
    """Try what the first word names."""
    what, *rest, out = words
    if what == "configuration":
        from pipeline.doctor.configuration import configuration_findings

        given = json.loads(rest[0])
        found = configuration_findings(Request(**{**given, "overrides": tuple(given["overrides"])}))
    else:
        found = [tried(what)]
    write_json(Path(out), [asdict(one) for one in found])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
