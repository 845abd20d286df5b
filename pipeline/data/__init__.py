"""Data: files -> rows -> splits -> tokens -> batches.

Names are resolved on first use, so that checking a data file imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.batches import Batch, collate, filler
    from pipeline.data.check import check_data
    from pipeline.data.classes import (
        encode_classification,
        encode_regression,
        encode_text,
        output_count,
        shared_choices,
    )
    from pipeline.data.encode import (
        IGNORE_INDEX,
        Encoded,
        encode_candidates,
        encode_training,
        encode_training_rows,
        supervised_share,
    )
    from pipeline.data.rows import Row
    from pipeline.data.schedule import global_batch_indices, length_sorted_chunks, process_share
    from pipeline.data.splits import Splits, load_splits

_MODULES = {
    "batches": ("Batch", "collate", "filler"),
    "check": ("check_data",),
    "classes": (
        "encode_classification", "encode_regression", "encode_text", "output_count", "shared_choices",
    ),
    "encode": (
        "IGNORE_INDEX", "Encoded", "encode_candidates", "encode_training", "encode_training_rows", "supervised_share",
    ),
    "rows": ("Row",),
    "schedule": ("global_batch_indices", "length_sorted_chunks", "process_share"),
    "splits": ("Splits", "load_splits"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Encoded",
    "Row",
    "Splits",
    "check_data",
    "collate",
    "encode_candidates",
    "encode_classification",
    "encode_regression",
    "encode_text",
    "encode_training",
    "encode_training_rows",
    "filler",
    "global_batch_indices",
    "length_sorted_chunks",
    "load_splits",
    "output_count",
    "process_share",
    "shared_choices",
    "supervised_share",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
