"""The export stage: PEFT folders that stock tools load, each proven in a clean process before it is published.

A LoRA-Dropout adapter is a plain LoRA at inference, and so is each of its weight-mask draws. AdaLoRA is exported as
the LoRA that it is then: one rank, padded with zeros to one that serving engines have kernels for, Λ folded into B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.build import attach_stored
from pipeline.adapters.peft_adalora import shown_rank
from pipeline.adapters.peft_format import StoredAdapter, as_plain_lora, read_adapter
from pipeline.config import ModelConfig, RunConfig
from pipeline.config.load import with_values
from pipeline.data.splits import Splits, load_splits
from pipeline.distributed.world import leave_world, start_world
from pipeline.ensemble.exported import reading_entry
from pipeline.ensemble.readout import read_result
from pipeline.ensemble.rows import RowForm
from pipeline.errors import RunFolderError
from pipeline.export.parity import PROBE_PROMPTS, TOLERANCE, measure_parity
from pipeline.export.peft import ensemble_entry, planned_exports, write_exports
from pipeline.files import MANIFEST, publish_folder, sha256_file, write_json
from pipeline.model.load import compute_dtype
from pipeline.prediction.task import open_task
from pipeline.prediction.unseen import require_unseen
from pipeline.run_folder.chain import Origin, require_adapter, require_members
from pipeline.run_folder.members import MEMBERS, read_members
from pipeline.run_folder.paths import RunPaths, load_saved, update_status
from pipeline.run_folder.readout import exported_readout
from pipeline.terminal import say


def export_run(run_dir: Path, trusted: bool = False) -> None:
    """Write export/: adapter/, draws/draw_NNN/, manifest.json with measured parity.

    Raises:
        RunFolderError: the adapter is missing, damaged, of another configuration or other data; result.json was made
            from another one, or from other predictions; a method whose members are no plain LoRA.
        ParityError: parity is outside the tolerance, or an export equals the base.
    """
    paths = RunPaths(run_dir)
    config = load_saved(paths.config, trusted)
    splits = load_splits(config.data)
    origin = Origin(config.training_sha256(), splits.fingerprint)
    stored, result = adapter_and_result(paths, config, splits, origin)
    update_status(paths, "export", "running")
    world = start_world()
    trained_in, compared_in = (str(dtype).removeprefix("torch.") for dtype in precisions(config.model, world.device))
    task = open_task(with_values(config, {"model.compute_dtype": compared_in}), splits, world.device)
    identity = replace(task.base.identity, compute_dtype=trained_in)
    adapters = attach_stored(task.base, [stored], config.train.seed, config.adapter.fused)
    exported = planned_exports(config.export, config.ensemble.size, result, stored)
    if not exported:
        raise RunFolderError("export.forms", list(config.export.forms), "leaves nothing to export", "Add adapter.")

    def readout(draws: Sequence[int | None], weights: Sequence[float] | None = None) -> dict[str, Any]:
        space, rule = config.ensemble.average, config.data.choice_score
        return exported_readout(paths, splits.calibration, space, draws, stored.sha256, rule, weights)

    def fill(folder: Path) -> None:
        plain = as_plain_lora(stored)
        if stored.spec.kind != plain.spec.kind:
            say(f"AdaLoRA of rank {shown_rank(stored.spec)} (asked for/kept) becomes a LoRA of rank {plain.spec.rank}")
        write_exports(folder, exported, adapters, plain, identity.resolved, task.passes.key)
        say(f"loading {len(exported)} exported adapters with stock PEFT in a clean process")
        parity = measure_parity(folder, exported, task, adapters, splits.calibration[:PROBE_PROMPTS], trusted)
        manifest = {
            "origin": origin.as_dict(),
            "base": identity.as_dict(),
            "reading": reading_entry(config, RowForm.of_run(config, splits)),
            "adapter_sha256": stored.sha256,
            "result_sha256": sha256_file(paths.result) if result else None,
            "settings_sha256": config.export_sha256(),
            "adapter": {
                "kind": stored.spec.kind, "rank": shown_rank(stored.spec), "exported_rank": plain.spec.rank,
                **readout([None]),
            },
            "exports": [
                {"folder": e.folder, "draw": e.member.draw, **p} for e, p in zip(exported, parity, strict=True)
            ],
            "ensemble": ensemble_entry(exported, readout, config.export, result),
            "tolerance": TOLERANCE,
            "compared_in": compared_in,
            "note": "scores and temperatures hold for the base named here, quantized as stated",
        }
        write_json(folder / MANIFEST, manifest)

    publish_folder(paths.export, fill)
    leave_world()
    say(f"{len(exported)} adapters exported, parity within {TOLERANCE:.0%}")


def adapter_and_result(
    paths: RunPaths, config: RunConfig, splits: Splits, origin: Origin
) -> tuple[StoredAdapter, dict[str, Any]]:
    """The adapter to be exported, and what the report found for it ({} without one).

    Raises:
        RunFolderError: one of them is missing, damaged, or made from something else than the configuration says.
    """
    require_adapter(paths, Origin(origin.config_sha256))
    require_unseen([paths.adapter], config.data, splits)
    stored = read_adapter(paths.adapter)
    result = read_result(paths, origin, stored.sha256, config.reading_sha256())
    if (paths.predictions / MEMBERS).exists():
        require_members(paths, read_members(paths.predictions), config.ensemble)
    return stored, result


def precisions(model: ModelConfig, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What the base computes in, and what it does in the comparison with stock PEFT: float32 on CPUs.

    PEFT multiplies adapters in fp32 and we in the base's precision. In bfloat16 this alone is 5 % of what an adapter
    does to SmolLM2-135M; in float32 the comparison sees nothing but what was exported.
    """
    trained_in = compute_dtype(model, device)
    return trained_in, torch.float32 if device.type == "cpu" else trained_in
