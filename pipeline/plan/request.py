"""What the command line asks for, in plain values: no configuration is read yet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One command."""

    source: str | None = None
    """--config: a YAML file or the name of a recipe; None: the stage's own recipe."""
    run_dir: Path | None = None
    """--run-dir; None: runs/ and the recipe's name."""
    overrides: tuple[str, ...] = ()
    """key.path=value."""
    quick: bool = False
    dry_run: bool = False
    rows: int = 2
    """Rows of each split that `data` shows."""
    fast: bool = False
    """`test`: without the slow tier."""

    @property
    def run(self) -> Path:
        """The run folder."""
        name = (Path(self.source).stem if self.source else "default") + ("-quick" if self.quick else "")
        return (self.run_dir or Path("runs") / name).resolve()
