"""A member, or an average of members, as a model of lm-evaluation-harness. Needs lm-eval: loaded by the command alone.

Texts become tokens by the harness's own rules (`TemplateLM`): context and continuation are tokenized together and cut
where the context's own tokens end; blanks at the end of a context belong to the continuation; an empty context is the
tokenizer's BOS, or EOS where it has none. Special tokens before a text are those that the tokenizer puts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.harness.likelihoods import Likelihoods, Pair
from pipeline.harness.texts import written
from pipeline.model.head import positions_of

LONGEST = 2048
"""Tokens, where a model does not say how many positions it has; as in the harness."""
LENGTH_NAMES, MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens"), 256
"""How tasks call the longest text, in tokens; where they do not say, as in the harness."""


class MembersLM(TemplateLM):
    """One system of a run."""

    def __init__(self, likelihoods: Likelihoods, system: str, greedy: bool) -> None:
        """`greedy`: whether a task asks if a text would be written, which costs a pass of its own."""
        super().__init__()
        self._likelihoods, self._system, self._greedy = likelihoods, system, greedy
        self.tokenizer: Any = likelihoods.task.base.tokenizer
        self.max_length = positions_of(likelihoods.task.base.model) or LONGEST

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer has it, but no second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, text) for _, context, text in requests]
        found = self._likelihoods.of(self._system, pairs).tolist()
        greedy = self._likelihoods.is_greedy(self._system, pairs) if self._greedy else [False] * len(pairs)
        return list(zip(found, greedy, strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: windows as long as the model reads, in which every token is scored once."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1,
            )
            own = [self._cut(*make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        found = iter(self._likelihoods.of(self._system, windows).tolist())
        return [sum(next(found) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first of the task's stops; sampling is refused before a model is loaded."""
        texts: dict[tuple[str, tuple[str, ...], int], str] = {}
        asked = [(context, *_stops(settings)) for context, settings in (request.args for request in requests)]
        for until, most in dict.fromkeys(one[1:] for one in asked):
            contexts = list(dict.fromkeys(one[0] for one in asked if one[1:] == (until, most)))
            room = max(1, self.max_length - most)
            prompts = [tuple(self.tok_encode(text)[-room:] or [self.prefix_token_id]) for text in contexts]
            found = written(self._likelihoods, self._system, prompts, until, most)
            texts.update({(context, until, most): text for context, text in zip(contexts, found, strict=True)})
        return [texts[one] for one in asked]

    def _cut(self, context: list[int], text: list[int]) -> Pair:
        """The last tokens that the model has positions for; what is scored is never cut."""
        room = max(1, self.max_length + 1 - len(text))
        return tuple(context[-room:]), tuple(text)


def _stops(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """(texts that end a generated one, its most tokens) of a task's generation_kwargs."""
    until = settings.get("until") or ()
    most = next((settings[name] for name in LENGTH_NAMES if settings.get(name)), MOST_TOKENS)
    return (until,) if isinstance(until, str) else tuple(until), int(most)
