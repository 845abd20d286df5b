"""Chat rows -> stretches of tokens that are supervised (assistant turns) or not (all the rest)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.data.rows import Row
from pipeline.data.tokens import following_ids
from pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segment = tuple[list[int], bool]
"""(token ids, whether they are supervised)."""


def chat_segments(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The conversation as alternating context and assistant segments; the last is the last answer.

    An answer is what the template writes behind its generation prompt up to and with the end-of-turn mark;
    the generation prompt itself and blanks behind the mark are context, because the model never writes them.
    Each segment is tokenized on its own, as at inference, where the context ends before the answer begins.

    Raises:
        DataError: no chat template, a template that refuses the row, leaves out its tools or tool calls, or does not
            render a conversation as the continuation of its own beginning.
    """
    _refuse_left_out(row, tokenizer)
    texts = list(_segment_texts(row, tokenizer))
    first, *rest = (text for text, _ in texts)
    ids = [list(tokenizer(first, add_special_tokens=False)["input_ids"]), *following_ids(tokenizer, rest)]
    return [(tokens, supervised) for tokens, (_, supervised) in zip(ids, texts, strict=True)]


def _segment_texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    done = ""
    for turn, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        context = _render(row, turn, tokenizer, prompt=True)
        answered = _render(row, turn + 1, tokenizer, prompt=False).rstrip()
        if not context.startswith(done):
            raise _not_a_prefix(
                row, turn, "renders an earlier assistant turn differently once the conversation goes on",
                "Give one row per answer without earlier assistant turns, or a model with another chat template.",
            )
        if not answered.startswith(context) or answered == context.rstrip():
            raise _not_a_prefix(
                row, turn, f"does not render the answer behind its generation prompt, which ends {context[-40:]!r}",
                "Begin the answer with what that prompt opens (such as <think>), or use {prompt, completion} rows.",
            )
        yield context[len(done) :], False
        yield answered[len(context) :], True
        done = answered


def _refuse_left_out(row: Row, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse what the template would leave out without a word: functions, calls of them, what these returned."""
    without: list[tuple[str, Row]] = []
    if row.tools:
        without.append(("tools", replace(row, tools=())))
    for turn, message in enumerate(row.messages):
        if "tool_calls" in message:
            silent = {key: value for key, value in message.items() if key != "tool_calls"}
            without.append((f"messages[{turn}].tool_calls", _with_turn(row, turn, silent)))
        elif message["role"] == "tool" and message["content"]:
            without.append((f"messages[{turn}] of the role tool", _with_turn(row, turn, {**message, "content": ""})))
    whole = _render(row, len(row.messages), tokenizer, prompt=False) if without else ""
    for what, poorer in without:
        if _render(poorer, len(row.messages), tokenizer, prompt=False) == whole:
            raise DataError(
                f"{row.named}: {what}", None, "is not rendered by the model's chat template, which leaves it out",
                "Use a model whose chat template knows tools, or put it into the texts.",
            )


def _with_turn(row: Row, turn: int, message: dict[str, Any]) -> Row:
    return replace(row, messages=(*row.messages[:turn], message, *row.messages[turn + 1 :]))


def _render(row: Row, turns: int, tokenizer: PreTrainedTokenizerBase, prompt: bool) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "data.path", None, "holds chat rows, and the tokenizer of model.path has no chat template",
            "Use an instruction-tuned model, or {prompt, completion} rows.",
        )
    messages: Sequence[dict[str, Any]] = row.messages[:turns]
    tools: dict[str, Any] = {"tools": list(row.tools)} if row.tools else {}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **tools))
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"{row.named}: messages", None, f"is refused by the model's chat template ({error})",
            "Change the roles or their order, or use {prompt, completion} rows.",
        ) from error


def _not_a_prefix(row: Row, turn: int, constraint: str, remedy: str) -> DataError:
    return DataError(f"{row.named}: messages[{turn}]", None, f"the model's chat template {constraint}", remedy)
