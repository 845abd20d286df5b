"""What members say of texts behind contexts: log-likelihoods, by the passes of evaluation, and greedy answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member, replicate_rows
from pipeline.data.collate import collate
from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.sampler import length_sorted_chunks
from pipeline.model.head import at, evaluating, head_of, hidden_states
from pipeline.prediction.causal import replicated
from pipeline.prediction.passes import PassSettings, predict_completions
from pipeline.prediction.task import CausalLMTask
from pipeline.scores.bootstrap import Floats

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context, one at least, and of what follows it."""


@dataclass
class Likelihoods:
    """Log-likelihoods under all members at once, each asked for once: systems are averages of the same members."""

    task: CausalLMTask
    adapters: Adapters
    members: Sequence[Member]
    systems: Mapping[str, Sequence[int]]
    """Key -> the members that it averages, as probabilities of the whole text."""
    known: dict[Pair, Floats] = field(default_factory=dict)
    """(M,) log p(text | context) of each member."""
    greedy: dict[Pair, dict[str, bool]] = field(default_factory=dict)
    """Whether greedy decoding would write the text, by system; only of what was asked for."""

    def of(self, system: str, pairs: Sequence[Pair]) -> Floats:
        """log mean_m p_m(text | context): (N,)."""
        missing = list(dict.fromkeys(pair for pair in pairs if pair not in self.known))
        if missing:
            settings = replace(self.task.passes, shares_keys=self.task.shares_keys)
            flat, offsets = predict_completions(self.adapters, [encoded(p) for p in missing], self.members, settings)
            sums = np.add.reduceat(flat.astype(np.float64), offsets[:-1], axis=1)
            self.known.update(zip(missing, sums.T, strict=True))
        chosen = list(self.systems[system])
        own = np.array([self.known[pair][chosen] for pair in pairs]).reshape(len(pairs), len(chosen))
        return np.asarray(np.logaddexp.reduce(own, axis=1) - np.log(len(chosen)))

    def is_greedy(self, system: str, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each text is what the system would write token by token, each the most probable one.

        The next token of an average is read from sum_m w_m p_m(token | before), w_m proportional to p_m(before), the
        predictive distribution of the mixture that `of` scores.
        """
        missing = list(dict.fromkeys(pair for pair in pairs if pair not in self.greedy))
        if missing:
            self._decode(missing, self.task.passes)
        return [self.greedy[pair][system] for pair in pairs]

    def _decode(self, pairs: Sequence[Pair], settings: PassSettings) -> None:
        model, count = self.adapters.model, len(self.members)
        with torch.no_grad(), evaluating(model):
            masks = self.adapters.plan(self.members, 1, settings.key)
            lengths = [len(context) + len(text) for context, text in pairs]
            for chunk in length_sorted_chunks(lengths, settings.budget_tokens, count):
                batch = collate([encoded(pairs[i]) for i in chunk], settings.pad_id)
                plan, tensors = replicated(self.adapters, masks, batch)
                with self.adapters.axis.active(plan):
                    names = ("input_ids", "attention_mask", "position_ids")
                    hidden = hidden_states(model, *(tensors[name] for name in names))
                states = hidden.view(count, len(chunk), *hidden.shape[1:])
                for row, i in enumerate(chunk):
                    self.greedy[pairs[i]] = self._chosen(states[:, row], pairs[i][1])

    def _chosen(self, states: Tensor, text: Sequence[int]) -> dict[str, bool]:
        """Of one row, from the states (M, T, D) of its tokens, which end with `text`."""
        width = len(text)
        places = torch.arange(states.shape[1] - width - 1, states.shape[1] - 1, device=states.device)
        logits = head_of(self.adapters.model)(at(states, replicate_rows(places[None], len(states))).flatten(0, 1))
        logs = torch.log_softmax(logits.double(), dim=-1).view(len(states), width, -1)
        targets = torch.tensor(text, device=states.device)
        own = logs.gather(2, targets.expand(len(states), -1)[..., None])[..., 0]
        before = torch.cumsum(own, dim=1) - own
        found = {}
        for key, members in self.systems.items():
            mixed = torch.logsumexp(logs[list(members)] + before[list(members)][..., None], dim=0)
            found[key] = bool((mixed.argmax(dim=-1) == targets).all())
        return found


def encoded(pair: Pair) -> Encoded:
    """A context and what is scored behind it."""
    context, text = pair
    return Encoded("", (*context, *text), (*[IGNORE_INDEX] * len(context), *text))
