"""The targets of `export.forms`, each with what it refuses, writes and proves (`pipeline.export.order: Target`).

A new target is a file in this folder and an entry here; its name stands in `ExportConfig.forms`, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.extensions import EXPORT_TARGETS, load
from pipeline.errors import ConfigError
from pipeline.export.engines.served import SGLANG, VLLM
from pipeline.export.gguf.target import GGUF
from pipeline.export.merged import plan_dequantized, plan_merged, verify_merged, write_merged
from pipeline.export.order import Exported, Loaded, Target
from pipeline.export.parity import verify_peft
from pipeline.export.peft import plan_adapter, plan_draws, write_peft

TARGETS = {
    target.name: target
    for target in (
        Target("adapter", "the adapter without masks as a PEFT folder", plan_adapter, write_peft, verify_peft),
        Target("draws", "a PEFT folder per mask draw", plan_draws, write_peft, verify_peft),
        Target("merged", "the adapter merged into the base's own 16-bit weights, for stock transformers",
               plan_merged, write_merged, verify_merged, merged=True),
        Target("merged_dequantized", "the adapter merged into the dequantized 4-bit weights, for stock transformers",
               plan_dequantized, write_merged, verify_merged, merged=True),
        GGUF,
        VLLM,
        SGLANG,
    )
}
"""name -> target."""


def target_of(name: str) -> Target:
    """The target of a form; of one that is none of ours, what an installed package offers under this name.

    Raises:
        ConfigError: its code cannot be imported, or is no target.
    """
    if name in TARGETS:
        return TARGETS[name]
    found = load(EXPORT_TARGETS, name)
    if not isinstance(found, Target):
        raise ConfigError("export.forms", name, f"must be a Target, not {type(found).__name__}", "Mend its package.")
    return found


def verified(
    loaded: Loaded, folder: Path, planned: Mapping[str, Sequence[Exported]]
) -> list[dict[str, Any]]:
    """Entries of the manifest, one per folder: `form`, `folder`, `draw`, and what was measured of it.

    Args:
        planned: name of a target -> what it has written below `folder`.

    Raises:
        ParityError: a stock tool computes something else, or an export has no effect.
    """
    entries: list[dict[str, Any]] = []
    for verify in dict.fromkeys(target_of(name).verify for name in planned):  # a tool starts once for all of its own
        own = [(name, one) for name, ones in planned.items() if target_of(name).verify is verify for one in ones]
        measured = verify(loaded, folder, [one for _, one in own]) if own else []
        entries += [
            {"form": name, "folder": one.folder, "draw": one.member.draw, **said}
            for (name, one), said in zip(own, measured, strict=True)
        ]
    return entries
