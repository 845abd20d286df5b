"""What the member axis costs, as ratios measured in one run.

    python benchmarks/member_axis.py [--model FOLDER] [--rows 16] [--tokens 32] [--repeats 5]

1. a training step with LoRA Dropout (`split`, 4 draws) over one of plain LoRA: same rows, same base work;
2. a training step with `replicate` (4 draws) over one with `split`;
3. one forward pass with 8 mask members over 8 passes with one member each.

Pairs are timed alternately and the median of the pairwise ratios is printed, so that a machine whose speed drifts
still gives a fair comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from pipeline.adapters.attach import Adapters, attach
from pipeline.adapters.layout import RowLayout, plain_layout, replicate_layout, split_layout
from pipeline.adapters.members import MaskKey, Member, replicate_rows
from pipeline.adapters.spec import AdapterSpec
from pipeline.config import load_config
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.loss.objective import SupervisedLM
from pipeline.model.head import hidden_states
from pipeline.model.load import load_base
from pipeline.training.batch import lay_out


def paired_ratio(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median, minimum and maximum of time(first) / time(second), timed A B A B after one warm-up of each."""
    first(), second()
    ratios = []
    for _ in range(repeats):
        ratios.append(seconds_of(first) / seconds_of(second))
    return statistics.median(ratios), min(ratios), max(ratios)


def seconds_of(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def training_step(adapters: Adapters, examples: list[Encoded], layout: RowLayout) -> None:
    """Forward and backward of one micro-batch."""
    rows = lay_out(adapters, examples, layout, 0, MaskKey(0, 0))
    with adapters.axis.active(rows.plan):
        SupervisedLM(adapters.model)(**rows.tensors, row_weights=rows.weights).backward()
    adapters.model.zero_grad(set_to_none=True)


def forward(adapters: Adapters, examples: list[Encoded], members: list[Member]) -> None:
    """One pass with all `members`."""
    rows = lay_out(adapters, examples, plain_layout(len(examples)), 0, MaskKey(0, 0))
    plan = adapters.plan(members, len(examples), MaskKey(0, "test"))
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad(), adapters.axis.active(plan):
        hidden_states(adapters.model, *(replicate_rows(rows.tensors[name], len(members)) for name in names))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config("default", [f"model.path={arguments.model}"])
    base = load_base(config.model, device)
    spec = AdapterSpec.from_config(config.adapter, config.train.max_steps)
    adapters = attach(base.model, [spec], "all-linear", seed=0)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (arguments.rows, arguments.tokens), generator=generator).tolist()
    examples = [Encoded(str(i), tuple(r), (*[IGNORE_INDEX] * (len(r) - 1), r[-1])) for i, r in enumerate(ids)]
    positions = range(arguments.rows)
    cases = {
        "training step: LoRA Dropout, split over 4 draws / plain LoRA": (
            lambda: training_step(adapters, examples, split_layout(positions, 4)),
            lambda: training_step(adapters, examples, plain_layout(len(examples))),
        ),
        "training step: replicate, 4 draws / split over 4 draws": (
            lambda: training_step(adapters, examples, replicate_layout(len(examples), 4)),
            lambda: training_step(adapters, examples, split_layout(positions, 4)),
        ),
        "forward: 8 mask members in one pass / 8 passes of one": (
            lambda: forward(adapters, examples, [Member(0, draw) for draw in range(8)]),
            lambda: [forward(adapters, examples, [Member(0, draw)]) for draw in range(8)],
        ),
    }
    size = f"{arguments.rows} rows × {arguments.tokens} tokens"
    print(f"{arguments.model}, {size}, {torch.get_num_threads()} threads, {device}")
    for name, (first, second) in cases.items():
        median, low, high = paired_ratio(first, second, arguments.repeats)
        print(f"{name:62} {median:.2f}  ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
