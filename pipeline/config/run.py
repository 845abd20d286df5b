"""The whole configuration of a run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import model_validator

from pipeline.config.adapter import AdapterConfig
from pipeline.config.data import DataConfig
from pipeline.config.evaluate import EnsembleConfig, EvaluateConfig, ExportConfig, SelectConfig
from pipeline.config.launch import LaunchConfig, LoggingConfig
from pipeline.config.model import ModelConfig
from pipeline.config.search import CompareConfig, SearchConfig
from pipeline.config.section import Line, Section
from pipeline.config.train import PLACEMENT, TrainConfig
from pipeline.errors import ConfigError

AFTER_TRAINING = ("ensemble", "select", "evaluate", "export", "search", "compare", "logging", "label")
"""Sections that a training does not depend on."""
READ_AFTER_TRAINING = ("evaluation", "choice_score")
"""Keys of `data` that may change once a training has ended: before that they are what validation chooses its best step
by. None of the rows that are then evaluated may be one that it was shown (`pipeline.prediction.unseen`)."""


class RunConfig(Section):
    """Everything a run depends on; saved as config.yaml in the run folder."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    select: SelectConfig = SelectConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    search: SearchConfig = SearchConfig()
    compare: CompareConfig = CompareConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()
    label: Line = ""
    """Shown in every table and report, e.g. "smoke run: no result"."""

    @model_validator(mode="after")
    def _check_pairs(self) -> RunConfig:
        kind, draws = self.adapter.resolved_method().consistency.kind, self.train.draws
        if kind != "none" and draws % 2:
            raise ConfigError(
                "train.draws", draws, f"must be even: the method's consistency term ({kind}) compares pairs of draws",
                f"Set train.draws={draws + 1}, or adapter.consistency.kind=none.",
            )
        return self

    @model_validator(mode="after")
    def _check_rank_budget(self) -> RunConfig:
        if self.adapter.kind == "adalora" and self.train.epochs is None:  # else checked when they are counted
            self.adapter.adalora.steps(self.train.max_steps)
        return self

    def trusting(self, trusted: bool) -> RunConfig:
        """The same with this say on the code that comes with a model, wherever its other values are from."""
        return self.model_copy(update={"model": self.model.model_copy(update={"trust_remote_code": trusted})})

    def sha256(self) -> str:
        """Hash of the canonical JSON: equal configurations, equal hash."""
        return _sha256(self.model_dump(mode="json"))

    def result_sha256(self) -> str:
        """Hash of what decides the result: a run continues on other nodes, processes or ZeRO stages, where only the
        order of sums differs.
        """
        return _sha256(self.result_values())

    def result_values(self) -> dict[str, Any]:
        """The values behind `result_sha256`, section by section."""
        values = self._deciding()
        del values["evaluate"]["batch_tokens"]
        for section in ("logging", "export", "label", "select"):
            del values[section]
        return values

    def training_sha256(self) -> str:
        """Hash of what decides the trained adapter: model, training rows, adapter and training.

        Every artefact of a run carries it; ensembles, evaluation and export may change and leave an adapter as it is.
        """
        values = self.training_part()._deciding()
        return _sha256({section: values[section] for section in ("model", "data", "adapter", "train")})

    def reading_sha256(self) -> str:
        """Hash of what decides how predictions are read: which members there are, how they are averaged and scored."""
        values = self.model_dump(mode="json", include={"ensemble", "select", "evaluate"})
        del values["evaluate"]["batch_tokens"]
        return _sha256({**values, "choice_score": self.data.choice_score})

    def export_sha256(self) -> str:
        """Hash of what is exported, out of what the report found."""
        return _sha256(self.export.model_dump(mode="json"))

    def begun_part(self) -> RunConfig:
        """What may not change once a training has begun: all else has its default."""
        return self.model_copy(update={name: RunConfig.model_fields[name].default for name in AFTER_TRAINING})

    def training_part(self) -> RunConfig:
        """What may not change once a training has ended: all else has its default."""
        return self.read_as(RunConfig())

    def read_as(self, other: RunConfig) -> RunConfig:
        """This training, with all of `other` that may change after it."""
        data = self.data.model_copy(update={name: getattr(other.data, name) for name in READ_AFTER_TRAINING})
        return self.model_copy(update={"data": data, **{name: getattr(other, name) for name in AFTER_TRAINING}})

    def _deciding(self) -> dict[str, Any]:
        """The values without those that only say where, how fast and whose code a run works with."""
        values = self.model_dump(mode="json")
        del values["launch"]
        for name in PLACEMENT:
            del values["train"][name]
        del values["data"]["cache"], values["model"]["trust_remote_code"], values["model"]["hold"]
        del values["adapter"]["fused"]
        return values


def _sha256(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
