"""The table of docs/clusters.md is the one that the command prints, for shapes written out by hand."""

from __future__ import annotations

from benchmarks.communication import table
from pipeline.distributed.launcher import ROOT
from pipeline.plan.communication import Sizes

LINEARS = [
    (4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096),
] * 32
"""(I, O) of an 8B-shaped model."""


def test_the_documents_have_the_table_of_the_command() -> None:
    adapter = tuple(16 * size for shape in LINEARS for size in shape)
    frozen = (*(i * o // 4 for i, o in LINEARS), *65 * [4096])  # four 4-bit weights in a bfloat16
    sizes = Sizes((adapter,), frozen, (128256 * 4096,), 2)
    lines = table(sizes, [8, 64, 512], [1, 4])
    assert len(lines) == 2 + 3 * (1 + 1 + 2 + 2)
    assert lines[2].startswith("| `zero0` | any | 8 | 293.6 MB |")  # 2 × 7/8 × 4 × 41,943,040
    assert "\n".join(lines) in (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
