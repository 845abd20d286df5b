"""loradrop: LoRA under structured dropout on 4-bit language models.

Names are resolved on first use, so that importing this package, or searching with `tune`, imports no torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

# bitsandbytes, when it is imported on a CPU with AVX512-BF16, asks for an optional package that we have no use for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.2.0.dev0"

_MODULES = {
    "config": (
        "AdapterConfig", "DataConfig", "RunConfig", "SearchConfig", "build_config", "dump_config", "load_config",
    ),
    "config.adapter": ("SERVED_RANKS",),
    "config.load": ("with_values", "without_dropout"),
    "config.pack": ("pack_refusal",),
    "config.search": ("EarlyExitConfig",),
    "config.space": ("OF_DROPOUT", "ONE_RATE", "SITE_RATE", "TERM_WEIGHT", "DimensionFile", "find_space", "read_space"),
    "data.splits": ("load_splits",),
    "distributed.launcher": ("LAUNCHER_VARIABLES",),
    "distributed.lifeline": ("parent_is_gone",),
    "distributed.ranks": ("alive",),
    "errors": (
        "EXIT_FAILED", "EXIT_OK", "EXIT_STOPPED", "EXIT_USER", "ConfigError", "DataError", "LoradropError",
        "RunFolderError", "SetupError", "StageFailed", "UserError",
    ),
    "files": (
        "ADAPTER_WEIGHTS", "cut_torn_line", "manifest_faults", "open_append", "publish_folder", "read_bytes",
        "read_json", "read_json_lines", "sha256_file", "write_json", "write_text",
    ),
    "plan.pack": ("runs_that_fit",),
    "run_folder.chain": ("is_validated",),
    "run_folder.labelled": ("LabelledSplit", "join_labels"),
    "run_folder.mark": ("claim",),
    "run_folder.metrics": ("read_metrics",),
    "run_folder.owner": ("held",),
    "run_folder.paths": ("RunPaths",),
    "run_folder.predictions": ("read_predictions",),
    "run_folder.related": ("LEDGER", "SEARCH"),
    "scores.classification": ("nll",),
    "scores.ensemble": ("average", "choose_adapters", "choose_cheapest"),
    "scores.selection": ("SELECTION_NAMES",),
    "scores.temperature": ("apply_temperature", "fit_temperature"),
    "stages.train": ("train_run",),
    "training.packed.pack": ("Ended", "Pack", "train_pack"),
    "terminal": ("duration", "one_line", "printable", "say"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
