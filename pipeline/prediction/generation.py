"""Texts for rows, written by several systems, shared among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from pipeline.adapters.attach import Adapters
from pipeline.adapters.members import Member
from pipeline.config.evaluate import GenerateConfig
from pipeline.data.encode import IGNORE_INDEX, Encoded, encode_candidates
from pipeline.data.rows import Row
from pipeline.data.sampler import length_sorted_chunks
from pipeline.distributed import zero
from pipeline.distributed.world import World, agree, gather_objects
from pipeline.errors import ConfigError, Stopped
from pipeline.model.head import evaluating, positions_of
from pipeline.prediction.causal import KEY_COST
from pipeline.prediction.decode import Decoder, TokenSpace
from pipeline.prediction.search import SearchSettings, search
from pipeline.prediction.task import OnChunk, Task
from pipeline.run_folder.generated import Text


@dataclass(frozen=True)
class Writing:
    """What is written, and who else has a part in it."""

    task: Task
    """Of a causal model."""
    adapters: Adapters
    settings: GenerateConfig
    world: World
    space: TokenSpace = "probability"
    on_chunk: OnChunk | None = None
    """Told (prompts done, prompts in all) of this process."""
    stop_asked: Callable[[], bool] = lambda: False

    def write(
        self, rows: Sequence[Row], systems: Mapping[str, Sequence[Member]]
    ) -> tuple[list[Text], dict[str, float]]:
        """A text of every system for every row, and how long each system took; every process returns the whole.

        Args:
            rows: with different prompts.
            systems: key -> members whose average writes.

        Raises:
            ConfigError: prompts that leave the model no positions for a text.
            Stopped: on every process, where `stop_asked` says so on any of them.
        """
        tokenizer, model = self.task.base.tokenizer, self.adapters.model
        prompts = [prompt_of(encode_candidates(row, tokenizer, self.task.max_tokens)[0]) for row in rows]
        _require_room(model, prompts, self.settings)
        # The passes of a sharded model need every process: then each decodes all, in step with the others.
        together = zero.is_sharded(model)
        own = prompts if together else prompts[self.world.process_rank :: self.world.world_size]
        found: list[Text] = []
        seconds: dict[str, float] = {}
        stopped, done, total = False, 0, len(own) * len(systems)
        try:
            with evaluating(model):
                for key, members in systems.items():
                    started = time.monotonic()
                    for texts in self._of_system(own, key, members, tokenizer):
                        found += texts
                        done += len(texts)
                        self._after_chunk(done, total, together)
                    seconds[key] = time.monotonic() - started
        except Stopped:
            stopped = True
        shared = gather_objects((found, seconds, stopped))  # who is stopped meets the others here: none waits in vain
        if any(one[2] for one in shared):
            raise Stopped("stopped between two chunks of texts")
        places = {row.id: place for place, row in enumerate(rows)}
        texts = found if together else [text for part, _, _ in shared for text in part]
        order = list(systems)
        texts.sort(key=lambda text: (order.index(text.system), places[text.id]))
        return texts, {key: max(one[1][key] for one in shared) for key in systems}

    def _of_system(
        self, prompts: Sequence[Encoded], key: str, members: Sequence[Member], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[list[Text]]:
        passes, settings = self.task.passes, self.settings
        decoder = Decoder(self.adapters, members, passes.key, passes.pad_id, self.space)
        wanted = SearchSettings(
            end_tokens(tokenizer, self.adapters.model), settings.max_tokens, beams=settings.beams,
            length_penalty=settings.length_penalty, no_repeat_ngram=settings.no_repeat_ngram,
        )
        for chunk in length_sorted_chunks(_costs(prompts, settings), passes.budget_tokens, len(members)):
            texts = []
            for n, found in zip(chunk, search(decoder, [prompts[n] for n in chunk], wanted), strict=True):
                words = [token for token in found.tokens if token not in wanted.ends]
                text = str(tokenizer.decode(words, skip_special_tokens=True)).strip()
                texts.append(Text(prompts[n].example, key, text, len(found.tokens), found.log_prob, found.ended))
            yield texts

    def _after_chunk(self, done: int, total: int, together: bool) -> None:
        if self.on_chunk is not None:
            self.on_chunk(done, total)
        if agree(self.stop_asked(), self.world.device) if together else done < total and self.stop_asked():
            raise Stopped("stopped between two chunks of texts")


def prompt_of(row: Encoded) -> Encoded:
    """What precedes the (last) answer of an encoded row."""
    end = len(row.labels)
    while end and row.labels[end - 1] == IGNORE_INDEX:
        end -= 1
    while end and row.labels[end - 1] != IGNORE_INDEX:
        end -= 1
    return Encoded(row.example, row.input_ids[:end], (IGNORE_INDEX,) * end)


def end_tokens(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> tuple[int, ...]:
    """What training has put behind an answer, and what the model's own generation settings end a text with."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    return tuple(dict.fromkeys(token for token in found if isinstance(token, int)))


def _costs(prompts: Sequence[Encoded], settings: GenerateConfig) -> list[int]:
    """Of each prompt, in tokens of a pass: the prompt itself, and what its beams look up at their last token."""
    lengths = [len(prompt.input_ids) for prompt in prompts]
    return [length + settings.beams * (1 + (length + settings.max_tokens) // KEY_COST) for length in lengths]


def _require_room(model: nn.Module, prompts: Sequence[Encoded], settings: GenerateConfig) -> None:
    """Raises `ConfigError` where a prompt and the longest text exceed the positions of the model."""
    positions = positions_of(model)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    if positions is not None and longest + settings.max_tokens > positions:
        room = positions - longest
        raise ConfigError(
            "evaluate.generate.max_tokens", settings.max_tokens,
            f"does not fit behind a prompt of {longest} tokens: the model has {positions} positions",
            f"Set it to {room} or less." if room > 0 else "Set a smaller data.max_tokens.",
        )
