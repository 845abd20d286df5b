"""What communication should cost per training step: a table for 8, 64 and 512 devices under each ZeRO stage.

    PYTHONPATH=. python benchmarks/communication.py                          # 8B-shaped, rank 16 on all linears, NF4
    PYTHONPATH=. python benchmarks/communication.py --passes 1 --devices 16 model.path=/models/x adapter.rank=64

Nothing is measured or sent: `pipeline.plan.communication` says what is counted and what is assumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoConfig

from benchmarks.memory_plan import EIGHT_BILLION
from pipeline.config import load_config
from pipeline.config.deepspeed import DS_CONFIG_FOLDERS, read_ds_config, zero_stage
from pipeline.plan.communication import NETWORKS, Collective, Network, Sizes, collectives
from pipeline.plan.communication_line import sizes_of
from pipeline.plan.memory import base_description

EIGHT = ("adapter.rank=16", "adapter.method=none")
"""Of the 8B-shaped base, which is no folder: its shape is enough."""


def sizes_for(overrides: Sequence[str]) -> Sizes:
    """Of the base that is named, in bfloat16; else of the 8B-shaped one."""
    named = any(word.startswith("model.path=") for word in overrides)
    config = load_config(None, [*(() if named else EIGHT), *overrides])
    description = base_description(config.model)[1] if named else AutoConfig.for_model(**EIGHT_BILLION)
    return sizes_of(description, torch.bfloat16, config)


def table(sizes: Sizes, devices: Sequence[int], passes: Sequence[int]) -> list[str]:
    """Rows in Markdown: what each device sends, and how long that takes: at the rate of the links + in hops."""
    names = sorted(path.stem for path in DS_CONFIG_FOLDERS[0].glob("*.json") if "offload" not in path.stem)
    lines = [
        "| file | passes | devices | each sends | " + " | ".join(one.name for one in NETWORKS) + " |",
        "|---|---|---|---|" + "---|" * len(NETWORKS),
    ]
    for name in names:
        settings = read_ds_config(name)
        every = zero_stage(settings) >= 2  # the others send nothing before the last pass
        for count in passes if every else passes[:1]:
            for number in devices:
                found = collectives(settings, sizes, number, count)
                sent = sum(one.sent(number) for one in found)
                times = " | ".join(took(network, found, number) for network in NETWORKS)
                lines.append(f"| `{name}` | {count if every else 'any'} | {number} | {sent / 1e6:,.1f} MB | {times} |")
    return lines


def took(network: Network, found: Sequence[Collective], devices: int) -> str:
    """Milliseconds, sending + hops."""
    parts = zip(*(network.seconds(one, devices) for one in found), strict=True)
    return " + ".join(f"{1000 * sum(part):,.1f}" for part in parts) + " ms"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 4], help="per optimizer step")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    sizes = sizes_for(arguments.overrides)
    divided = sum((*sizes.frozen, *sizes.embeddings, *sizes.adapter)) * sizes.itemsize
    print(f"{sum(sizes.adapter):,} trained parameters; ZeRO-3 divides {divided / 1e9:.2f} GB\n")
    print("\n".join(table(sizes, arguments.devices, arguments.passes)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
