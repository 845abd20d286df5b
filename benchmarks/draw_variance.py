"""What train.draw_layout=split costs in variance against replicate, for a configuration: rows, masks, adapter.

    PYTHONPATH=. python benchmarks/draw_variance.py [--config RECIPE] [--steps 4] [--repeats 8] [key=value …]

No step is taken: gradients of the same rows are compared under other masks. A fresh adapter has no gradient on A; to
measure a trained one: adapter.init_from=RUN/adapter. Each step costs repeats × (1 + train.draws) passes of the batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from pipeline.adapters.build import attach_adapter
from pipeline.adapters.members import MaskKey
from pipeline.config import RunConfig, load_config
from pipeline.data.splits import load_splits
from pipeline.errors import EXIT_OK, EXIT_USER, ConfigError, UserError
from pipeline.loss.consistency import TrainingObjective
from pipeline.prediction.task import open_task, training_examples
from pipeline.training.draw_variance import LAYOUTS, DrawVariance, measure, step_gradient
from pipeline.training.loader import open_loader


def gradients_of(config: RunConfig) -> Callable[[str, int, int], torch.Tensor]:
    """(layout, step, repeat) -> the gradient, as training computes it.

    Raises:
        ConfigError: nothing is masked, or a step has one draw.
    """
    method = config.adapter.resolved_method()
    if not any(site.rate > 0 for site in method.sites):
        raise ConfigError("adapter.method", config.adapter.method, "masks nothing", "Take a method that does.")
    if config.train.draws < 2:
        raise ConfigError("train.draws", config.train.draws, "leaves nothing to divide", "Set train.draws=4.")
    splits = load_splits(config.data)
    task = open_task(config, splits, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    examples = training_examples(task, splits.train, config.data)
    adapters = attach_adapter(config.adapter, task.base, config.train.max_steps, config.train.seed)
    adapters.model.train()
    term = adapters.specs[0].consistency
    objective = TrainingObjective(task.objective(), adapters.axis)
    loaders = {
        layout: open_loader(
            config.train.model_copy(update={"draw_layout": layout}), config.data.max_tokens, examples, adapters.specs[0]
        )
        for layout in LAYOUTS
    }

    def gradient_of(layout: str, step: int, repeat: int) -> torch.Tensor:
        key = MaskKey(config.train.seed, f"draw variance {step} {layout} {repeat}")
        pad_id = task.base.tokenizer.pad_token_id
        batch = loaders[layout].of_step(step)
        return step_gradient(adapters, objective, batch, pad_id, key, task.padding, term.weight, task.label_smoothing)

    return gradient_of


def table(found: DrawVariance, parts: int) -> str:
    """What was measured, and what it means; `parts`: the draws, or pairs of draws, that `split` divides rows among."""
    lines = [f"{'layout':12}{'cost of a step':>16}{'norm':>12}{'cosine':>9}{'variance by masks':>20}"]
    for layout, noise, cost in ((LAYOUTS[0], found.split, 1), (LAYOUTS[1], found.replicate, parts)):
        lines.append(f"{layout:12}{f'{cost} ×':>16}{noise.norm:>12.4g}{noise.cosine:>9.3f}{noise.variance:>20.4g}")
    lines += [
        f"variance by rows, the same for both: {found.rows:.4g}",
        f"By masks split has {found.ratio:.2f} × the variance of replicate (1 = examples answer to a draw alike,"
        f" {parts} = independently); with the rows a step has {found.step_ratio:.2f} ×, at 1/{parts} of the work.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure and print; 2 where the user must change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="default", help="a YAML file or the name of a recipe")
    parser.add_argument("--steps", type=int, default=4, help="batches, 2 or more")
    parser.add_argument("--repeats", type=int, default=8, help="sets of masks per batch and layout, 2 or more")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    if min(given.steps, given.repeats) < 2:
        parser.error("--steps and --repeats are 2 or more: a variance needs two values")
    try:
        config = load_config(given.config, given.overrides)
        paired = config.adapter.resolved_method().consistency.kind != "none"
        parts = config.train.draws // 2 if paired else config.train.draws
        print(table(measure(gradients_of(config), given.steps, given.repeats), parts))
    except UserError as error:
        print(f"loradrop: {error}", file=sys.stderr)
        return EXIT_USER
    return EXIT_OK


if __name__ == "__main__":
    raise SystemExit(main())
