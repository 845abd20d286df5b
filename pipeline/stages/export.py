"""The export stage: PEFT folders that stock tools load, each proven in a clean process before it is published.

A LoRA-Dropout adapter is a plain LoRA at inference, and so is each of its weight-mask draws. AdaLoRA is exported as
the LoRA that it is then: one rank, padded with zeros to one that serving engines have kernels for, Λ folded into B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from pipeline.export.alone.folder import Form, stand_alone
from pipeline.export.order import Exported, Loaded, Order, Served
from pipeline.export.parity import TOLERANCE
from pipeline.export.peft import ensemble_entry
from pipeline.export.served import reported_scores
from pipeline.export.targets import target_of, verified
from pipeline.files import MANIFEST, publish_folder, sha256_file, write_json
from pipeline.model.content import base_content
from pipeline.model.kind import model_kind
from pipeline.model.load import compute_dtype
from pipeline.prediction.task import open_task
from pipeline.prediction.unseen import require_unseen
from pipeline.run_folder.chain import Origin, require_adapter, require_members
from pipeline.run_folder.members import MEMBERS, read_members
from pipeline.run_folder.paths import RunPaths, load_saved, update_status
from pipeline.run_folder.readout import exported_readout
from pipeline.terminal import say


def export_run(run_dir: Path, trusted: bool = False) -> None:
    """Write export/: the folders of export.forms, and manifest.json with what was measured of each.

    Raises:
        UserError: a form that this run cannot be exported in; the adapter is missing, damaged, of another configuration
            or other data; result.json was made from another one, or from other predictions.
        ParityError: a stock tool computes something else than we do, or an export equals the base.
    """
    paths = RunPaths(run_dir)
    config = load_saved(paths.config, trusted)
    splits = load_splits(config.data)
    origin = Origin(config.training_sha256(), splits.fingerprint)
    stored, result = adapter_and_result(paths, config, splits, origin)
    order = Order(config, splits, stored, as_plain_lora(stored), result, model_kind(config.model), trusted)
    planned: dict[str, list[Exported]] = {
        name: found for name in config.export.forms if (found := target_of(name).plan(order))
    }
    count = sum(map(len, planned.values()))
    if not count:
        raise RunFolderError("export.forms", list(config.export.forms), "leaves nothing to export", "Add adapter.")
    update_status(paths, "export", "running")
    loaded = load(order)

    def readout(draws: Sequence[int | None], weights: Sequence[float] | None = None) -> dict[str, Any]:
        space, rule = config.ensemble.average, config.data.choice_score
        return exported_readout(paths, splits.calibration, space, draws, stored.sha256, rule, weights)

    def fill(folder: Path) -> None:
        write_json(folder / MANIFEST, {
            "origin": origin.as_dict(),
            "result_sha256": sha256_file(paths.result) if result else None,
            **write_forms(folder, loaded, planned, readout),
        })

    publish_folder(paths.export, fill)
    leave_world()
    say(f"{count} folders exported, each loaded by its own tool and within {TOLERANCE:.0%} of what was evaluated")


def write_forms(
    folder: Path, loaded: Loaded, planned: Mapping[str, Sequence[Exported]],
    readout: Callable[[Sequence[int | None], Sequence[float] | None], dict[str, Any]],
) -> dict[str, Any]:
    """Write what is planned, have each form proven by its own tool, and make it stand alone: entries of the manifest.

    Args:
        planned: form -> its folders.
        readout: draws and their weights -> how they are read out together (`run_folder.readout: exported_readout`).

    Raises:
        ParityError: a stock tool computes something else than we do, or an export equals the base.
    """
    config, result, kind, rank = loaded.config, loaded.result, loaded.stored.spec.kind, loaded.plain.spec.rank
    if kind != loaded.plain.spec.kind:
        say(f"AdaLoRA of rank {shown_rank(loaded.stored.spec)} (asked for/kept) becomes a LoRA of rank {rank}")
    targets = {name: target_of(name) for name in planned}
    for name, exported in planned.items():
        targets[name].write(loaded, folder, exported)
    measured = verified(loaded, folder, planned)
    members = [one for name, ones in planned.items() if targets[name].use and not targets[name].merged for one in ones]
    alone, ensemble = readout([None], None), ensemble_entry(members, readout, config.export, result)
    forms = {
        name: stand_alone(loaded, folder, targets[name], ones, Form.of(ones, measured, alone, ensemble, result))
        for name, ones in planned.items()
    }
    return {
        "base": base_entry(loaded),
        "reading": reading_entry(config, RowForm.of_run(config, loaded.splits)),
        "adapter_sha256": loaded.stored.sha256,
        "settings_sha256": config.export_sha256(),
        "adapter": {"kind": kind, "rank": shown_rank(loaded.stored.spec), "exported_rank": rank, **alone},
        "exports": [plain_entry(one, result) for one in measured],
        "forms": forms,
        "ensemble": ensemble,
        "tolerance": TOLERANCE,
        "compared_in": loaded.task.base.identity.compute_dtype,
        "note": "scores and temperatures hold for the base named here, quantized as stated",
    }


def load(order: Order) -> Loaded:
    """The order with its model, in the precision of the comparison."""
    config, world = order.config, start_world()
    trained_in, compared_in = (str(dtype).removeprefix("torch.") for dtype in precisions(config.model, world.device))
    task = open_task(with_values(config, {"model.compute_dtype": compared_in}), order.splits, world.device)
    adapters = attach_stored(task.base, [order.stored], config.train.seed, config.adapter.fused)
    identity = replace(task.base.identity, compute_dtype=trained_in)
    content = base_content(config.model, getattr(task.base.model.config, "_commit_hash", None))
    return Loaded(**vars(order), task=task, adapters=adapters, identity=identity, content=content)


def base_entry(loaded: Loaded) -> dict[str, Any]:
    """What the manifest says of the base: what it is, how it is loaded, and under `path` where it lay for this run."""
    identity = {name: value for name, value in loaded.identity.as_dict().items() if name != "resolved"}
    return {**identity, **loaded.content, "revision": loaded.content["commit"] or identity["revision"]}


def plain_entry(measured: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the manifest; of another base than the evaluated one, its scores beside those that were reported."""
    served: Served | None = measured.get("served")
    if served is None:
        return measured
    scores = {"scores": served.scores, "evaluated": reported_scores(result, "mean_field")}
    return {**measured, "served": {**served.readout, **scores}}


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
