"""A member, or an average of members, as a model of lm-evaluation-harness. Needs lm-eval: loaded by the command alone.

Texts become tokens by the harness's own rules (`TemplateLM`): context and continuation are tokenized together and cut
where the context's own tokens end; blanks at the end of a context belong to the continuation; an empty context is the
tokenizer's BOS, or EOS where it has none. Special tokens before a text are those that the tokenizer puts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pipeline.errors import ConfigError
from pipeline.harness.likelihoods import Likelihoods, Pair

LONGEST = 2048
"""Tokens, where a model does not say how many positions it has; as in the harness."""


class MembersLM(TemplateLM):
    """One system of a run."""

    def __init__(self, likelihoods: Likelihoods, system: str, greedy: bool) -> None:
        """`greedy`: whether a task asks if a text would be written, which costs a pass of its own."""
        super().__init__()
        self._likelihoods, self._system, self._greedy = likelihoods, system, greedy
        self.tokenizer: Any = likelihoods.task.base.tokenizer
        config = likelihoods.task.base.model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or LONGEST)

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
        """Raises `ConfigError`: tasks that ask for it are refused before a model is loaded."""
        raise ConfigError("--tasks", None, "asks for generated texts", "Give tasks that score texts.")

    def _cut(self, context: list[int], text: list[int]) -> Pair:
        """The last tokens that the model has positions for; what is scored is never cut."""
        room = max(1, self.max_length + 1 - len(text))
        return tuple(context[-room:]), tuple(text)
