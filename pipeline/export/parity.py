"""The proof of an export: our logits against a stock tool's, in a clean process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.adapters.members import Member
from pipeline.export.order import Exported, Loaded, ParityError
from pipeline.model.load import BaseIdentity
from pipeline.terminal import say

PROBE_PROMPTS = 8


TOLERANCE = 0.05
"""max |stock - ours| over max |adapter - base|."""


def verify_peft(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """Our logits against stock PEFT's, relative to the adapter's own effect, per export.

    Raises:
        ParityError: beyond the tolerance, or an export without effect.
    """
    say(f"loading {len(exported)} exported adapters with stock PEFT in a clean process")
    prompts = probe_prompts(loaded)
    ours = our_logits(loaded, prompts, [Member(None), *(e.member for e in exported)])
    folders = [folder / e.folder for e in exported]
    identity = loaded.task.base.identity
    stock = stock_logits(identity, prompts, str(loaded.adapters.device), folders, loaded.trusted)
    # What kernels and batch shapes differ by: the bare base in both. A classifier's base head is random in each.
    noise = 0.0 if identity.classes is not None else float(np.abs(stock["base"] - ours[0]).max())
    return [
        judged(f"{export.folder}: stock PEFT", ours[k], ours[0], stock["adapters"][k - 1], stock["base"], noise)
        for k, export in enumerate(exported, start=1)
    ]


def judged(
    who: str, ours: NDArray[Any], our_base: NDArray[Any], theirs: NDArray[Any], their_base: NDArray[Any],
    noise: float = 0.0,
) -> dict[str, Any]:
    """What an export differs by, relative to the adapter's own effect: for the manifest.

    Args:
        who: folder and tool, for errors.
        ours, our_base: logits or log-probabilities of any shape, of our member and of the base alone.
        theirs, their_base: the same of the export and of the base in the tool that loads it.
        noise: what the bare base differs by between the two.

    Raises:
        ParityError: beyond the tolerance, or an export without effect.
    """
    effect = float(np.abs(ours - our_base).max())
    difference = float(np.abs(theirs - ours).max())
    their_effect = float(np.abs(theirs - their_base).max())
    if effect == 0.0 or their_effect == 0.0:
        raise ParityError(f"{who} says what the base model says: the adapter has no effect")
    beyond = difference > TOLERANCE * effect + 2 * noise
    if not np.isfinite(difference) or beyond or effect < 4 * noise:  # or it could hide in the noise
        raise ParityError(
            f"{who} differs by {difference:.4g} where the adapter's whole effect is"
            f" {effect:.4g} (allowed: {TOLERANCE:.0%}) and the bare base differs by {noise:.4g}"
        )
    return {
        "max_difference": difference, "max_effect": effect, "ratio": difference / effect, "base_noise": noise,
    }  # fmt: skip


def probe_prompts(loaded: Loaded) -> list[list[int]]:
    """Token ids of the calibration rows that are compared."""
    return [loaded.task.probe(row) for row in loaded.splits.calibration[:PROBE_PROMPTS]]


def our_logits(loaded: Loaded, prompts: Sequence[list[int]], members: Sequence[Member]) -> NDArray[Any]:
    """(M, N, V) logits behind each prompt; (M, N, C) of a classifier."""
    task, adapters = loaded.task, loaded.adapters
    adapters.model.eval()
    found = []
    for ids in prompts:
        rows = torch.tensor([ids] * len(members), device=adapters.device)
        with torch.no_grad(), adapters.axis.active(adapters.plan(members, 1, task.passes.key)):
            found.append(task.probe_logits(rows).float().cpu().numpy())
    return np.stack(found, 1)


def our_log_probs(loaded: Loaded, prompts: Sequence[list[int]], members: Sequence[Member]) -> NDArray[Any]:
    """(M, N, V) log-probabilities of the token behind each prompt, in float64."""
    logits = torch.from_numpy(our_logits(loaded, prompts, members))
    found: NDArray[Any] = torch.log_softmax(logits.double(), -1).numpy()
    return found


def stock_logits(
    identity: BaseIdentity, prompts: Sequence[list[int]], device: str, folders: Sequence[Path], trusted: bool
) -> dict[str, NDArray[Any]]:
    """`base` (N, V) and `adapters` (K, N, V) of stock transformers and PEFT, in a clean process.

    Raises:
        ParityError: they cannot load the base, or an adapter.
    """
    names = ", ".join(Path(folder).name for folder in folders) or Path(identity.resolved).name
    return in_clean_process(Path(__file__).with_name("stock_peft.py"), {
        "base": identity.resolved,
        "quantization": identity.quantization,
        "compute_dtype": identity.compute_dtype,
        "double_quantization": identity.double_quantization,
        "device": device,
        "trust_remote_code": trusted,
        "classes": identity.classes,
        "unquantized": identity.unquantized,
        "adapters": [str(folder) for folder in folders],
        "input_ids": list(prompts),
    }, f"{names} cannot be loaded by stock transformers and PEFT")


def in_clean_process(
    script: Path, job: Mapping[str, Any], failure: str, python: str = sys.executable
) -> dict[str, NDArray[Any]]:
    """The arrays that a stock tool writes for a job, in a process of its own that imports nothing of ours.

    Args:
        script: takes the name of a JSON file: the job, and under `out` where the arrays belong.
        failure: beginning of the error, before what the process has said.
        python: that has the tool.

    Raises:
        ParityError: the process fails, or cannot be started.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the other process needs the room
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "job.json", Path(scratch) / "out.npz"
        given.write_text(json.dumps({**job, "out": str(out)}))
        command = [python, "-I", str(script), str(given)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise ParityError(f"{python} cannot be started: {error}") from error
        if done.returncode or not out.exists():
            raise ParityError(f"{failure}:\n{done.stderr[-2000:]}")
        with np.load(out, allow_pickle=False) as arrays:
            return dict(arrays)
