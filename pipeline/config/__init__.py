"""Typed configuration: importable without torch."""

from pipeline.config.adapter import AdaLoRAConfig, AdapterConfig
from pipeline.config.data import DataConfig, EvaluationDataConfig, TemplateConfig
from pipeline.config.evaluate import EnsembleConfig, EvaluateConfig, ExportConfig
from pipeline.config.launch import LaunchConfig
from pipeline.config.load import build_config, dump_config, load_config
from pipeline.config.method import Consistency, Method, Site
from pipeline.config.model import ModelConfig
from pipeline.config.run import RunConfig
from pipeline.config.search import CompareConfig, SearchConfig
from pipeline.config.train import TrainConfig

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
