"""Writes and proves the folder of an engine: NAME/adapter, NAME/draw_NNN where draws are exported, NAME/serve.txt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter
from pipeline.export.engines import sglang, vllm
from pipeline.export.engines.rules import Engine, base_argument, faults, largest_rank, notes, refuse
from pipeline.export.order import Exported, Loaded, Order, ParityError, Target
from pipeline.export.parity import verify_peft
from pipeline.export.peft import loras, plan_draws, write_lora
from pipeline.files import write_text
from pipeline.model.load import load_skeleton
from pipeline.terminal import say

COMMAND = "serve.txt"
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (vllm.ENGINE, sglang.ENGINE)}


def _plan(engine: Engine, order: Order) -> list[Exported]:
    config = load_skeleton(order.config.model).model.config if order.model_kind == "causal" else None
    refuse(engine, order, str(getattr(config, "model_type", "")), order.plain)
    draws = plan_draws(order) if "draws" in order.config.export.forms else []
    return [
        Exported(f"{engine.name}/adapter", Member(0)),
        *(Exported(f"{engine.name}/{Path(one.folder).name}", one.member) for one in draws),
    ]


def uniform(stored: StoredAdapter, ranks: Sequence[int]) -> StoredAdapter:
    """The same plain LoRA with one rank, padded with zeros to the next of `ranks`, and one scaling alpha / R.

    Scalings that differ between layers (rsLoRA under a rank pattern, alpha patterns) are folded into B.
    """
    spec = stored.spec
    rank = next(served for served in ranks if served >= largest_rank(stored))
    scale = spec.scaling_of(min(stored.matrices))
    padded = {}
    for name, (A, B, *_) in stored.matrices.items():
        missing = rank - len(A)
        folded = B * (spec.scaling_of(name) / scale)  # exactly B where all scalings are one
        padded[name] = (torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(folded, (0, missing)))
    plain = replace(
        spec, rank=rank, alpha=scale * rank, rslora=False, rank_pattern={}, alpha_pattern={}, sites=(),
    )  # fmt: skip
    return replace(stored, spec=plain, matrices=padded)


def write(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> None:
    """An engine's folders: the adapter, and the draws where they are exported, as `uniform` LoRA; the command."""
    engine = _engine(exported[0])
    for target, stored in loras(loaded, folder, exported):
        write_lora(loaded, target, uniform(stored, engine.ranks))
    write_text(folder / engine.name / COMMAND, "\n".join(_command(loaded, exported)) + "\n")


def _command(loaded: Loaded, exported: Sequence[Exported]) -> list[str]:
    engine = _engine(exported[0])
    rank = next(served for served in engine.ranks if served >= largest_rank(loaded.plain))
    names = [Path(one.folder).name for one in exported]
    return [*notes(engine, loaded, names), engine.command(base_argument(loaded), rank, names, loaded.identity)]


def _loading(loaded: Loaded, exported: Sequence[Exported]) -> str:
    return "As `serve.txt` says:\n\n```\n" + "\n".join(_command(loaded, exported)) + "\n```"


def verify(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """The loaders' rules, what stock PEFT makes of the folders, and the engine itself where it is there.

    Raises:
        ParityError: a folder that an engine would not serve; beyond the tolerance; an adapter without effect.
    """
    for one in exported:
        engine = _engine(one)
        if found := faults(engine, folder / one.folder):
            said = "; ".join(found)
            raise ParityError(f"{one.folder}: {engine.title} {engine.version} would not serve it: {said}")
    by_peft = dict(zip(exported, verify_peft(loaded, folder, exported), strict=True))
    entries: dict[Exported, dict[str, Any]] = {}
    for engine in dict.fromkeys(map(_engine, exported)):
        own = [one for one in exported if _engine(one) is engine]
        measured = None if engine.run is None else engine.run(loaded, folder, own)
        checked = f"against the rules of {engine.title} {engine.version} and by stock PEFT; not run in {engine.title}"
        if measured is None:
            say(f"{engine.name}: checked {checked}")
        for m, one in enumerate(own):
            said_of = {"checked": checked} if measured is None else {"engine": measured[m]}
            entries[one] = {"verified": measured is not None, **said_of, **by_peft[one]}
    return [entries[one] for one in exported]


def _engine(one: Exported) -> Engine:
    return ENGINES[one.folder.split("/")[0]]


VLLM, SGLANG = (
    Target(
        name, f"PEFT folders as {one.title} takes them, with its command", partial(_plan, one), write, verify,
        use=False, loading=_loading,
    )
    for name, one in ENGINES.items()
)  # fmt: skip
