"""What an artefact was made from: every stage checks that what it reads belongs together.

    adapter/manifest.json     Origin; sizes and hashes of the adapter's files
    checkpoints/step_…/       Origin in counters.json; a manifest
    predictions/SPLIT.npz     Origin; the hash of who predicted, the adapters by their weights
    predictions/generated_…   the same, and how texts were searched for (generated.py)
    result.json               Origin; the hash of the adapter; the hash of each predictions file
    export/manifest.json      Origin; the hashes of the adapter and of the result that the temperature is from

result.json and the export carry the hash of the settings that they were made under, too (`RunConfig.reading_sha256`,
`RunConfig.export_sha256`); of predictions the members say it. Rows for evaluation may come from elsewhere after a
training: the adapter keeps its origin, and what is made of it has that of now (`pipeline.prediction.unseen`).

A hash proves that things are whole and belong together, not where they come from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.config import EnsembleConfig, RunConfig
from pipeline.errors import RunFolderError
from pipeline.files import ADAPTER_WEIGHTS, MANIFEST, manifest_faults, read_json
from pipeline.run_folder.members import MEMBERS, PredictedMember
from pipeline.run_folder.paths import RunPaths, read_status
from pipeline.run_folder.predictions import EVALUATE_AGAIN, Predictions, read_predictions

TRAIN_AGAIN = "Run the train stage (again), or put the whole file back."


@dataclass(frozen=True)
class Origin:
    """The configuration and the data that decide an adapter and what it says of a row."""

    config_sha256: str
    """`RunConfig.training_sha256`."""
    data_sha256: str | None = None
    """`Splits.fingerprint`; None where the rows have not been read: then they are not compared."""

    def difference(self, made_from: Any) -> str:
        """What is other in the origin that an artefact carries; empty where nothing is."""
        if not isinstance(made_from, Mapping) or not {"config_sha256", "data_sha256"} <= made_from.keys():
            return "does not say what it was made from"
        if made_from["config_sha256"] != self.config_sha256:
            return "was made from another configuration"
        return "" if self.data_sha256 in (None, made_from["data_sha256"]) else "was made from other data"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)


def require_adapter(paths: RunPaths, origin: Origin) -> None:
    """Raises `RunFolderError` where adapter/ is missing, damaged, or made from another configuration or other data."""
    if not paths.adapter.is_dir():
        raise RunFolderError(str(paths.adapter), None, "does not exist", "Run the train stage first.")
    require_whole(paths.adapter)
    if different := origin.difference(_origin_of(paths.adapter)):
        remedy = "Put back the config.yaml and the data that it was trained with, or train in another --run-dir."
        raise RunFolderError(str(paths.adapter), None, different, remedy)


@dataclass(frozen=True)
class TrainedOn:
    """The data that an adapter was made from."""

    data_sha256: str | None
    evaluation: Any
    """`data.evaluation` of the training, as plain settings: where what it was not shown came from."""


def trained_on(adapter: Path) -> TrainedOn:
    """What the manifest of a whole adapter says of its data."""
    manifest, origin = read_json(adapter / MANIFEST), _origin_of(adapter)
    data_sha256 = origin.get("data_sha256") if isinstance(origin, dict) else None
    return TrainedOn(data_sha256, manifest.get("evaluation"))


def _origin_of(adapter: Path) -> Any:
    """What the manifest of a whole adapter says of its origin."""
    return read_json(adapter / MANIFEST).get("origin")


def require_whole(folder: Path) -> None:
    """Raises `RunFolderError` where a published folder is not as its manifest says."""
    if faults := manifest_faults(folder):
        raise RunFolderError(str(folder), None, f"is damaged ({'; '.join(faults)})", TRAIN_AGAIN)


def is_trained(paths: RunPaths, config: RunConfig) -> bool:
    """Whether the training of this very configuration has ended well, and its adapter is whole."""
    record = read_status(paths).get("train", {})
    if record.get("state") != "done" or record.get("config_sha256") != config.training_sha256():
        return False
    if manifest_faults(paths.adapter):
        return False
    return not Origin(config.training_sha256()).difference(_origin_of(paths.adapter))


def predictions_from(origin: Origin, members: Sequence[PredictedMember]) -> dict[str, Any]:
    """What predictions carry: the origin, and who predicts, adapters by their weights wherever they lie."""
    identities = json.dumps([_identity(member) for member in members])
    return {**origin.as_dict(), "members_sha256": hashlib.sha256(identities.encode()).hexdigest()}


def places_among(members: Sequence[PredictedMember], others: Sequence[PredictedMember]) -> list[int] | None:
    """Where each of `members` stands among `others`; None where one is not there."""
    place = {_identity(other): n for n, other in enumerate(others)}
    found = [place.get(_identity(member)) for member in members]
    return None if None in found else [n for n in found if n is not None]


def _identity(m: PredictedMember) -> tuple[Any, ...]:
    return m.name, m.group, m.adapter_sha256, m.draw, m.extra.get("seed")


def own_member(folder: Path, adapter_sha256: str) -> PredictedMember:
    """The run's own adapter, without masks: who validates in training."""
    return PredictedMember("mean-field", "mean_field", str(folder), adapter_sha256)


def is_validated(paths: RunPaths, config: RunConfig, adapter_sha256: str) -> bool:
    """Whether the cached validation predictions are those of this adapter alone, trained from this configuration."""
    try:
        made_from = read_predictions(paths.predictions, "validation").made_from
    except RunFolderError:
        return False
    origin = Origin(config.training_sha256(), made_from.get("data_sha256", ""))
    return made_from == predictions_from(origin, [own_member(paths.adapter, adapter_sha256)])


def other_members(members: Sequence[PredictedMember], ensemble: EnsembleConfig) -> str:
    """What of the mask draws that have predicted is not what the configuration asks for; empty where nothing is."""
    drawn = Counter((member.adapter, member.adapter_sha256) for member in members if member.draw is not None)
    if not drawn and any(member.group == "mean_field" and member.extra.get("rates") for member in members):
        drawn[None, None] = 0  # an adapter that has masks, read without
    least = min(1, ensemble.size) if ensemble.stop_when_flat else ensemble.size
    for count in drawn.values():
        if not least <= count <= ensemble.size:
            return f"was made with {count} mask draws, and ensemble.size is {ensemble.size}"
    seeds = {member.extra.get("seed", ensemble.seed) for member in members if member.draw is not None}
    if seeds - {ensemble.seed}:
        return f"was made with other masks than those of ensemble.seed = {ensemble.seed}"
    return ""


def require_members(paths: RunPaths, members: Sequence[PredictedMember], ensemble: EnsembleConfig) -> None:
    """Raises `RunFolderError` where predictions/ is of other mask draws than the configuration asks for."""
    if what := other_members(members, ensemble):
        raise RunFolderError(str(paths.predictions), None, what, EVALUATE_AGAIN)


def require_predictions(
    paths: RunPaths, split: str, predictions: Predictions, origin: Origin, members: Sequence[PredictedMember]
) -> None:
    """Raises `RunFolderError` where predictions are of another configuration, other data or other members."""
    what = origin.difference(predictions.made_from)
    if not what and predictions.made_from != predictions_from(origin, members):
        what = f"was made by other members than {MEMBERS} names"
    if what:
        raise RunFolderError(str(paths.predictions / f"{split}.npz"), None, what, EVALUATE_AGAIN)


def weights_sha256(adapter: Path) -> str | None:
    """The hash of an adapter's weights; None where they are not as its manifest says, and so may be of any size."""
    if manifest_faults(adapter):
        return None
    found: str | None = read_json(adapter / MANIFEST)["files"].get(ADAPTER_WEIGHTS, {}).get("sha256")
    return found


def require_same_adapter(paths: RunPaths, sha256: str, what: str, remedy: str) -> None:
    """Raises `RunFolderError` where adapter/, if it is there, is not the one whose weights have this hash.

    Args:
        what: was made from that one.
    """
    if (paths.adapter / ADAPTER_WEIGHTS).is_file() and weights_sha256(paths.adapter) != sha256:
        raise RunFolderError(str(paths.adapter), None, f"is not the adapter that {what} was made from", remedy)
