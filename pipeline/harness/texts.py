"""Texts that a system writes behind contexts: greedy, by the average of its members' token distributions."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.encode import IGNORE_INDEX, Encoded
from pipeline.data.sampler import length_sorted_chunks
from pipeline.harness.likelihoods import Likelihoods
from pipeline.model.head import evaluating
from pipeline.prediction.decode import Decoder
from pipeline.prediction.generation import end_tokens
from pipeline.prediction.search import SearchSettings, search


def written(
    found: Likelihoods, system: str, prompts: Sequence[tuple[int, ...]], until: Sequence[str], most: int
) -> list[str]:
    """What follows each prompt (token ids), up to an end token, `most` tokens, or the first of the texts `until`."""
    task, model = found.task, found.adapters.model
    members = [found.members[place] for place in found.systems[system]]
    decoder = Decoder(found.adapters, members, task.passes.key, task.passes.pad_id)
    settings = SearchSettings(end_tokens(task.base.tokenizer, model), most)
    texts = [""] * len(prompts)
    lengths = [len(prompt) + most for prompt in prompts]
    with evaluating(model):
        for chunk in length_sorted_chunks(lengths, task.passes.budget_tokens, len(members)):
            rows = [Encoded(str(n), prompts[n], (IGNORE_INDEX,) * len(prompts[n])) for n in chunk]
            for n, one in zip(chunk, search(decoder, rows, settings), strict=True):
                words = [token for token in one.tokens if token not in settings.ends]
                texts[n] = _cut(str(task.base.tokenizer.decode(words, skip_special_tokens=True)), until)
    return texts


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text
