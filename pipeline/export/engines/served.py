"""Writes and proves the folder of an engine: NAME/adapter, NAME/draw_NNN where draws are exported, NAME/serve.txt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.adapters.members import Member
from pipeline.adapters.peft_format import StoredAdapter, masked_matrices, write_adapter
from pipeline.export.engines import sglang, vllm
from pipeline.export.engines.rules import Engine, faults, refuse
from pipeline.export.order import Exported, Loaded, Order, ParityError, Target
from pipeline.export.parity import verify_peft
from pipeline.export.peft import plan_draws
from pipeline.files import ADAPTER_CONFIG, read_json, write_text
from pipeline.model.load import load_skeleton
from pipeline.terminal import say

COMMAND = "serve.txt"
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (vllm.ENGINE, sglang.ENGINE)}


def _plan(engine: Engine, order: Order) -> list[Exported]:
    config = load_skeleton(order.config.model).model.config if order.model_kind == "causal" else None
    refuse(engine, order, str(getattr(config, "model_type", "")), order.plain)
    return [Exported(engine.name, Member(0))]


def uniform(stored: StoredAdapter, ranks: Sequence[int]) -> StoredAdapter:
    """The same plain LoRA with one rank, padded with zeros to the next of `ranks`, and one scaling alpha / R.

    Scalings that differ between layers (rsLoRA under a rank pattern, alpha patterns) are folded into B.
    """
    spec = stored.spec
    largest = max(len(A) for A, *_ in stored.matrices.values())
    rank = next(served for served in ranks if served >= largest)
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


def _members(order: Order, folder: str) -> list[Exported]:
    draws = plan_draws(order) if "draws" in order.config.export.forms else []
    return [
        Exported(f"{folder}/adapter", Member(0)),
        *(Exported(f"{folder}/{Path(one.folder).name}", one.member) for one in draws),
    ]


def write(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> None:
    """The adapter, and the draws where they are exported, as `uniform` LoRA in PEFT folders; the command."""
    for one in exported:
        _write(ENGINES[one.folder], loaded, folder)


def _write(engine: Engine, loaded: Loaded, folder: Path) -> None:
    members, adapters = _members(loaded, engine.name), loaded.adapters
    masks = adapters.plan([one.member for one in members], 1, loaded.task.passes.key).masks
    base, rank = loaded.identity.path, 0
    for m, one in enumerate(members):
        target = folder / one.folder
        target.mkdir(parents=True)
        matrices = loaded.plain.matrices
        if one.member.draw is not None:
            matrices = masked_matrices(matrices, masks, m)
        served = uniform(replace(loaded.plain, matrices=matrices), engine.ranks)
        rank = served.spec.rank
        write_adapter(target, served.matrices, served.spec, adapters.layer_count, base, adapters.suffixes)
    folders = {Path(one.folder).name: one.folder for one in members}
    lines = engine.command(base, rank, folders, loaded.identity.quantization)
    write_text(folder / engine.name / COMMAND, "\n".join(lines) + "\n")


def verify(loaded: Loaded, folder: Path, exported: Sequence[Exported]) -> list[dict[str, Any]]:
    """The loaders' rules, what stock PEFT makes of the folders, and the engine itself where it is there.

    Raises:
        ParityError: a folder that an engine would not serve; beyond the tolerance; an adapter without effect.
    """
    members = {one.folder: _members(loaded, one.folder) for one in exported}
    for name, ones in members.items():
        engine = ENGINES[name]
        for one in ones:
            if found := faults(engine, folder / one.folder):
                said = "; ".join(found)
                raise ParityError(f"{one.folder}: {engine.title} {engine.version} would not serve it: {said}")
    measured = iter(verify_peft(loaded, folder, [one for ones in members.values() for one in ones]))
    return [
        _entry(ENGINES[name], loaded, folder, ones, [next(measured) for _ in ones]) for name, ones in members.items()
    ]


def _entry(
    engine: Engine, loaded: Loaded, folder: Path, members: Sequence[Exported], by_peft: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    rank = int(read_json(folder / members[0].folder / ADAPTER_CONFIG)["r"])
    worst = max(by_peft, key=lambda one: one["ratio"])
    there = {"rank": rank, "members": [Path(one.folder).name for one in members], **worst}
    measured = None if engine.run is None else engine.run(loaded, folder, members, rank)
    if measured is not None:
        return {**there, "verified": True, "engine": measured}
    checked = f"against the rules of {engine.title} {engine.version} and by stock PEFT; not run in {engine.title}"
    say(f"{engine.name}: checked {checked}")
    return {**there, "verified": False, "checked": checked}


VLLM, SGLANG = (
    Target(name, f"PEFT folders as {one.title} takes them, with its command", partial(_plan, one), write, verify)
    for name, one in ENGINES.items()
)
