"""Bytes that a step sends: against figures worked out by hand, and against DeepSpeed's own counters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.two_ranks import two_ranks

from pipeline.config import load_config
from pipeline.config.deepspeed import DS_CONFIG_FOLDERS, read_ds_config
from pipeline.files import read_json, write_json
from pipeline.plan.communication import (
    CONTROL,
    NETWORKS,
    Collective,
    Network,
    Sizes,
    collectives,
    gathered_again,
    uncounted,
)
from pipeline.plan.communication_line import communication_line, sizes_of
from pipeline.support.tiny import tiny_decoder, tiny_llama

SMALL = Sizes(trained=((60, 41),), frozen=(1000, 6), embeddings=(77,), itemsize=2)
"""101 numbers are trained; one of 4 processes has at most 26 of them under ZeRO-1, 250 + 2 + 15 + 11 under ZeRO-3."""
PASSES = 2
NEXT = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 1}
"""Of ZeRO-3: nothing stays but what the module that is called next needs."""


def bytes_of(name: str, sizes: Sizes = SMALL, processes: int = 4, passes: int = 3) -> dict[str, int]:
    return {one.what: one.size for one in collectives(read_ds_config(name), sizes, processes, passes)}


def test_each_stage_sends_what_its_table_says() -> None:
    rest = {"norm": 4, "loss, guards, stops": 48}
    assert bytes_of("zero0") == {"gradients": 4 * 101, **rest}
    assert bytes_of("zero1") == {"gradients": 4 * 101, "parameters": 4 * 104, **rest}  # the next multiple of 2 × 4
    assert bytes_of("zero2") == bytes_of("zero2-offload") == {"gradients": 12 * 101, "parameters": 4 * 104, **rest}
    whole = 2 * (80 + 1000 + 8 + 60 + 44)  # in bfloat16, all of it fits into what may live
    assert bytes_of("zero3") == {"base and adapter": 3 * whole, "gradients": 3 * 4 * 104, **rest, "norm": 8}
    assert bytes_of("zero3-offload") == {**bytes_of("zero3"), "norm": 4}
    groups = Sizes(((60,), (41,)), (), (), 2)  # LoRA+: each group is padded
    assert bytes_of("zero2", groups) == {"gradients": 12 * 101, "parameters": 4 * (64 + 48), **rest, "norm": 2 * 4}
    alone = collectives(read_ds_config("zero3"), SMALL, 1, 1)
    assert [one.sent(1) for one in alone] == [0] * 4


def test_what_does_not_stay_is_gathered_again() -> None:
    zero = read_ds_config("zero3")["zero_optimization"]
    assert gathered_again(zero, 2 * 10**8) == 0 and gathered_again(zero, 10**9) == 8 * 10**8
    assert gathered_again({**zero, "stage3_prefetch_bucket_size": 0}, 10**9) == 95 * 10**7  # 10^8, there and back
    assert gathered_again({**zero, **NEXT}, 10**9) == 10**9
    settings = {**read_ds_config("zero3"), "zero_optimization": {**zero, **NEXT}}
    gathered = collectives(settings, SMALL, 4, 3)[0]
    assert gathered == Collective("all-gather", "base and adapter", 3 * 2 * (80 + 2 * 1112), 3 * (1 + 2 * 4))


def test_a_ring_sends_and_takes_what_the_formulas_say() -> None:
    assert Collective("all-reduce", "", 1000, 1).sent(8) == 1750
    assert Collective("all-gather", "", 1000, 1).sent(8) == Collective("reduce-scatter", "", 1000, 1).sent(8) == 875
    assert Collective("all-gather", "", 1001, 1).sent(8) == 876  # rounded up
    network = Network("", within=100.0, between=10.0, hop_within=1.0, hop_between=5.0, node=4)
    gather = Collective("all-gather", "", 1600, 3)
    assert network.seconds(gather, 4) == (1200 / 100, 3 * 3)  # one node: 3 hops
    assert network.seconds(gather, 16) == (1500 / 10, 3 * (12 * 1 + 3 * 5))  # 4 nodes: the slower link, 15 hops
    reduce = Collective("all-reduce", "", 16000, 3)
    assert network.seconds(reduce, 4) == (24000 / 100, 3 * 2 * 3)
    assert network.seconds(reduce, 16) == (30000 / 10, 3 * 2 * (12 + 3 * 5))
    small = Collective("all-reduce", "", 16, 3)
    assert network.seconds(small, 16) == (32 / 10, 3 * 2 * (3 * 1 + 2 * 5))  # the tree: log2 of 4 nodes
    fast, slow = (sum(network.seconds(reduce, 64)) for network in NETWORKS)
    assert fast < slow


def test_settings_that_would_send_something_else_are_noticed() -> None:
    assert all(uncounted(read_ds_config(path.stem)) is None for path in DS_CONFIG_FOLDERS[0].glob("*.json"))
    zero2, zero3 = read_ds_config("zero2"), read_ds_config("zero3")

    def changed(settings: dict[str, Any], **changes: Any) -> str | None:
        return uncounted({**settings, "zero_optimization": {**settings["zero_optimization"], **changes}})

    assert changed(zero2, reduce_scatter=False) is None  # all-reduced in either case
    assert changed(zero3, reduce_scatter=False) == "reduce_scatter=false"
    assert changed(zero2, zero_quantized_gradients=True) == "zero_quantized_gradients"
    assert changed(zero3, stage3_param_persistence_threshold=10) == "a stage3_param_persistence_threshold that is not 0"
    del zero3["communication_data_type"]  # that of the parameters
    other = "a communication_data_type that is not fp32"
    assert uncounted(zero3) == uncounted({**zero2, "communication_data_type": "bf16"}) == other


def test_sizes_are_those_of_the_shapes() -> None:
    config = load_config(None, ["adapter.rank=4", "train.lora_plus_ratio=2"])
    linears = 2 * [64 * 64, 64 * 32, 64 * 32, 64 * 64, 64 * 128, 64 * 128, 128 * 64]
    tied = sizes_of(tiny_llama().config, torch.bfloat16, config)
    assert sorted(tied.frozen) == sorted([*(size // 4 for size in linears), *5 * [64]])  # 4 weights in a number
    assert tied.embeddings == () and tied.itemsize == 2  # tied to the head, which stays whole
    assert len(tied.trained) == 2 and sum(tied.adapter) == 8192
    assert sum(tied.trained[1]) == 2 * 4 * (64 + 32 + 32 + 64 + 128 + 128 + 64)  # lora_B
    plain = load_config(None, ["adapter.rank=4", "model.quantization=none"])
    loose = sizes_of(tiny_decoder("mistral").config, torch.float32, plain)
    assert loose.embeddings == (64 * 64,) and sorted(loose.frozen) == sorted([*linears, *5 * [64]])
    assert len(loose.trained) == 1


def test_a_dry_run_says_what_each_process_sends(tiny_settings: list[str], tmp_path: Path) -> None:
    def said(processes: int, *extra: str) -> str:
        text = communication_line(load_config(None, [*tiny_settings, "model.compute_dtype=float32", *extra]), processes)
        assert all(len(line) <= 80 for line in text.splitlines() if str(tmp_path) not in line)  # a path stays whole
        return " ".join(text.split())

    assert said(1) == ""
    assert said(2, "train.micro_batch=2") == (
        "communication of a step (zero2): each of 2 processes sends 81,972 bytes (2 passes; gradients by all-reduce"
        " 65,536, parameters by all-gather 16,384, norm and loss 52)"
    )
    nodes = ("launch.nodes=2", "launch.processes=2", "launch.master_addr=10.0.0.1", "launch.master_port=29500")
    sharded = said(2, "train.deepspeed=zero3", "train.micro_batch=2", *nodes)
    assert "zero3): each of 4 processes sends " in sharded  # once what 14 linears, 5 norms and the adapter hold
    assert f"(1 pass; base and adapter by all-gather {3 * (36864 + 4 * 5 * 64 + 4 * 8192) // 4:,}, " in sharded
    assert "a step of one pass; " in said(2, "train.micro_tokens=64")
    assert "not counted (AdaLoRA's budget" in said(2, "adapter.kind=adalora")
    own, zero3 = tmp_path / "own.json", read_ds_config("zero3")
    write_json(own, {**zero3, "zero_optimization": {**zero3["zero_optimization"], **NEXT}})
    assert f"{own}): each of 2 processes sends about " in said(2, f"train.deepspeed={own}")
    write_json(own, {"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}})
    assert f"not counted ({own} has zero_quantized_gradients)" in said(2, f"train.deepspeed={own}")
    assert said(2, f"model.path={tmp_path}") == ""  # of which the memory plan has said why


def counted(folder: Path, settings: list[str], files: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Train under each file in two processes, one after another; what the first process counted in one step of each."""
    write_json(folder / "runs.json", {name: [*settings, f"train.deepspeed={file}"] for name, file in files.items()})
    two_ranks("communication_worker.py", str(folder), timeout=1800)
    return read_json(folder / "counted.json")


@pytest.mark.slow
def test_bytes_are_those_that_deepspeed_counts(tiny_settings: list[str], tmp_path: Path) -> None:
    """Its logger has bytes of what each call is given: of an all-gather that is one process's part."""
    zero3, tight = read_ds_config("zero3"), tmp_path / "tight.json"
    write_json(tight, {**zero3, "zero_optimization": {**zero3["zero_optimization"], **NEXT}})
    files = {path.stem: path.stem for path in sorted(DS_CONFIG_FOLDERS[0].glob("*.json"))} | {"tight": str(tight)}
    settings = [
        *tiny_settings, "train.micro_batch=2", "train.max_steps=9", "train.validate_every_steps=9",
        "train.checkpoint_every_steps=9", "model.compute_dtype=float32", "train.lora_plus_ratio=2",
    ]
    found = counted(tmp_path, settings, files)
    sizes = sizes_of(tiny_llama().config, torch.float32, load_config(None, settings))
    called = {
        "all-reduce": "all_reduce", "all-gather": "all_gather_into_tensor", "reduce-scatter": "reduce_scatter_tensor",
    }
    for name, file in files.items():
        wanted = dict.fromkeys(found[name]["deepspeed"], 0)
        for one in collectives(read_ds_config(file), sizes, 2, PASSES):
            if one.what != "loss, guards, stops":  # made by torch, without DeepSpeed
                wanted[called[one.kind]] += one.size // (2 if one.kind == "all-gather" else 1)
        if name == "tight":
            # Gathered once: the last norm, which its own backward pass follows; in the first layer the norm, and the
            # 4-bit weights of q, k and v, whose input needs no gradient.
            once = 2 * 64 + (64 * 64 + 2 * 64 * 32) // 8
            wanted["all_gather_into_tensor"] -= PASSES * once * sizes.itemsize // 2
        assert found[name] == {"deepspeed": wanted, "ours": sorted(CONTROL)}, name
