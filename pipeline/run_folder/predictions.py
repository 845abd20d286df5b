"""The cached predictions of a run: predictions/SPLIT.npz, which `evaluate` writes and `report` reads, without labels.

M members, N rows, C choices, T tokens of all reference answers together. A prediction is scored in L cells: a row
each, or a token each.
"""

from __future__ import annotations

import io
import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import RunFolderError
from pipeline.files import write_bytes
from pipeline.scores.bootstrap import Floats, Ints
from pipeline.scores.choices import ChoiceLikelihoods, ChoiceScore
from pipeline.scores.ensemble import Space

REMEDY = "Run the evaluate stage (again)."
EVALUATE_AGAIN = "The data or their configuration changed after the predictions were made: search or evaluate again."
_NORMALISATION_TOLERANCE = 1e-3

Kind = Literal["choice", "completion", "regression"]


@dataclass(frozen=True)
class Predictions(ABC):
    """What M members say about N rows. The kinds of prediction are its subclasses, and answer by these methods."""

    row_ids: tuple[str, ...]
    seconds: float = field(default=0.0, kw_only=True)
    """Duration of the pass over the split, all members together."""
    made_from: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    """Hashes of what decides them: `chain.PREDICTIONS_FROM`."""

    kind: ClassVar[Kind]
    """Its name, in files and reports."""
    stored: ClassVar[dict[str, type[np.generic]]]
    """The fields that are arrays, and their types in a file."""
    own_space: ClassVar[Space | None] = None
    """The one space in which its members can be averaged; None: any, as configured."""

    def __post_init__(self) -> None:
        if not self.row_ids or len(set(self.row_ids)) != len(self.row_ids):
            raise ValueError("row_ids must name at least one row, and none twice")

    @property
    def members(self) -> int:
        """M."""
        return len(self.outputs)

    @property
    @abstractmethod
    def outputs(self) -> Floats:
        """(M, L, C) log-probabilities; (M, L, 1) where a cell has one number."""

    @property
    def first_cells(self) -> Ints | None:
        """(N + 1,) first cell of each row, and L; None where a row is one cell."""
        return None

    @abstractmethod
    def right_answers(self, rows: Sequence[Any], where: str) -> NDArray[Any]:
        """(L,) what is right in each cell, said by `rows` in the order of `row_ids`.

        Raises:
            RunFolderError: a row whose right answer was not predicted; `where` names the predictions.
        """

    def inserted(self, place: int, others: Self) -> Self:
        """The same with the members of `others`, which are of the same rows, before member `place`."""
        of_rows, theirs = {"offsets", "tokens", "characters"}, others.arrays()
        arrays = {
            name: mine if name in of_rows else np.concatenate([mine[:place], theirs[name], mine[place:]])
            for name, mine in self.arrays().items()
        }
        return self.from_arrays(self.row_ids, arrays, self.seconds + others.seconds)

    @classmethod
    @abstractmethod
    def merged(cls, parts: Sequence[Self], row_ids: Sequence[str]) -> Self:
        """One set of predictions in the order of `row_ids`, of parts that hold each of them once.

        Raises:
            KeyError, ValueError: a row that no part holds.
        """

    @abstractmethod
    def of_members(self, places: Sequence[int]) -> Self:
        """What some of the members say, in this order."""

    def scored_by(self, rule: ChoiceScore) -> Self:
        """The same predictions with choices scored by `rule` (`data.choice_score`), without another pass.

        Raises:
            RunFolderError: choices of which only the scores are there, and they are not those of `rule`.
        """
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Its arrays as they stand in a file."""
        return {name: getattr(self, name).astype(dtype) for name, dtype in self.stored.items()}

    @classmethod
    def from_arrays(cls, row_ids: tuple[str, ...], arrays: Mapping[str, NDArray[Any]], seconds: float) -> Self:
        """The inverse of `arrays`. Raises `KeyError` or `ValueError` where they are not those of this kind."""
        own: dict[str, Any] = {name: arrays[name] for name in cls.stored}
        return cls(row_ids, seconds=seconds, **own)


@dataclass(frozen=True)
class ChoicePredictions(Predictions):
    """log_probs (M, N, C) float32, normalised over a row's choices, -inf for choices it does not have."""

    log_probs: Floats
    likelihoods: ChoiceLikelihoods | None = None
    """What `log_probs` were made of, where choices are texts; None: outputs of a head, or of an older version."""

    kind = "choice"
    stored = {"log_probs": np.float32}

    @classmethod
    def of_texts(cls, row_ids: tuple[str, ...], likelihoods: ChoiceLikelihoods, rule: ChoiceScore) -> Self:
        """Scored by `rule`."""
        return cls(row_ids, likelihoods.log_probs(rule), likelihoods)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_probs.ndim != 3 or self.log_probs.shape[1] != len(self.row_ids):
            raise ValueError(f"log_probs has the shape {self.log_probs.shape}, not (M, {len(self.row_ids)}, C)")
        with np.errstate(invalid="ignore"):
            total = np.logaddexp.reduce(self.log_probs.astype(np.float64), axis=-1)
        if not np.all(np.abs(total) < _NORMALISATION_TOLERANCE):
            raise ValueError("log_probs is not normalised over the choices, or holds NaN")
        known = self.likelihoods
        if known is not None:
            shapes = (known.log_likelihoods.shape, known.tokens.shape, known.characters.shape)
            if shapes != (self.log_probs.shape, *[self.log_probs.shape[1:]] * 2):
                raise ValueError(f"likelihoods and lengths have the shapes {shapes}, log_probs {self.log_probs.shape}")

    @property
    def outputs(self) -> Floats:
        """(M, N, C): a row is a cell."""
        return self.log_probs

    def of_members(self, places: Sequence[int]) -> Self:
        """Scores, and what they were made of."""
        own, known = list(places), self.likelihoods
        likelihoods = None if known is None else replace(known, log_likelihoods=known.log_likelihoods[own])
        return replace(self, log_probs=self.log_probs[own], likelihoods=likelihoods)

    def scored_by(self, rule: ChoiceScore) -> Self:
        """From the log-likelihoods of the texts; without them the scores are those of `sum`."""
        if self.likelihoods is not None:
            return replace(self, log_probs=self.likelihoods.log_probs(rule))
        if rule != "sum":
            raise RunFolderError("data.choice_score", rule, "needs log-likelihoods that were not kept", EVALUATE_AGAIN)
        return self

    def right_answers(self, rows: Sequence[Any], where: str) -> NDArray[Any]:
        """(N,) indices of the right choices."""
        for row, logs in zip(rows, self.log_probs.swapaxes(0, 1), strict=True):
            label = row.label
            if label is None or not 0 <= label < logs.shape[-1] or not np.isfinite(logs[:, label]).all():
                what = f"has no prediction for the label {label}"
                raise RunFolderError(f"{where}, row {row.id}", None, what, EVALUATE_AGAIN)
        return np.array([row.label for row in rows])

    @classmethod
    def merged(cls, parts: Sequence[Self], row_ids: Sequence[str]) -> Self:
        """As wide as the widest part."""
        width = max(part.log_probs.shape[-1] for part in parts)
        place = {name: n for n, name in enumerate(row_ids)}
        places = [[place[name] for name in part.row_ids] for part in parts]

        def joined(pieces: Sequence[NDArray[Any]], missing: float) -> NDArray[Any]:
            table = np.full((*pieces[0].shape[:-2], len(row_ids), width), missing, dtype=pieces[0].dtype)
            for rows, piece in zip(places, pieces, strict=True):
                table[..., rows, : piece.shape[-1]] = piece
            return table

        log_probs = joined([part.log_probs.astype(np.float32) for part in parts], -np.inf)
        found = [part.likelihoods for part in parts if part.likelihoods is not None]
        if len(found) < len(parts):
            return cls(tuple(row_ids), log_probs)
        return cls(tuple(row_ids), log_probs, ChoiceLikelihoods(
            joined([one.log_likelihoods for one in found], -np.inf),
            joined([one.tokens for one in found], 0), joined([one.characters for one in found], 0),
        ))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Scores, and what they were made of."""
        return super().arrays() | ({} if self.likelihoods is None else vars(self.likelihoods))

    @classmethod
    def from_arrays(cls, row_ids: tuple[str, ...], arrays: Mapping[str, NDArray[Any]], seconds: float) -> Self:
        """The inverse."""
        names = [one.name for one in fields(ChoiceLikelihoods)]
        likelihoods = ChoiceLikelihoods(*(arrays[name] for name in names)) if names[0] in arrays else None
        return cls(row_ids, arrays["log_probs"], likelihoods, seconds=seconds)


@dataclass(frozen=True)
class CompletionPredictions(Predictions):
    """token_log_probs (M, T) of the reference answers; row i has the tokens offsets[i] : offsets[i + 1].

    A token is a choice of which only the right one is known: it can be averaged as a probability, and no other way.
    """

    token_log_probs: Floats
    offsets: Ints

    kind = "completion"
    stored = {"token_log_probs": np.float32, "offsets": np.int64}
    own_space = "probability"

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def outputs(self) -> Floats:
        """(M, T, 1): a token is a cell."""
        return self.token_log_probs[..., None]

    @property
    def first_cells(self) -> Ints:
        """(N + 1,) first token of each row."""
        return self.offsets

    def of_members(self, places: Sequence[int]) -> Self:
        """Their tokens."""
        return replace(self, token_log_probs=self.token_log_probs[list(places)])

    def right_answers(self, rows: Sequence[Any], where: str) -> NDArray[Any]:
        """(T,) zeros: the reference is the one choice of its cell."""
        return np.zeros(self.token_log_probs.shape[1], dtype=np.int64)

    @classmethod
    def merged(cls, parts: Sequence[Self], row_ids: Sequence[str]) -> Self:
        """Row by row, each with its tokens."""
        tokens: dict[str, Floats] = {}
        for part in parts:
            pieces = np.split(part.token_log_probs, part.offsets[1:-1], axis=1)
            tokens.update(zip(part.row_ids, pieces, strict=True))
        ordered = [tokens[name] for name in row_ids]
        offsets = np.concatenate([[0], np.cumsum([piece.shape[1] for piece in ordered])]).astype(np.int64)
        return cls(tuple(row_ids), np.concatenate(ordered, axis=1), offsets)


@dataclass(frozen=True)
class RegressionPredictions(Predictions):
    """values (M, N) float32: the number that each member gives for each row."""

    values: Floats

    kind = "regression"
    stored = {"values": np.float32}
    own_space = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values.ndim != 2 or self.values.shape[1] != len(self.row_ids):
            raise ValueError(f"values has the shape {self.values.shape}, not (M, {len(self.row_ids)})")
        if not np.all(np.isfinite(self.values)):
            raise ValueError("values must be finite")

    @property
    def outputs(self) -> Floats:
        """(M, N, 1): a row is a cell."""
        return self.values[..., None]

    def of_members(self, places: Sequence[int]) -> Self:
        """Their numbers."""
        return replace(self, values=self.values[list(places)])

    def right_answers(self, rows: Sequence[Any], where: str) -> NDArray[Any]:
        """(N,) the right numbers."""
        scores = np.array([row.score for row in rows], dtype=np.float64)  # None becomes NaN
        if not np.isfinite(scores).all():
            raise RunFolderError(where, None, "has predictions of rows without a score", EVALUATE_AGAIN)
        return scores

    @classmethod
    def merged(cls, parts: Sequence[Self], row_ids: Sequence[str]) -> Self:
        """Row by row."""
        of_row = {name: part.values[:, n] for part in parts for n, name in enumerate(part.row_ids)}
        return cls(tuple(row_ids), np.stack([of_row[name] for name in row_ids], axis=1))


_KINDS: dict[str, type[Predictions]] = {
    one.kind: one for one in (ChoicePredictions, CompletionPredictions, RegressionPredictions)
}


def write_predictions(folder: Path, split: str, predictions: Predictions) -> None:
    """Write folder/SPLIT.npz; never half-written."""
    named: dict[str, Any] = {
        "row_ids": np.array(predictions.row_ids, dtype=np.str_), "seconds": predictions.seconds,
        "kind": predictions.kind, "made_from": json.dumps(dict(predictions.made_from), sort_keys=True),
        **predictions.arrays(),
    }
    content = io.BytesIO()
    np.savez(content, **named)
    write_bytes(_path(folder, split), content.getvalue())


def read_predictions(folder: Path, split: str) -> Predictions:
    """Read folder/SPLIT.npz. Nothing is unpickled.

    Raises:
        RunFolderError: the file is missing, damaged, of an unknown kind, or its shapes do not fit together.
    """
    path = _path(folder, split)
    if not path.is_file():
        raise RunFolderError(str(path), None, "does not exist", REMEDY)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            row_ids, seconds = tuple(arrays["row_ids"].tolist()), float(arrays["seconds"])
            found = _KINDS[str(arrays["kind"])].from_arrays(row_ids, arrays, seconds)
            return replace(found, made_from=dict(json.loads(str(arrays["made_from"]))))
    except (OSError, ValueError, TypeError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise RunFolderError(str(path), None, f"is damaged ({' '.join(str(error).split())})", REMEDY) from error


def _path(folder: Path, split: str) -> Path:
    return folder / f"{split}.npz"
