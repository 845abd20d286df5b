"""The proof of an export: our logits against a stock tool's, in a clean process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.data.rows import Row
from pipeline.errors import LoradropError
from pipeline.export.peft import Exported
from pipeline.model.load import BaseIdentity
from pipeline.prediction.task import Task

PROBE_PROMPTS = 8


TOLERANCE = 0.05
"""max |stock - ours| over max |adapter - base|."""


class ParityError(LoradropError):
    """A stock tool computes something else than we do, or an export has no effect."""


def measure_parity(
    folder: Path, exported: list[Exported], task: Task, adapters: Adapters, rows: list[Row], trusted: bool = False
) -> list[dict[str, float]]:
    """Our logits against stock PEFT's, relative to the adapter's own effect, per export.

    Args:
        trusted: whether code that comes with the model may run.

    Raises:
        ParityError: beyond the tolerance, or an export without effect.
    """
    prompts = [task.probe(row) for row in rows]
    members = [Member(None), *(e.member for e in exported)]
    ours = np.stack([_our_logits(task, adapters, ids, members) for ids in prompts], 1)
    folders = [folder / e.folder for e in exported]
    stock = _stock_logits(folders, task.base.identity, prompts, str(adapters.device), trusted)
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


def _our_logits(task: Task, adapters: Adapters, ids: list[int], members: list[Member]) -> np.ndarray:
    """(M, V) logits behind one prompt; (M, C) of a classifier."""
    adapters.model.eval()
    rows = torch.tensor([ids] * len(members), device=adapters.device)
    with torch.no_grad(), adapters.axis.active(adapters.plan(members, 1, task.passes.key)):
        return task.probe_logits(rows).float().cpu().numpy()


def _stock_logits(
    folders: list[Path], identity: BaseIdentity, prompts: list[list[int]], device: str, trusted: bool
) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.npz"
        job: dict[str, Any] = {
            "base": identity.resolved,
            "quantization": identity.quantization,
            "compute_dtype": identity.compute_dtype,
            "double_quantization": identity.double_quantization,
            "device": device,
            "trust_remote_code": trusted,
            "classes": identity.classes,
            "unquantized": identity.unquantized,
            "adapters": [str(folder) for folder in folders],
            "input_ids": prompts,
            "out": str(out),
        }
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        script = Path(__file__).with_name("stock_peft.py")
        command = [sys.executable, "-I", str(script), str(Path(scratch) / "job.json")]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the other process needs the room
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise ParityError(f"stock PEFT cannot load the export:\n{done.stderr[-2000:]}")
        with np.load(out, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("base", "adapters")}
