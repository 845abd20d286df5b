"""Text -> token ids, so that prompt and answer meet where they meet at inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[int]]:
    """(special tokens that the tokenizer puts before a text, such as BOS; tokens of the text).

    What it would put behind (EOS, SEP) is left off: the answer follows.
    """
    lead, body, _ = framed_ids(tokenizer, prompt)
    return lead, body


def framed_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int], list[int]]:
    """(special tokens before a text, tokens of the text, special tokens behind it), as the tokenizer frames it."""
    body = _ids(tokenizer, text)
    marked = list(tokenizer(text)["input_ids"])
    for start in range(len(marked) - len(body) + 1):
        if marked[start : start + len(body)] == body:
            return marked[:start], body, marked[start + len(body) :]
    return [], body, []


def following_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text as it continues another one, without special tokens.

    A text is tokenized behind a line break, whose tokens are then removed, because SentencePiece-like
    tokenizers put a blank before whatever begins a text. Where line break and text merge (a byte-level
    tokenizer, which adds no blank), the text is tokenized alone.
    """
    anchor = _ids(tokenizer, _ANCHOR)
    anchored = tokenizer([_ANCHOR + text for text in texts], add_special_tokens=False)["input_ids"]
    return [
        list(ids[len(anchor) :]) if list(ids[: len(anchor)]) == anchor else _ids(tokenizer, text)
        for ids, text in zip(anchored, texts, strict=True)
    ]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
