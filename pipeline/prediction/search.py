"""Which tokens a decode goes on with: greedy, or beam search, as `generate` of transformers has them.

Lengths and n-grams are those of the generated text alone: it may repeat what stands in its prompt, as in the code of
the papers (microsoft/LoRA, gpt2_beam.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from pipeline.data.encode import Encoded
from pipeline.prediction.decode import Decoder

_NEVER = -1e9
"""Worth of what cannot be chosen, as transformers has it: below every log-probability, and finite."""


@dataclass(frozen=True)
class SearchSettings:
    """How a text is searched for."""

    ends: tuple[int, ...]
    """Tokens that end a text, at least one."""
    max_tokens: int
    """Of a text, its end among them; at least 1."""
    min_tokens: int = 0
    """Before its end."""
    beams: int = 1
    """1 is greedy."""
    length_penalty: float = 1.0
    """A finished text of n tokens is worth its log-probability / n ** length_penalty; greedy does not ask."""
    no_repeat_ngram: int = 0
    """No n-gram of so many tokens twice in a text; 0: any."""
    early_stopping: bool | Literal["never"] = False
    """True: stop at as many finished texts as there are beams. False: when no running one would be better if it ended
    now. never: when none could be at any length."""


@dataclass(frozen=True)
class Found:
    """What came of one prompt."""

    tokens: tuple[int, ...]
    """The end among them, where the text has one."""
    log_prob: float
    """Σ log p(token), of the members' average, before anything was ruled out."""
    ended: bool
    """Whether the text ended by itself, rather than at `max_tokens`."""


def search(decoder: Decoder, prompts: Sequence[Encoded], settings: SearchSettings) -> list[Found]:
    """One text for each prompt, of all members together; the prompts are one batch."""
    return greedy(decoder, prompts, settings) if settings.beams == 1 else beam_search(decoder, prompts, settings)


def greedy(decoder: Decoder, prompts: Sequence[Encoded], settings: SearchSettings) -> list[Found]:
    """The most probable token, again and again. Rows leave the batch when their text has ended."""
    state = decoder.prefill(prompts)
    texts: list[list[int]] = [[] for _ in prompts]
    sums, going = [0.0] * len(prompts), list(range(len(prompts)))
    for made in range(settings.max_tokens):
        running = torch.tensor([texts[row] for row in going], dtype=torch.int64, device=state.log_probs.device)
        chosen = allowed(state.log_probs, running, settings).argmax(-1)
        gained = state.log_probs.gather(1, chosen[:, None])[:, 0].tolist()
        places = []
        for place, (row, token) in enumerate(zip(going, chosen.tolist(), strict=True)):
            texts[row].append(token)
            sums[row] += gained[place]
            if token not in settings.ends:
                places.append(place)
        if not places or made + 1 == settings.max_tokens:
            break
        if len(places) < len(going):
            state.select(places)
        going = [going[place] for place in places]
        state.step(chosen[places])
    return [_found(text, total, settings) for text, total in zip(texts, sums, strict=True)]


def beam_search(decoder: Decoder, prompts: Sequence[Encoded], settings: SearchSettings) -> list[Found]:
    """The best text among `beams` that are followed at a time. Rows leave the batch when nothing can improve them."""
    state, beams = decoder.prefill(prompts), settings.beams
    device = state.log_probs.device
    rows = [_Finished() for _ in prompts]
    going, sums = rows, torch.zeros(len(rows), 1, device=device)  # (B, K) of the running texts; at first there is one
    texts = torch.empty(len(rows), 0, dtype=torch.int64, device=device)
    for made in range(1, settings.max_tokens + 1):
        worth = allowed(state.log_probs, texts, settings).float().view(len(going), -1, state.log_probs.shape[-1])
        vocabulary = worth.shape[-1]
        worth = (worth + sums[..., None]).flatten(1)
        best, index = worth.topk(min(beams * max(2, 1 + len(settings.ends)), worth.shape[1]))
        tokens = index % vocabulary
        parents = index // vocabulary + torch.arange(len(going), device=device)[:, None] * sums.shape[1]
        stops = torch.isin(tokens, torch.tensor(settings.ends, device=device)) | (made == settings.max_tokens)
        candidates = torch.cat([texts[parents], tokens[..., None]], dim=-1)
        for place, row in enumerate(going):
            row.take(candidates[place, :beams], best[place, :beams], stops[place, :beams], settings)
        running, kept = (best + stops * _NEVER).topk(min(beams, best.shape[1]))
        left = [n for n, row in enumerate(going) if row.can_improve(float(running[n, 0]), made, settings)]
        if not left or made == settings.max_tokens:
            break
        going, kept, sums = [going[n] for n in left], kept[left], running[left]
        texts = candidates[left].gather(1, kept[..., None].expand(-1, -1, made)).flatten(0, 1)
        state.select(parents[left].gather(1, kept).flatten())
        state.step(texts[:, -1])
    return [row.best(settings) for row in rows]


def allowed(log_probs: Tensor, texts: Tensor, settings: SearchSettings) -> Tensor:
    """`log_probs` (R, V) behind the generated texts (R, n), -inf for tokens that are ruled out."""
    if settings.no_repeat_ngram:
        log_probs = NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram)(texts, log_probs)
    if texts.shape[1] < settings.min_tokens:
        log_probs = log_probs.index_fill(1, torch.tensor(settings.ends, device=log_probs.device), -torch.inf)
    return log_probs


@dataclass
class _Finished:
    """The finished texts of one prompt, the best `beams` of them."""

    texts: list[tuple[float, float, list[int]]] = field(default_factory=list)
    """(worth, log-probability, tokens), best first."""

    def take(self, texts: Tensor, sums: Tensor, stops: Tensor, settings: SearchSettings) -> None:
        """Take in those of the best candidates that have come to their end."""
        for n in stops.nonzero()[:, 0].tolist():
            total = float(sums[n])
            self.texts.append((total / texts.shape[1] ** settings.length_penalty, total, texts[n].tolist()))
        self.texts = sorted(self.texts, key=lambda one: -one[0])[: settings.beams]

    def can_improve(self, running: float, made: int, settings: SearchSettings) -> bool:
        """Whether a text that has the log-probability `running` after `made` tokens may become one of the best."""
        if len(self.texts) < settings.beams:
            return running > _NEVER
        if settings.early_stopping is True:
            return False
        longest = settings.early_stopping == "never" and settings.length_penalty > 0.0
        length = settings.max_tokens if longest else made
        return running / length**settings.length_penalty > self.texts[-1][0]

    def best(self, settings: SearchSettings) -> Found:
        """The best finished text."""
        _, total, tokens = self.texts[0]
        return _found(tokens, total, settings)


def _found(tokens: Sequence[int], total: float, settings: SearchSettings) -> Found:
    return Found(tuple(tokens), total, tokens[-1] in settings.ends)
