"""The cached predictions of a run: what `evaluate` writes and `report` reads. No labels in here.

    predictions/members.json    who predicts, in member order
    predictions/SPLIT.npz       what they say about the rows of one split

M members, N rows, C choices, T tokens of all reference answers together.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pipeline.errors import RunFolderError
from pipeline.files import read_json, write_bytes, write_json
from pipeline.scores.bootstrap import Floats, Ints

MEMBERS = "members.json"
REMEDY = "Run the evaluate stage (again)."
_NORMALISATION_TOLERANCE = 1e-3

Group = Literal["base", "mean_field", "mask_draw", "plain", "searched", "compared"]


@dataclass(frozen=True)
class Member:
    """One column of the predictions: an adapter, and a mask draw of it or none."""

    name: str
    group: Group
    """base: no adapter; mean_field: the run's adapter without masks; mask_draw: one draw of it; plain: the run
    without dropout; searched: adapters of other runs, best first; compared: of the trainings of a comparison, and
    their draws."""
    adapter: str | None = None
    """Folder of the adapter."""
    adapter_sha256: str | None = None
    """Hash of its weights file."""
    draw: int | None = None
    """Index of the mask draw."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Free fields, such as rate and rank."""


@dataclass(frozen=True)
class ChoicePredictions:
    """log_probs (M, N, C) float32, normalised over a row's choices, -inf for choices it does not have."""

    row_ids: tuple[str, ...]
    log_probs: Floats
    seconds: float = 0.0
    """Duration of the pass over the split, all members together."""

    def __post_init__(self) -> None:
        _check_ids(self.row_ids)
        if self.log_probs.ndim != 3 or self.log_probs.shape[1] != len(self.row_ids):
            raise ValueError(f"log_probs has the shape {self.log_probs.shape}, not (M, {len(self.row_ids)}, C)")
        with np.errstate(invalid="ignore"):
            total = np.logaddexp.reduce(self.log_probs.astype(np.float64), axis=-1)
        if not np.all(np.abs(total) < _NORMALISATION_TOLERANCE):
            raise ValueError("log_probs is not normalised over the choices, or holds NaN")

    @property
    def members(self) -> int:
        """M."""
        return len(self.log_probs)


@dataclass(frozen=True)
class CompletionPredictions:
    """token_log_probs (M, T) of the reference answers; row i has the tokens offsets[i] : offsets[i + 1]."""

    row_ids: tuple[str, ...]
    token_log_probs: Floats
    offsets: Ints
    seconds: float = 0.0
    """Duration of the pass over the split, all members together."""

    def __post_init__(self) -> None:
        _check_ids(self.row_ids)
        if self.token_log_probs.ndim != 2:
            raise ValueError(f"token_log_probs has the shape {self.token_log_probs.shape}, not (M, tokens)")
        tokens = self.token_log_probs.shape[1]
        if self.offsets.shape != (len(self.row_ids) + 1,) or self.offsets[0] != 0 or self.offsets[-1] != tokens:
            raise ValueError(f"offsets must be {len(self.row_ids) + 1} numbers from 0 to {tokens}")
        if np.any(np.diff(self.offsets) < 1):
            raise ValueError("offsets must rise: every row has at least one token")
        if not np.all(np.isfinite(self.token_log_probs)) or np.any(self.token_log_probs > _NORMALISATION_TOLERANCE):
            raise ValueError("token_log_probs must be finite and at most 0")

    @property
    def members(self) -> int:
        """M."""
        return len(self.token_log_probs)


@dataclass(frozen=True)
class RegressionPredictions:
    """values (M, N) float32: the number that each member gives for each row."""

    row_ids: tuple[str, ...]
    values: Floats
    seconds: float = 0.0
    """Duration of the pass over the split, all members together."""

    def __post_init__(self) -> None:
        _check_ids(self.row_ids)
        if self.values.ndim != 2 or self.values.shape[1] != len(self.row_ids):
            raise ValueError(f"values has the shape {self.values.shape}, not (M, {len(self.row_ids)})")
        if not np.all(np.isfinite(self.values)):
            raise ValueError("values must be finite")

    @property
    def members(self) -> int:
        """M."""
        return len(self.values)


Predictions = ChoicePredictions | CompletionPredictions | RegressionPredictions


def write_predictions(folder: Path, split: str, predictions: Predictions) -> None:
    """Write folder/SPLIT.npz; never half-written."""
    arrays: dict[str, Any] = {"row_ids": np.array(predictions.row_ids, dtype=np.str_), "seconds": predictions.seconds}
    if isinstance(predictions, ChoicePredictions):
        arrays |= {"kind": "choice", "log_probs": predictions.log_probs.astype(np.float32)}
    elif isinstance(predictions, RegressionPredictions):
        arrays |= {"kind": "regression", "values": predictions.values.astype(np.float32)}
    else:
        arrays |= {
            "kind": "completion",
            "token_log_probs": predictions.token_log_probs.astype(np.float32),
            "offsets": predictions.offsets.astype(np.int64),
        }
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_bytes(_path(folder, split), content.getvalue())


def read_predictions(folder: Path, split: str) -> Predictions:
    """Read folder/SPLIT.npz. Nothing is unpickled.

    Raises:
        RunFolderError: the file is missing, damaged, or its shapes do not fit together.
    """
    path = _path(folder, split)
    if not path.is_file():
        raise RunFolderError(str(path), None, "does not exist", REMEDY)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            row_ids, seconds = tuple(arrays["row_ids"].tolist()), float(arrays["seconds"])
            if str(arrays["kind"]) == "choice":
                return ChoicePredictions(row_ids, arrays["log_probs"], seconds)
            if str(arrays["kind"]) == "regression":
                return RegressionPredictions(row_ids, arrays["values"], seconds)
            return CompletionPredictions(row_ids, arrays["token_log_probs"], arrays["offsets"], seconds)
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise RunFolderError(str(path), None, f"is damaged ({' '.join(str(error).split())})", REMEDY) from error


def write_members(folder: Path, members: list[Member]) -> None:
    """Write folder/members.json, in member order."""
    write_json(folder / MEMBERS, [{**m.extra, **{k: v for k, v in asdict(m).items() if k != "extra"}} for m in members])


def read_members(folder: Path) -> list[Member]:
    """Read folder/members.json.

    Raises:
        RunFolderError: the file is missing or damaged, or holds an unknown group.
    """
    path = folder / MEMBERS
    entries = read_json(path, REMEDY)
    try:
        members = [_to_member(entry) for entry in entries]
    except (TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(str(path), None, f"is damaged ({error})", REMEDY) from error
    if not members:
        raise RunFolderError(str(path), None, "names no member", REMEDY)
    return members


def _to_member(entry: dict[str, Any]) -> Member:
    known = {f.name for f in fields(Member)} - {"extra"}
    member = Member(
        **{k: v for k, v in entry.items() if k in known}, extra={k: v for k, v in entry.items() if k not in known}
    )
    if member.group not in get_args(Group):
        raise ValueError(f"group = {member.group!r} is none of {', '.join(get_args(Group))}")
    return member


def _check_ids(row_ids: tuple[str, ...]) -> None:
    if not row_ids or len(set(row_ids)) != len(row_ids):
        raise ValueError("row_ids must name at least one row, and none twice")


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.npz"
