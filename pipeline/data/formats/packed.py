"""Compressed text files: unpacked as they are read, by the standard library."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

COMPRESSIONS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""The end of a name -> how such a file is opened."""
TORN = (EOFError, zlib.error, lzma.LZMAError)
"""What a damaged one raises beside `OSError`."""


def open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, or of what is packed in it."""
    opened: IO[bytes] = COMPRESSIONS.get(path.suffix, open)(path, "rb")
    return opened


def suffix_of(path: Path) -> str:
    """What says the format: `.csv` of `rows.csv`, and of `rows.csv.gz`."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
