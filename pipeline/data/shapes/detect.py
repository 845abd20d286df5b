"""Which of the forms that people have a table has. The first that fits wins; each is said in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config import TemplateConfig
from pipeline.data.shapes.labels import class_parts, has_classes, is_score, label_column, prompt_end
from pipeline.data.shapes.table import Shape, Table
from pipeline.data.shapes.turns import is_turns
from pipeline.errors import DataError

TEXTS = ("text", "sentence", "content", "review", "utterance", "tweet", "question", "query", "input", "prompt", "title")
"""Columns that hold the one text of a classification."""
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
    ("question", "passage"), ("question", "answer"), ("text1", "text2"), ("text_a", "text_b"), ("query", "document"),
)
"""Columns that hold the two texts of a classification."""
GENERATED = (
    ("question", "answer", "Question: {0}\nAnswer:", " {0}"),
    ("question", "response", "Question: {0}\nAnswer:", " {0}"),
    ("prompt", "response", "{0}\n", "{0}"), ("prompt", "completion", "{0}", "{0}"),
    ("prompt", "output", "{0}\n", "{0}"), ("query", "response", "{0}\n", "{0}"), ("input", "output", "{0}\n", "{0}"),
    ("input", "target", "{0}\n", "{0}"),
    ("source", "target", "{0}\n", "{0}"), ("article", "highlights", "{0}\nSummary:", " {0}"),
    ("mr", "ref", "{0}\n", "{0}"), ("meaning_representation", "human_reference", "{0}\n", "{0}"),
    ("document", "summary", "{0}\nSummary:", " {0}"), ("dialogue", "summary", "{0}\nSummary:", " {0}"),
)
"""(column asked with, column answered with, prompt, completion)."""


def detect(table: Table) -> Shape | None:
    """What the table's rows are; None where they are nothing known, which the reader then says.

    Raises:
        DataError: a form that is known and cannot be trained on here, with the reason.
    """
    looks: tuple[Callable[[Table], Shape | None], ...] = (
        _preference, _chat, _as_they_are, _nested_choices, _alpaca, _classified_pair, _generated, _classified_text,
        _bare_text,
    )
    return next((shape for shape in (look(table) for look in looks) if shape is not None), None)


def _preference(table: Table) -> Shape | None:
    chosen, rejected, own = table.find("chosen"), table.find("rejected"), table.own
    if own.completion is not None or has_classes(own):
        return None
    if chosen is not None and rejected is not None:
        chats = any(is_turns(value) for value in table.seen(chosen))
        prompt = table.texts("prompt", "question", "instruction")
        named = f'data.template=\'{{prompt: "{{{prompt}}}", completion: "{{{chosen}}}"}}\''
        raise DataError(
            table.key, table.name, "holds preference rows (chosen beside rejected): what is trained here is the"
            " likelihood of an answer, not a preference between two",
            f"To train on the chosen answers, rename {chosen} to messages." if chats or prompt is None
            else f"To train on the chosen answers: {named}.",
        )
    label, completion = table.find("label"), table.find("completion")
    if completion is not None and label is not None and table.holds(label, lambda value: isinstance(value, bool)):
        raise DataError(
            table.key, table.name, "holds preference rows (completions labelled true or false): what is trained here"
            " is the likelihood of an answer, the bad ones among them",
            'Leave the false ones out, and the column label; or say data.template=\'{completion: "{completion}"}\'.',
        )
    return None


def _chat(table: Table) -> Shape | None:
    if table.own != TemplateConfig():
        return None
    extra = "with tools" if table.find("tools") in table.columns and table.seen(table.find("tools") or "") else ""
    if "messages" in table.columns and table.seen("messages"):
        return Shape("messages (OpenAI, TRL)", note=extra)
    if "conversations" in table.columns and table.lists("conversations"):
        return Shape("ShareGPT (conversations)", note=extra)
    if all(name in table.columns and table.holds(name, is_turns) for name in ("prompt", "completion")):
        return Shape("conversational prompt and completion (TRL)", note=extra)
    return None


def _as_they_are(table: Table) -> Shape | None:
    """The shapes that need no template, by their columns' names and values."""
    if not _fits("prompt", table, table.own.prompt):
        return None
    given = table.own.choices is not None or _holds_texts(table, "choices")
    if given and (table.own.label is not None or "label" in table.columns):
        return Shape("choices")
    if _fits("completion", table, table.own.completion):
        return Shape("prompt and completion")
    if _fits("score", table, table.own.score):
        return Shape("scores")
    return None


def _fits(column: str, table: Table, own: str | None) -> bool:
    return own is not None or (column in table.columns and table.texts(column) == column)


def _holds_texts(table: Table, column: str) -> bool:
    def texts(value: Any) -> bool:
        return isinstance(value, str) or (
            isinstance(value, list | tuple) and not any(isinstance(one, Mapping | list) for one in value)
        )

    return column in table.columns and table.holds(column, texts)


def _nested_choices(table: Table) -> Shape | None:
    """ARC, OpenBookQA, CommonsenseQA, MMLU, HellaSwag: a question, its choices, which of them is right."""
    choices = table.lists("choices", "endings", "options")
    question = table.texts("question", "question_stem", "ctx", "query", "prompt")
    answer = table.texts("answerKey", "answer", "label", "gold", "answer_idx")
    if question is None or answer is None:
        return None
    prompt = f"{{{question}}}" if question == "ctx" else f"Question: {{{question}}}\nAnswer:"
    if choices is not None:
        nested = any(isinstance(value, Mapping) for value in table.seen(choices))
        name = "ARC (choices with labels, answerKey)" if nested else "MMLU (a list of choices, the right one's index)"
        return Shape(name, TemplateConfig(prompt=prompt, choices=f" {{{choices}}}", label=answer))
    letters = [letter for letter in "ABCDEFGH" if letter in table.columns]
    if len(letters) >= 2 and letters == list("ABCDEFGH"[: len(letters)]):
        lines = "".join(f"\n{letter}. {{{letter}}}" for letter in letters)
        template = TemplateConfig(
            prompt=f"{{{question}}}{lines}\nAnswer:", choices=tuple(f" {letter}" for letter in letters), label=answer
        )
        return Shape("lettered choices (columns A, B, …)", template)
    return None


def _alpaca(table: Table) -> Shape | None:
    instruction = table.texts("instruction")
    output = table.texts("output", "response", "completion", "answer")
    if instruction is None or output is None:
        return None
    given = table.find("input", "context")
    part = ""
    if given is not None:
        there = f"{given} is defined and {given}" if table.lacking(given) else given
        part = f"{{% if {there} %}}### Input:\n{{{{ {given} }}}}\n\n{{% endif %}}"
    prompt = f"### Instruction:\n{{{{ {instruction} }}}}\n\n{part}### Response:\n"
    return Shape("Alpaca", TemplateConfig(prompt=prompt, completion=f"{{{output}}}"))


def _classified_pair(table: Table) -> Shape | None:
    for names in PAIRS:
        first, second = (table.texts(name) for name in names)
        answer = _answer(table)
        if first is None or second is None or answer is None:
            continue
        if names == ("question", "answer") and answer.casefold() != "label" and table.own.label is None:
            continue  # a topic beside an answer
        if _is_number(table, answer):
            return Shape(
                "pairs with a score", TemplateConfig(prompt=f"{{{first}}}", second=f"{{{second}}}", score=answer)
            )
        parts, note = class_parts(table, answer)
        if table.classifier:
            texts: dict[str, Any] = {"prompt": f"{{{first}}}", "second": f"{{{second}}}"}
        else:
            texts = {"prompt": f"{{{first}}}\n{{{second}}}{_end(table, answer, parts)}"}
        return Shape("classification of two texts", TemplateConfig(**texts, **parts), note)
    return None


def _generated(table: Table) -> Shape | None:
    if has_classes(table.own):
        return None
    for asked, answered, prompt, completion in GENERATED:
        first, second = table.texts(asked), table.texts(answered)
        if first is not None and second is not None:
            template = TemplateConfig(
                prompt=prompt.replace("{0}", f"{{{first}}}"), completion=completion.replace("{0}", f"{{{second}}}")
            )
            return Shape(f"{asked} and {answered}", template)
    return None


def _classified_text(table: Table) -> Shape | None:
    answer = _answer(table)
    text = next((name for name in map(table.texts, TEXTS) if name is not None and name != answer), None)
    if text is None or answer is None:
        return None
    if _is_number(table, answer):
        return Shape("texts with a score", TemplateConfig(prompt=f"{{{text}}}", score=answer))
    parts, note = class_parts(table, answer)
    end = "" if table.classifier else _end(table, answer, parts)
    return Shape("classification", TemplateConfig(prompt=f"{{{text}}}{end}", **parts), note)


def _answer(table: Table) -> str | None:
    """The column with the class or the number that a text has."""
    if table.own.completion is not None:
        return None
    return table.own.score or label_column(table) or table.texts("score")


def _is_number(table: Table, answer: str) -> bool:
    if has_classes(table.own):
        return False
    return table.own.score is not None or answer.casefold() == "score" or is_score(table, answer)


def _end(table: Table, answer: str, parts: Mapping[str, Any]) -> str:
    return prompt_end(answer, (parts["choices"],) if isinstance(parts["choices"], str) else parts["choices"])


def _bare_text(table: Table) -> Shape | None:
    text = table.texts("text", "content")
    if text is None or table.own != TemplateConfig() or len(table.columns) > 1:
        return None
    raise DataError(
        table.key, table.name, f"holds text alone (one column, {text}): there is no answer to be learnt or scored",
        "Give columns such as text and label, prompt and completion, or messages.",
    )
