"""How a run's members are read out on new rows: as validation chose, scaled as calibration says. No torch.

The members are the first draws of those that were evaluated, which `export` deploys, or the adapter without masks, or,
where that was clearly better, some of both that do not count alike. Draws can be made until a row's answer is settled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.splits import Splits
from pipeline.errors import ConfigError, RunFolderError
from pipeline.files import read_json, sha256_file
from pipeline.run_folder.chain import Origin, require_adapter, require_members, require_predictions, weights_sha256
from pipeline.run_folder.comparison import read_comparison
from pipeline.run_folder.labelled import LabelledSplit, join_labels
from pipeline.run_folder.members import places_of_draws, read_members
from pipeline.run_folder.paths import RunPaths
from pipeline.run_folder.predictions import ChoicePredictions, Kind, Predictions, read_predictions
from pipeline.scores import temperature
from pipeline.scores.abstention import Threshold, candidates, choose_threshold, least_risk
from pipeline.scores.adaptive import ROUND, adaptive_average, choose_margin, passes_needed
from pipeline.scores.bootstrap import Floats
from pipeline.scores.classification import row_correct
from pipeline.scores.ensemble import Space, average

REPORT_AGAIN = "Evaluate and report again."


@dataclass(frozen=True)
class Readout:
    """Who predicts, and what is made of what they say."""

    draws: tuple[int | None, ...]
    """Mask draws of the run's adapter; None is the adapter without masks."""
    space: Space
    """In which members are averaged, before the average is scaled."""
    temperature: float | None
    """Of the average; None for numbers and free text."""
    kind: Kind
    weights: tuple[float, ...] | None = None
    """Of the members, together 1; None: all alike."""
    margin: float | None = None
    """By which a row's answer is settled, so that later members do not predict it (`pipeline.scores.adaptive`); None:
    every member predicts every row."""

    def averaged(self, outputs: Floats) -> Floats:
        """What the members say (M, N, C), as one prediction (N, C) that is not scaled."""
        if self.margin is None:
            return average(outputs, self.space, self.weights)
        return adaptive_average(outputs, passes_needed(outputs, self.margin))

    def of(self, outputs: Floats) -> Floats:
        """What the members say (M, N, C), as one prediction (N, C): normalised log-probabilities, or a number."""
        averaged = self.averaged(outputs)
        return averaged if self.temperature is None else temperature.apply_temperature(averaged, self.temperature)

    def identity(self, adapters: Sequence[str], config: RunConfig) -> str:
        """Hash of all that decides an answer, but the row.

        Args:
            adapters: hashes of the weights that predict.
        """
        training, rule, seed = config.training_sha256(), config.data.choice_score, config.ensemble.seed
        return hashlib.sha256(json.dumps([asdict(self), list(adapters), training, rule, seed]).encode()).hexdigest()


@dataclass(frozen=True)
class EvaluatedRun:
    """A run that was trained, evaluated and reported, with its rows."""

    paths: RunPaths
    config: RunConfig
    splits: Splits
    adapter_sha256: str
    result: dict[str, Any]

    @classmethod
    def open(cls, paths: RunPaths, config: RunConfig, splits: Splits) -> EvaluatedRun:
        """Check that adapter, predictions and report belong together.

        Raises:
            RunFolderError: a comparison; something is missing, damaged, or made from something else.
        """
        if read_comparison(paths) is not None:
            remedy = "Train the method that you want as a run of its own."
            raise RunFolderError("--run-dir", str(paths.root), "compares methods and has chosen no ensemble", remedy)
        origin = Origin(config.training_sha256(), splits.fingerprint)
        require_adapter(paths, Origin(origin.config_sha256))  # the rows are those of predictions and report
        sha256 = weights_sha256(paths.adapter)
        assert sha256 is not None  # its manifest has just been checked
        result = read_result(paths, origin, sha256, config.reading_sha256())
        require_members(paths, read_members(paths.predictions), config.ensemble)
        if not result:
            remedy = "Run the stages evaluate and report first."
            raise RunFolderError(str(paths.result), None, "does not exist: no ensemble has been chosen", remedy)
        return cls(paths, config, splits, sha256, result)

    def readout(self, draws: int | None = None) -> Readout:
        """What validation chose, and the temperature of exactly these members, from their calibration predictions.

        Args:
            draws: so many mask draws instead; 0 is the adapter without masks.

        Raises:
            RunFolderError: more draws than were evaluated; predictions that belong to something else.
        """
        members, weights = chosen_members(self.result)
        if draws is not None:
            members, weights = tuple(range(draws)) or (None,), None
        split, outputs = self._predicted("calibration", members)
        space, margin = split.averaging_space(self.config.ensemble.average), None
        if self.config.ensemble.adaptive is not None and weights is None:
            margin = _margin(self.config.ensemble.adaptive, split, outputs)
        readout = Readout(members, space, None, split.kind, weights, margin)
        if split.kind != "choice":
            return readout
        fitted = temperature.fit_temperature(readout.averaged(outputs), split.labels, split.units)
        return replace(readout, temperature=fitted)

    def identity(self, readout: Readout) -> str:
        """`Readout.identity` of its own adapter."""
        return readout.identity([self.adapter_sha256], self.config)

    def threshold(self, readout: Readout, risk: float) -> Threshold:
        """From which confidence on answers are wrong in at most `risk` of the cases (`pipeline.scores.abstention`).

        The risk is measured on calibration rows, one of each unit; thresholds are quantiles over validation rows. The
        confidence is the average's highest probability before it is scaled: the temperature was fitted to the labels of
        the calibration rows, which the confidences must not know.

        Raises:
            ConfigError: no risk, or one that these rows cannot promise; answers that are numbers.
        """
        if readout.kind != "choice":
            raise ConfigError("--abstain", risk, "is for rows with choices: no number is right", "Leave it out.")
        if not 0.0 < risk < 1.0:
            raise ConfigError("--abstain", risk, "must be between 0 and 1", "0.05: one answer in twenty may be wrong.")
        _, others = self._predicted("validation", readout.draws)
        split, outputs = self._predicted("calibration", readout.draws)
        averaged, rows = readout.averaged(outputs), split.first_of_units
        confidence, correct = top_probability(averaged)[rows], row_correct(averaged, split.labels)[rows] > 0.5
        thresholds = candidates(top_probability(readout.averaged(others)))
        found = choose_threshold(confidence, correct, thresholds, risk)
        if found is not None:
            return found
        least = least_risk(confidence, correct, thresholds)
        raise ConfigError(
            "--abstain", risk, f"cannot be promised by {len(rows)} independent calibration rows, of which"
            f" {int((~correct).sum())} are answered wrongly",
            ("" if least is None else f"They can promise {least:g}. ")
            + "More of them (data.calibration_rows, then train again) can promise less.",
        )

    def averages(self, readout: Readout, name: str) -> tuple[Predictions, float]:
        """What the members said together of an evaluated split's choices, not scaled, as one member; passes per row."""
        found = self._predictions(name, readout.draws)
        outputs = found.outputs
        passes = len(outputs) if readout.margin is None else float(passes_needed(outputs, readout.margin).mean())
        return ChoicePredictions(found.row_ids, readout.averaged(outputs)[None]), passes

    def _predicted(self, name: str, draws: Sequence[int | None]) -> tuple[LabelledSplit, Floats]:
        """Rows of a split with their labels, and what the members said (M, N, C)."""
        found = self._predictions(name, draws)
        split = join_labels(found, getattr(self.splits, name), str(self.paths.predictions / f"{name}.npz"))
        return split, split.outputs

    def _predictions(self, name: str, draws: Sequence[int | None]) -> Predictions:
        """What the members said of a split's rows."""
        members = read_members(self.paths.predictions)
        where = str(self.paths.predictions / f"{name}.npz")
        predictions = read_predictions(self.paths.predictions, name).scored_by(self.config.data.choice_score)
        origin = Origin(self.config.training_sha256(), self.splits.fingerprint)
        require_predictions(self.paths, name, predictions, origin, members)
        places = places_of_draws(members, self.adapter_sha256)
        if missing := [draw for draw in draws if draw not in places]:
            there = sum(draw is not None for draw in places)
            who = "the adapter without masks" if missing[0] is None else f"mask draw {missing[0]}: there are {there}"
            remedy = "Ask for fewer, or raise ensemble.size and evaluate."
            raise RunFolderError(where, None, f"does not hold {who}", remedy)
        return predictions.of_members([places[draw] for draw in draws])


def free_text(who: Path | str) -> RunFolderError:
    """The error of a run whose answers are not among a few."""
    what = "answers in free text, of which only the probability of a given reference is known"
    remedy = "Rows with choices, or a score, can be predicted; `loradrop serve` writes texts."
    return RunFolderError(str(who), None, what, remedy)


def top_probability(log_probs: Floats) -> Floats:
    """(N, C) -> (N,)."""
    return np.exp(log_probs.max(axis=-1))


def chosen_members(result: Mapping[str, Any]) -> tuple[tuple[int | None, ...], tuple[float, ...] | None]:
    """The mask draws that validation chose (None among them: the adapter without masks), and their weights where they
    do not count alike."""
    if not (entry := result.get("ensemble")):
        return (None,), None
    return tuple(entry["members"]), None if entry["weights"] is None else tuple(entry["weights"])


def _margin(share: float, split: LabelledSplit, outputs: Floats) -> float | None:
    """By which rows are settled; None where there are too few members for a look before the last.

    Raises:
        ConfigError: answers that are numbers.
    """
    if split.kind != "choice":
        raise ConfigError("ensemble.adaptive", share, "is for rows with choices: no number is settled", "Leave it out.")
    return choose_margin(outputs[:, split.first_of_units], share) if len(outputs) > ROUND else None


def read_result(
    paths: RunPaths, origin: Origin, adapter_sha256: str, settings_sha256: str | None = None
) -> dict[str, Any]:
    """What the report found for this adapter: the ensemble that validation chose, and its size; {} without one.

    Args:
        settings_sha256: of what the reading depends on beside the training; None = any.

    Raises:
        RunFolderError: it was made from another configuration, other data, another adapter, other predictions than
            those that lie here, or under other settings.
    """
    if not paths.result.exists():
        return {}
    result = read_json(paths.result, REPORT_AGAIN)
    made_from: Any = result.get("made_from") if isinstance(result, dict) else None
    if not (what := origin.difference(made_from)) and made_from.get("adapter_sha256") != adapter_sha256:
        what = "was made from another adapter"
    named = None if what else made_from.get("predictions")
    for split, sha256 in named.items() if isinstance(named, dict) else ():
        predictions = paths.predictions / f"{split}.npz"
        if predictions.is_file() and sha256_file(predictions) != sha256:
            what = f"was made from other predictions of {split}"
    if not what and settings_sha256 not in (None, made_from.get("settings_sha256")):
        what = "was made under other settings of ensemble, evaluate or select"
    if what:
        raise RunFolderError(str(paths.result), None, what, REPORT_AGAIN)
    return dict(result)
