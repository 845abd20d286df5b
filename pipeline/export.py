"""The export stage: PEFT folders that stock tools load, each proven in a clean process before it is published.

A LoRA-Dropout adapter is a plain LoRA at inference, and so is each of its weight-mask draws. AdaLoRA is exported as
the LoRA that it is then: one rank, padded with zeros to one that serving engines have kernels for, Λ folded into B.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adapters.attach import Adapters
from pipeline.adapters.build import attach_stored
from pipeline.adapters.members import Member
from pipeline.adapters.peft_adalora import shown_rank
from pipeline.adapters.peft_format import StoredAdapter, as_plain_lora, masked_matrices, read_adapter, write_adapter
from pipeline.config import RunConfig, load_config
from pipeline.config.method import WEIGHT_POSITIONS
from pipeline.data.rows import Row
from pipeline.data.splits import load_splits
from pipeline.distributed.worker import stage_main
from pipeline.distributed.world import leave_world, start_world
from pipeline.errors import LoradropError, RunFolderError
from pipeline.files import MANIFEST, publish_folder, read_json, write_json
from pipeline.model.load import BaseIdentity
from pipeline.prediction.task import Task, open_task
from pipeline.run_folder.paths import RunPaths, update_status
from pipeline.terminal import say

PROBE_PROMPTS = 8
TOLERANCE = 0.05
"""max |stock - ours| over max |adapter - base|."""


class ParityError(LoradropError):
    """A stock tool computes something else than we do, or an export has no effect."""


@dataclass(frozen=True)
class Exported:
    """One PEFT folder of the export."""

    folder: str
    member: Member


def export_run(run_dir: Path) -> None:
    """Write export/: adapter/, members/draw_NNN/, manifest.json with measured parity.

    Raises:
        RunFolderError: no adapter, or a method whose members are no plain LoRA.
        ParityError: parity is outside the tolerance, or an export equals the base.
    """
    paths = RunPaths(run_dir)
    config = load_config(paths.config)
    if not paths.adapter.is_dir():
        raise RunFolderError(str(paths.adapter), None, "does not exist", "Run the train stage first.")
    stored = read_adapter(paths.adapter)
    update_status(paths, "export", "running")
    splits = load_splits(config.data)
    world = start_world()
    task = open_task(config, splits, world.device)
    identity = task.base.identity
    adapters = attach_stored(task.base, [stored], config.train.seed)
    exported = planned_exports(config, paths, stored)
    if not exported:
        raise RunFolderError("export.forms", list(config.export.forms), "leaves nothing to export", "Add adapter.")
    result = read_json(paths.result) if paths.result.exists() else {}

    def fill(folder: Path) -> None:
        plain = as_plain_lora(stored)
        if stored.spec.kind != plain.spec.kind:
            say(f"AdaLoRA of rank {shown_rank(stored.spec)} (asked for/kept) becomes a LoRA of rank {plain.spec.rank}")
        write_exports(folder, exported, adapters, plain, config, identity.resolved)
        say(f"loading {len(exported)} exported adapters with stock PEFT in a clean process")
        parity = measure_parity(folder, exported, task, adapters, config, splits.calibration[:PROBE_PROMPTS])
        manifest = {
            "base": identity.as_dict(),
            "adapter_sha256": stored.sha256,
            "adapter": {"kind": stored.spec.kind, "rank": shown_rank(stored.spec), "exported_rank": plain.spec.rank},
            "exports": [
                {"folder": e.folder, "draw": e.member.draw, **p} for e, p in zip(exported, parity, strict=True)
            ],
            "ensemble": _ensemble_entry(config, exported, result),
            "tolerance": TOLERANCE,
            "note": "scores and temperature hold for the base named here, quantized as stated",
        }
        write_json(folder / MANIFEST, manifest)

    publish_folder(paths.export, fill)
    update_status(paths, "export", "done")
    leave_world()
    say(f"{len(exported)} adapters exported, parity within {TOLERANCE:.0%}")


def planned_exports(config: RunConfig, paths: RunPaths, stored: StoredAdapter) -> list[Exported]:
    """What export.forms and the chosen ensemble size ask for."""
    exported = [Exported("adapter", Member(0))] if "adapter" in config.export.forms else []
    if "members" not in config.export.forms:
        return exported
    active = [site for site in stored.spec.sites if site.rate > 0]
    odd = [site.position for site in active if site.position not in WEIGHT_POSITIONS]
    if odd and config.export.members:
        raise RunFolderError(
            "export.members",
            config.export.members,
            f"a member with masks on {', '.join(odd)} is no plain LoRA",
            "Leave it out: the adapter alone is exported.",
        )
    if odd:
        say(f"no members are exported: under masks on {', '.join(odd)} a member is no plain LoRA")
        return exported
    if not active:
        return exported
    size = config.export.members
    if size is None:
        size = chosen_size(read_json(paths.result)) if paths.result.exists() else config.ensemble.size
    return exported + [Exported(f"members/draw_{draw:03d}", Member(0, draw)) for draw in range(size)]


def write_exports(
    folder: Path, exported: list[Exported], adapters: Adapters, stored: StoredAdapter, config: RunConfig, base: str
) -> None:
    """One PEFT folder per export; a draw's masks are folded into its matrices."""
    draws = [e.member for e in exported]
    masks = adapters.plan(draws, 1, config.ensemble.seed, "test").masks
    plain = replace(stored.spec, sites=())
    for m, export in enumerate(exported):
        target = folder / export.folder
        target.mkdir(parents=True)
        is_draw = export.member.draw is not None
        matrices = masked_matrices(stored.matrices, masks, m) if is_draw else stored.matrices
        spec = plain if is_draw else stored.spec
        write_adapter(target, matrices, spec, adapters.layer_count, base, adapters.suffixes, stored.head)


def measure_parity(
    folder: Path, exported: list[Exported], task: Task, adapters: Adapters, config: RunConfig, rows: list[Row]
) -> list[dict[str, float]]:
    """Our logits against stock PEFT's, relative to the adapter's own effect, per export.

    Raises:
        ParityError: beyond the tolerance, or an export without effect.
    """
    prompts = [task.probe(row) for row in rows]
    members = [Member(None), *(e.member for e in exported)]
    ours = np.stack([_our_logits(task, adapters, ids, members, config.ensemble.seed) for ids in prompts], 1)
    folders = [folder / e.folder for e in exported]
    stock = _stock_logits(folders, task.base.identity, prompts, str(adapters.device))
    # What kernels and batch shapes differ by: the bare base in both. A classifier's base head is random in each.
    noise = 0.0 if task.base.identity.classes is not None else float(np.abs(stock["base"] - ours[0]).max())
    parity = []
    for k, export in enumerate(exported):
        effect = float(np.abs(ours[k + 1] - ours[0]).max())
        difference = float(np.abs(stock["adapters"][k] - ours[k + 1]).max())
        stock_effect = float(np.abs(stock["adapters"][k] - stock["base"]).max())
        if effect == 0.0 or stock_effect == 0.0:
            raise ParityError(f"{export.folder}: its output equals the base model's; the adapter has no effect")
        if difference > TOLERANCE * effect + 2 * noise or effect < 4 * noise:  # or it could hide in the noise
            raise ParityError(
                f"{export.folder}: stock PEFT differs by {difference:.4g} where the adapter's whole effect is"
                f" {effect:.4g} (allowed: {TOLERANCE:.0%}) and the bare base differs by {noise:.4g}"
            )
        ratio = difference / effect
        parity.append({"max_difference": difference, "max_effect": effect, "ratio": ratio, "base_noise": noise})
    return parity


def _our_logits(task: Task, adapters: Adapters, ids: list[int], members: list[Member], seed: int) -> np.ndarray:
    """(M, V) logits behind one prompt; (M, C) of a classifier."""
    adapters.model.eval()
    rows = torch.tensor([ids] * len(members), device=adapters.device)
    with torch.no_grad(), adapters.axis.active(adapters.plan(members, 1, seed, "test")):
        return task.probe_logits(rows).float().cpu().numpy()


def _stock_logits(
    folders: list[Path], identity: BaseIdentity, prompts: list[list[int]], device: str
) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        job: dict[str, Any] = {
            "base": identity.resolved,
            "quantization": identity.quantization,
            "compute_dtype": identity.compute_dtype,
            "double_quantization": identity.double_quantization,
            "device": device,
            "classes": identity.classes,
            "unquantized": identity.unquantized,
            "adapters": [str(folder) for folder in folders],
            "input_ids": prompts,
            "out": str(out),
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        script = Path(__file__).with_name("stock_parity.py")
        command = [sys.executable, "-I", str(script), str(Path(scratch) / "job.json")]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other process needs the room
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ParityError(f"stock PEFT cannot load the export:\n{done.stderr[-2000:]}")
        with np.load(out, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("base", "adapters")}


def _ensemble_entry(config: RunConfig, exported: list[Exported], result: dict[str, Any]) -> dict[str, Any] | None:
    draws = [e.folder for e in exported if e.member.draw is not None]
    if not draws:
        return None
    return {
        "members": draws,
        "weights": [1.0 / len(draws)] * len(draws),
        "average": config.ensemble.average,
        "temperature": _temperature(result, len(draws)),
    }


def chosen_size(result: dict[str, Any]) -> int:
    """Mask draws that validation chose; at least 2, since one draw alone is worse than the mean-field adapter."""
    entry = result.get("ensemble")
    return max(2, int(entry["chosen_size"])) if entry else 0


def _temperature(result: dict[str, Any], size: int) -> float | None:
    """The temperature that the report fitted for an ensemble of this size, where it did."""
    for system in result.get("systems", []):
        if system["key"] == f"masks_{size}" and system["temperature"]:
            return float(system["temperature"]["mean"])
    return None


def main(argv: list[str] | None = None) -> int:
    """`python -m pipeline.export --run-dir DIR`."""
    return stage_main("export", export_run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
