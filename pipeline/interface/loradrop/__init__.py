"""loradrop from Python: the stages as functions, the finished ensemble, and adapters in a loop of one's own.

    import loradrop
    config = loradrop.load_config("default", ["data.path=rows.jsonl", "adapter.rank=8"])
    loradrop.train(config, "runs/mine")
    loradrop.evaluate("runs/mine")
    loradrop.report("runs/mine")
    answers = loradrop.Ensemble.load("runs/mine").predict([{"prompt": "…"}])

What the command ends with as an exit code is raised here, always as a `LoradropError`. Names are resolved on first use:
importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "pipeline": ("__version__",),
    "pipeline.config": ("AdapterConfig", "DataConfig", "ModelConfig", "RunConfig", "TrainConfig", "load_config"),
    "pipeline.ensemble.ensemble": ("Answer", "Ensemble", "NumberAnswer"),
    "pipeline.errors": (
        "ConfigError", "DataError", "LoradropError", "RunFolderError", "SetupError", "StageFailed", "Stopped",
        "UserError",
    ),
    "pipeline.run_folder.listeners": ("Callback",),
    "pipeline.scores.abstention": ("Threshold",),
    f"{__name__}.commands": ("compare", "distill", "evaluate", "export", "report", "search", "train"),
    f"{__name__}.own_loop": ("Attached", "attach"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
