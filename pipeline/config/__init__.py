"""Typed configuration: importable without torch."""

from pipeline.config.adalora import AdaLoRAConfig
from pipeline.config.adapter import AdapterConfig
from pipeline.config.compare import CompareConfig
from pipeline.config.load import build_config, dump_config, load_config
from pipeline.config.method import Consistency, Method, Site
from pipeline.config.run import RunConfig
from pipeline.config.sections import (
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    EvaluationDataConfig,
    ExportConfig,
    LaunchConfig,
    ModelConfig,
    SearchConfig,
    TemplateConfig,
    TrainConfig,
)

__all__ = [
    "AdaLoRAConfig",
    "AdapterConfig",
    "CompareConfig",
    "Consistency",
    "DataConfig",
    "EnsembleConfig",
    "EvaluateConfig",
    "EvaluationDataConfig",
    "ExportConfig",
    "LaunchConfig",
    "Method",
    "ModelConfig",
    "RunConfig",
    "SearchConfig",
    "Site",
    "TemplateConfig",
    "TrainConfig",
    "build_config",
    "dump_config",
    "load_config",
]
