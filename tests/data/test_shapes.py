"""Forty tables as people have them: what each is read as, or refused with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig, TemplateConfig
from pipeline.data.check import Found, look_at
from pipeline.data.rows import Row
from pipeline.data.sources import parse
from pipeline.data.splits import load_splits
from pipeline.errors import UserError

Record = Mapping[str, Any]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def user(i: int) -> dict[str, Any]:
    return {"role": "user", "content": f"Hi {i}"}


def assistant(text: str = "Hello") -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def write(path: Path, record: Callable[[int], Record], rows: int = 24) -> str:
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(rows)), encoding="utf-8")
    return str(path)


def looked(tmp_path: Path, record: Callable[[int], Record], classifier: bool = False, **config: Any) -> Found:
    return look_at(DataConfig(path=write(tmp_path / "a.jsonl", record), **config), classifier=classifier)


def row(prompt: str, *choices: str, label: int | None = None, completion: str | None = None, **more: Any) -> Row:
    return Row("", prompt, choices, label, completion, **more)


READ: dict[str, tuple[Callable[[int], Record], str, Row]] = {
    "text, label in words": (
        lambda i: {"text": f"T {i}", "label": ("pos", "neg")[i % 2]}, "classification, 24 rows",
        row("T 1\nLabel:", " neg", " pos", label=0),
    ),
    "sentence, label as text": (
        lambda i: {"sentence": f"T {i}", "label": str(i % 3)}, "whose words are the numbers 0, 1, 2: name them",
        row("T 1\nLabel:", " 0", " 1", " 2", label=1),
    ),
    "integers from 0": (
        lambda i: {"text": f"T {i}", "label": i % 2}, "2 classes, whose words are the numbers",
        row("T 1\nLabel:", " 0", " 1", label=1),
    ),
    "integers from 1": (
        lambda i: {"text": f"T {i}", "label": 1 + i % 3}, 'label: "{label}"',
        row("T 1\nLabel:", " 1", " 2", " 3", label=1),
    ),
    "true and false": (
        lambda i: {"text": f"T {i}", "label": i % 2 == 0}, "2 classes", row("T 1\nLabel:", " False", " True", label=0),
    ),
    "text, category": (
        lambda i: {"text": f"T {i}", "category": f"c{i % 4}"}, "4 classes",
        row("T 1\nCategory:", " c0", " c1", " c2", " c3", label=1),
    ),
    "utterance, intent": (
        lambda i: {"utterance": f"T {i}", "intent": "ab"[i % 2]}, "classification",
        row("T 1\nIntent:", " a", " b", label=1),
    ),
    "label_text in the order of label": (
        lambda i: {"text": f"T {i}", "label": i % 2, "label_text": ("zero", "one")[i % 2]}, "2 classes",
        row("T 1\nLabel:", " zero", " one", label=1),
    ),
    "names in capitals": (
        lambda i: {"Text": f"T {i}", "Label": "ab"[i % 2]}, "classification", row("T 1\nLabel:", " a", " b", label=1),
    ),
    "review, sentiment beside an id": (
        lambda i: {"idx": i, "review": f"T {i}", "sentiment": "ab"[i % 2]}, "classification",
        row("T 1\nSentiment:", " a", " b", label=1),
    ),
    "two sentences": (
        lambda i: {"sentence1": f"A {i}", "sentence2": "B", "label": ("no", "yes")[i % 2]}, "of two texts, 24 rows",
        row("A 1\nB\nLabel:", " no", " yes", label=1),
    ),
    "premise, hypothesis": (
        lambda i: {"premise": f"A {i}", "hypothesis": "B", "label": i % 3}, "of two texts",
        row("A 1\nB\nLabel:", " 0", " 1", " 2", label=1),
    ),
    "question, sentence": (
        lambda i: {"question": f"A {i}", "sentence": "B", "label": "xy"[i % 2]}, "of two texts",
        row("A 1\nB\nLabel:", " x", " y", label=1),
    ),
    "question, answer, label": (
        lambda i: {"question": f"A {i}", "answer": "B", "label": i % 2}, "of two texts",
        row("A 1\nB\nLabel:", " 0", " 1", label=1),
    ),
    "question, answer": (
        lambda i: {"question": f"Q {i}", "answer": "A"}, "question and answer, 24 rows",
        row("Question: Q 1\nAnswer:", completion=" A"),
    ),
    "prompt, response": (
        lambda i: {"prompt": f"Q {i}", "response": "A"}, "prompt and response", row("Q 1\n", completion="A"),
    ),
    "prompt, completion": (
        lambda i: {"prompt": f"Q {i}", "completion": "A"}, "prompt and completion, 24 rows", row("Q 1", completion="A"),
    ),
    "input, output": (
        lambda i: {"input": f"Q {i}", "output": "A"}, "input and output", row("Q 1\n", completion="A"),
    ),
    "Alpaca without input": (
        lambda i: {"instruction": f"Do {i}", "input": "", "output": "A"}, "Alpaca, 24 rows; template {prompt: ",
        row("### Instruction:\nDo 1\n\n### Response:\n", completion="A"),
    ),
    "Alpaca with input": (
        lambda i: {"instruction": f"Do {i}", "input": "it", "output": "A"}, "Alpaca",
        row("### Instruction:\nDo 1\n\n### Input:\nit\n\n### Response:\n", completion="A"),
    ),
    "Alpaca, rows that lack input": (
        lambda i: {"instruction": f"Do {i}", "output": "A"} | ({"input": "it"} if i % 2 == 0 else {}), "Alpaca",
        row("### Instruction:\nDo 1\n\n### Response:\n", completion="A"),
    ),
    "Dolly": (
        lambda i: {"instruction": f"Do {i}", "context": "", "response": "A", "category": "open"}, "Alpaca",
        row("### Instruction:\nDo 1\n\n### Response:\n", completion="A"),
    ),
    "messages": (
        lambda i: {"messages": [user(i), assistant()]}, "messages (OpenAI, TRL), 24 rows",
        Row("", messages=(user(1), assistant())),
    ),
    "messages with text parts": (
        lambda i: {"messages": [{"role": "user", "content": [{"type": "text", "text": f"Hi {i}"}]}, assistant()]},
        "messages", Row("", messages=(user(1), assistant())),
    ),
    "messages with tool calls": (
        lambda i: {"messages": [user(i), {"role": "assistant", "content": None, "tool_calls": [CALL]},
                                {"role": "tool", "content": "2", "name": "add"}, assistant()], "tools": [TOOL]},
        "with tools",
        Row("", messages=(
            user(1),
            {"role": "assistant", "content": "", "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
            {"role": "tool", "content": "2", "name": "add"}, assistant(),
        ), tools=(TOOL,)),
    ),
    "ShareGPT": (
        lambda i: {"conversations": [{"from": "human", "value": f"Hi {i}"}, {"from": "gpt", "value": "Hello"}]},
        "ShareGPT (conversations), 24 rows", Row("", messages=(user(1), assistant())),
    ),
    "ShareGPT with a system text": (
        lambda i: {"system": "Be kind.", "conversations": [{"from": "human", "value": f"Hi {i}"},
                                                           {"from": "gpt", "value": "Hello"}]},
        "ShareGPT", Row("", messages=({"role": "system", "content": "Be kind."}, user(1), assistant())),
    ),
    "TRL, conversational prompt and completion": (
        lambda i: {"prompt": [user(i)], "completion": [assistant()]}, "conversational prompt and completion (TRL)",
        Row("", messages=(user(1), assistant())),
    ),
    "ARC": (
        lambda i: {"question": f"Q {i}", "choices": {"text": ["w", "x", "y"], "label": ["A", "B", "C"]},
                   "answerKey": "B"}, "ARC", row("Question: Q 1\nAnswer:", " w", " x", " y", label=1),
    ),
    "ARC with numbers for names": (
        lambda i: {"question": f"Q {i}", "choices": {"text": ["w", "x"], "label": ["1", "2"]}, "answerKey": "1"},
        "ARC", row("Question: Q 1\nAnswer:", " w", " x", label=0),
    ),
    "OpenBookQA": (
        lambda i: {"question_stem": f"Q {i}", "choices": [{"text": "w", "label": "A"}, {"text": "x", "label": "B"}],
                   "answerKey": "B"}, "choices: \" {choices}\"", row("Question: Q 1\nAnswer:", " w", " x", label=1),
    ),
    "MMLU": (
        lambda i: {"question": f"Q {i}", "choices": ["w", "x", "y", "z"], "answer": 3}, "MMLU",
        row("Question: Q 1\nAnswer:", " w", " x", " y", " z", label=3),
    ),
    "MMLU with letters": (
        lambda i: {"question": f"Q {i}", "choices": ["w", "x"], "answer": "B"}, "MMLU",
        row("Question: Q 1\nAnswer:", " w", " x", label=1),
    ),
    "columns A to D": (
        lambda i: {"question": f"Q {i}", "A": "w", "B": "x", "C": "y", "D": "z", "answer": "C"}, "lettered choices",
        row("Q 1\nA. w\nB. x\nC. y\nD. z\nAnswer:", " A", " B", " C", " D", label=2),
    ),
    "prompt, choices, label": (
        lambda i: {"prompt": f"Q {i}", "choices": [" w", " x"], "label": 1}, "choices, 24 rows",
        row("Q 1", " w", " x", label=1),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    record, said, expected = READ[name]
    found = looked(tmp_path, record)
    assert said in found.lines[0], found.lines
    second = found.rows[1]
    assert Row("", **{part: value for part, value in vars(second).items() if part != "id"}) == expected
    again, _ = parse([("f:2", dict(record(1)))], found.config.template, "f")
    assert again == [second], "the template of the resolved configuration gives the same rows"


REFUSED: dict[str, tuple[Callable[[int], Record], str, str]] = {
    "preferences": (
        lambda i: {"prompt": f"Q {i}", "chosen": "good", "rejected": "bad"},
        "holds preference rows (chosen beside rejected)",
        "data.template='{prompt: \"{prompt}\", completion: \"{chosen}\"}'",
    ),
    "preferences between chats": (
        lambda i: {"chosen": [user(i), assistant()], "rejected": [user(i), assistant("No")]},
        "holds preference rows", "rename chosen to messages",
    ),
    "completions labelled good or bad": (
        lambda i: {"prompt": f"Q {i}", "completion": "A", "label": i % 2 == 0},
        "holds preference rows (completions labelled true or false)", "Leave the false ones out",
    ),
    "several labels per row": (
        lambda i: {"text": f"T {i}", "labels": ["a", "b"]}, "has several labels per row", "Give a row per class",
    ),
    "one class": (
        lambda i: {"text": f"T {i}", "label": "a"}, "has one value ('a') in the column label", "two classes or more",
    ),
    "text alone": (lambda i: {"text": f"T {i}"}, "holds text alone", "prompt and completion"),
    "a picture in a chat": (
        lambda i: {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, assistant()]},
        "content[0] = 'image_url': is a content part that is no text", "Leave the row out",
    ),
    "ShareGPT with an unknown speaker": (
        lambda i: {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "from = 'narrator': must be one of human", "Rename who speaks",
    ),
    "columns that say nothing": (
        lambda i: {"left": f"M {i}", "right": "R"}, "the columns are left, right", "Map them with data.template",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    record, said, way_out = REFUSED[name]
    with pytest.raises(UserError) as caught:
        looked(tmp_path, record)
    assert said in str(caught.value) and way_out in str(caught.value), str(caught.value)


def test_too_many_classes_are_text_to_be_generated(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lambda i: {"text": f"T {i}", "label": f"free text {i}"}, rows=300)
    with pytest.raises(UserError, match="more than 200 different values in the column label.*to be generated"):
        look_at(DataConfig(path=path))


def test_a_classifier_reads_texts_and_pairs_as_they_are(tmp_path: Path) -> None:
    found = looked(tmp_path, lambda i: {"premise": f"A {i}", "hypothesis": "B", "label": i % 2}, classifier=True)
    assert (found.rows[1].prompt, found.rows[1].second) == ("A 1", "B")
    found = looked(tmp_path, lambda i: {"sentence1": f"A {i}", "sentence2": "B", "label": i / 2}, classifier=True)
    assert (found.rows[1].score, found.rows[1].second) == (0.5, "B")
    assert "pairs with a score" in found.lines[0]


def test_what_the_user_says_wins_and_the_columns_say_the_rest(tmp_path: Path) -> None:
    def record(i: int) -> Record:
        return {"text": f"T {i}", "label": i % 2, "other": "ab"[i % 2]}

    named = looked(tmp_path, record, template=TemplateConfig(choices=(" bad", " good"))).rows[1]
    assert (named.prompt, named.choices, named.label) == ("T 1\nLabel:", (" bad", " good"), 1)
    asked = looked(tmp_path, record, template=TemplateConfig(prompt="{text}?", label="other")).rows[1]
    assert (asked.prompt, asked.choices, asked.label) == ("T 1?", (" a", " b"), 1)
    whole = TemplateConfig(prompt="{text}", completion="{other}")
    found = looked(tmp_path, record, template=whole)
    assert found.config.template == whole and found.rows[1].completion == "b"


def test_classes_of_a_test_file_that_training_does_not_have_are_faults(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lambda i: {"text": f"T {i}", "label": "ab"[i % 2]}, rows=30)
    write(tmp_path / "test.jsonl", lambda i: {"text": f"U {i}", "label": "abc"[i % 3]}, rows=6)
    with pytest.raises(UserError, match=r"test.jsonl:3: label = 'c': must be 0 to 1 or the text of a choice"):
        look_at(DataConfig(path=str(tmp_path)))


def test_the_order_of_rows_does_not_decide_about_classes(tmp_path: Path) -> None:
    def record(i: int) -> Record:
        return {"text": f"T {i}", "label": ["b", "a", "10", "9"][i % 4]}

    forward = looked(tmp_path, record).config.template
    assert forward == looked(tmp_path, lambda i: record(23 - i)).config.template
    assert forward is not None and forward.choices == (" 9", " 10", " a", " b")


def test_loading_finds_what_the_check_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lambda i: {"text": f"T {i}", "label": "ab"[i % 2]}, rows=40)
    found = look_at(DataConfig(path=path))
    assert load_splits(DataConfig(path=path)) == load_splits(found.config)


def test_a_row_without_an_answer_yet_is_read_by_the_same_template(tmp_path: Path) -> None:
    """Whoever asks for predictions puts an index under the label's name."""
    found = looked(tmp_path, lambda i: {"text": f"T {i}", "label": 1 + i % 3})
    template = found.config.template
    assert template is not None and template.label is not None
    (unseen,), _ = parse([("f:1", {"text": "new", template.label: 0})], template, "f")
    assert (unseen.prompt, unseen.choices, unseen.label) == ("new\nLabel:", (" 1", " 2", " 3"), 0)
