"""One sequence that is being written: how its tokens are chosen, what text they are, where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What a tokenizer writes for the beginning of a character whose rest has not come."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float
    """0: the most probable one."""
    top_p: float
    seed: int | None
    """None: never the same twice."""


@dataclass(frozen=True)
class Chosen:
    """A token, and what its distribution was before temperature and top_p."""

    text: str
    log_prob: float
    top: tuple[tuple[str, float], ...]
    """The most probable tokens with their log-probabilities, highest first."""


@dataclass(frozen=True)
class News:
    """What has become of a sequence since it was told last."""

    text: str
    tokens: tuple[Chosen, ...]
    """Those chosen since; empty where nobody asked for their probabilities."""
    count: int
    """Tokens chosen since, the end token among them."""
    ended: Literal["stop", "length"] | None


@dataclass
class SequenceWriter:
    """The text of one sequence, which ends with an end token, with a stop text, or after `most` tokens."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Sequence[int]
    sampling: Sampling
    most: int
    stops: Sequence[str]
    ends: Collection[int]
    """Ids of end tokens."""
    top: int | None
    """So many of the most probable tokens are told; None: no probability is."""
    ids: list[int] = field(default_factory=list, init=False)
    _text: str = field(default="", init=False)
    _told: int = field(default=0, init=False)
    """Characters."""
    _chosen: list[Chosen] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False)
    _ended: Literal["stop", "length"] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self._random = np.random.default_rng(None if seed is None else seed % 2**64)
        # A tokenizer that writes a blank between words, or leaves one out before the first, does so as in the middle.
        self._before = list(self.prompt[-1:])
        self._skip = len(self._decode(self._before))

    def take(self, log_probs: Tensor) -> int | None:
        """Choose the next token by its (V,) log-probabilities; None where the sequence has ended."""
        token = choose(log_probs.double().numpy(), self.sampling, self._random)
        self._count += 1
        if token in self.ends:
            self._ended = "stop"
            return None
        self.ids.append(token)
        if self.top is not None:
            self._chosen.append(self._described(token, log_probs))
        self._text = self._decode([*self._before, *self.ids])[self._skip :]
        # What has been told holds no stop text, nor the beginning of one (`_settled`): what is cut was never told.
        places = [place for stop in self.stops if (place := self._text.find(stop)) >= 0]
        if places:
            self._text, self._ended = self._text[: min(places)], "stop"
        elif len(self.ids) == self.most:
            self._ended = "length"
        return token if self._ended is None else None

    def news(self) -> News | None:
        """What can be told since it was asked last; None where that is nothing."""
        until = len(self._text) if self._ended else self._settled()
        text, chosen, count = self._text[self._told : until], tuple(self._chosen), self._count
        if not (text or self._ended):
            return None
        self._told, self._chosen, self._count = max(self._told, until), [], 0
        return News(text, chosen, count, self._ended)

    def _settled(self) -> int:
        """Characters that no further token changes, and with which no stop text begins."""
        text = self._text.rstrip(BROKEN)
        open_ends = [
            len(text) - size
            for stop in self.stops for size in range(1, len(stop)) if text.endswith(stop[:size])
        ]
        return min(open_ends, default=len(text))

    def _described(self, token: int, log_probs: Tensor) -> Chosen:
        values, ids = log_probs.topk(min(self.top or 0, len(log_probs)))
        top = tuple((self._piece(one), value) for one, value in zip(ids.tolist(), values.tolist(), strict=True))
        return Chosen(self._piece(token), float(log_probs[token]), top)

    def _piece(self, token: int) -> str:
        """The text of one token by itself; of a mark, or a part of a character, its name in the vocabulary."""
        text = self._decode([*self._before, token])[self._skip :]
        if BROKEN in text or token in self.tokenizer.all_special_ids:
            return str(self.tokenizer.convert_ids_to_tokens(token))
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def choose(log_probs: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """A token drawn from softmax(log_probs / temperature), cut to the smallest set of tokens that has `top_p` of it.

    At temperature 0 the most probable one, of equals the first.
    """
    if sampling.temperature == 0.0:
        return int(log_probs.argmax())
    scaled = log_probs / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    weights = np.exp(scaled[order] - scaled[order[0]])
    mass = np.cumsum(weights)
    count = int(np.searchsorted(mass, sampling.top_p * mass[-1])) + 1
    within = mass[: min(count, len(mass))]
    return int(order[min(int(np.searchsorted(within, random.random() * within[-1], side="right")), len(within) - 1)])
