"""Records -> rows: shapes, templates, labels, ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import TemplateConfig
from pipeline.data.rows import IdRegister, Row
from pipeline.data.template import check_template, fill, find_label, to_row
from pipeline.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def refusal(values: Mapping[str, Any], template: TemplateConfig | None = None) -> str:
    with pytest.raises(DataError) as caught:
        to_row(values, template, "f.jsonl:7")
    return str(caught.value)


def test_three_shapes_need_no_template() -> None:
    choice = to_row({"prompt": "Q", "choices": [" a", " b"], "label": 1}, None, "f:1")
    completion = to_row({"prompt": "Q", "completion": " A", "references": ["x", "y"]}, None, "f:2")
    chat = to_row({"messages": CHAT}, None, "f:3")
    assert (choice.kind, choice.prompt, choice.choices, choice.label) == ("choice", "Q", (" a", " b"), 1)
    assert (completion.kind, completion.completion, completion.references) == ("completion", " A", ("x", "y"))
    assert (chat.kind, chat.messages) == ("chat", tuple(CHAT))


def test_lists_in_a_csv_cell_are_json() -> None:
    row = to_row({"prompt": "Q", "choices": '["yes", "no"]', "label": "no"}, None, "f:1")
    assert (row.choices, row.label) == (("yes", "no"), 1)


@pytest.mark.parametrize(
    ("value", "choices", "expected"),
    [
        (1, (" a", " b"), 1),
        (1.0, (" a", " b"), 1),
        (2, (" a", " b"), None),
        (-1, (" a", " b"), None),
        (0.5, (" a", " b"), None),
        ("b", (" a", " b"), 1),
        (" B ", (" a", " b"), 1),
        ("B", (" b", " B"), 1),
        ("1", (" a", " b"), 1),
        ("-1", (" a", " b"), None),
        ("c", (" a", " b"), None),
        ("2", (" 1", " 2", " 3"), 1),
        (2, (" 1", " 2", " 3"), 2),
        (True, (" false", " true"), 1),
        (True, (" a", " b"), None),
        ("yes", (" yes", "yes "), None),
    ],
)
def test_label_is_an_index_or_a_text(value: object, choices: tuple[str, ...], expected: int | None) -> None:
    assert find_label(value, choices) == expected


def test_template_maps_columns() -> None:
    template = TemplateConfig(prompt="{s1} => {s2} {{x}}\nSame? ", choices=(" yes", " no, {s1}"), label="gold")
    row = to_row({"s1": "A", "s2": 2, "gold": "yes"}, template, "f:1")
    assert row == Row("", "A => 2 {x}\nSame? ", (" yes", " no, A"), 0)


def test_template_leaves_open_what_the_columns_have() -> None:
    row = to_row({"prompt": "P", "y": "no"}, TemplateConfig(choices=("yes", "no"), label="y"), "f:1")
    assert (row.prompt, row.label) == ("P", 1)
    row = to_row({"mr": "M", "ref": "R"}, TemplateConfig(prompt="{mr}:", completion=" {ref}"), "f:1")
    assert (row.kind, row.prompt, row.completion) == ("completion", "M:", " R")


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="{}")), st.text())
def test_fill_replaces_only_columns(text: str, value: str) -> None:
    assert fill(f"{text}{{col}}{text}", {"col": value}, "f:1") == text + value + text


def test_a_row_without_a_label_names_line_and_remedy() -> None:
    missing = refusal({"prompt": "Q", "choices": [" a", " b"]})
    assert "f.jsonl:7: label" in missing and "prompt, choices" in missing and "data.template" in missing
    null = refusal({"prompt": "Q", "choices": [" a", " b"], "label": None})
    assert "f.jsonl:7: label: is missing: the row has no label." in null and "' a', ' b'" in null
    assert "no label" in refusal({"prompt": "Q", "choices": [" a", " b"], "label": " "})


def test_label_out_of_range_names_value_and_range() -> None:
    text = refusal({"prompt": "Q", "choices": [" a", " b"], "label": 2})
    assert "f.jsonl:7: label = 2: must be 0 to 1 or the text of a choice." in text and "' a', ' b' (from 0)" in text


def test_label_errors_name_the_template_column() -> None:
    template = TemplateConfig(prompt="{q}", choices=("yes", "no"), label="gold")
    assert "f.jsonl:7: gold = 'maybe'" in refusal({"q": "Q", "gold": "maybe"}, template)
    assert "f.jsonl:7: gold: is not a column; the columns are q, label." in refusal({"q": "Q", "label": 0}, template)


def test_unknown_column_lists_those_there() -> None:
    text = refusal({"text": "Q", "label": 0}, TemplateConfig(prompt="{txet}", choices=("a", "b")))
    assert "f.jsonl:7: txet: is not a column; the columns are text, label." in text and "data.template" in text


def test_unknown_shape_lists_columns_and_shapes() -> None:
    text = refusal({"text": "Q", "category": "c"})
    assert "the columns are text, category" in text and "{prompt, completion}" in text and "data.template" in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"prompt": "  ", "choices": ["a", "b"], "label": 0}, "prompt = '  ': is empty. Fill in"),
        ({"prompt": "Q", "completion": ""}, "completion = '': is empty. Fill in"),
        ({"prompt": "Q", "completion": None}, "completion: has no value. Fill in"),
        ({"prompt": float("nan"), "completion": "A"}, "prompt = nan: is not a number. Fill in"),
        ({"prompt": "Q", "choices": ["a", "b"], "label": float("nan")}, "label = nan: is not a number. Give"),
        ({"prompt": ["Q"], "completion": "A"}, "prompt = ['Q']: must be a text or a number. Flatten"),
        ({"prompt": "Q", "choices": ["a"], "label": 0}, "choices = ['a']: must hold at least 2 texts, not 1. Add"),
        ({"prompt": "Q", "choices": ["a", " "], "label": 0}, "holds an empty text. Give every choice"),
        ({"prompt": "Q", "choices": ["a", "a"], "label": 0}, "holds the same text twice. Give every choice"),
        ({"prompt": "Q", "choices": "a|b", "label": 0}, "must be a list of texts. Give the list, or set data.template"),
        ({"completion": "A"}, "prompt: is not a column; the columns are completion. Rename"),
        ({"messages": []}, "must be a list of {role, content}. Give"),
        ({"messages": CHAT[:1]}, "messages = 'user': must end with an assistant turn, the one to be learnt. Cut"),
        ({"messages": CHAT[1:]}, "must not begin with an assistant turn. Add"),
        ({"messages": [{"from": "human", "value": "x"}]}, "messages[0] = {'from': 'human', 'value': 'x'}: must be"),
        ({"messages": [{"role": "human", "content": "x"}]}, "messages[0].role = 'human': must be one of system"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, "messages[1].content = '': is empty. Fill"),
    ],
)
def test_faults_name_column_value_constraint_and_remedy(values: dict[str, Any], expected: str) -> None:
    text = refusal(values)
    assert text.startswith("f.jsonl:7: ") and expected in text


def test_a_template_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(DataError, match="data.template: has a completion beside choices or label.*Keep choices"):
        check_template(TemplateConfig(completion="{a}", choices=("x", "y")))
    with pytest.raises(DataError, match="data.template.choices.*at least 2"):
        check_template(TemplateConfig(choices=("x",), label="y"))


def test_ids_are_given_or_of_the_content() -> None:
    register = IdRegister()
    named = [register.name(Row("", p, completion="A"), given, f"f:{i}") for i, (p, given) in enumerate(
        [("P", None), ("Q", None), ("P", None), ("P", None), ("R", 17)])]
    first, second, third, fourth, fifth = (row.id for row in named)
    assert len(first) == 16 and second != first
    assert (third, fourth, fifth) == (f"{first}-1", f"{first}-2", "17")
    with pytest.raises(DataError, match=r"f:9: id = '17': is the id of f:4 too. Make the ids unique"):
        register.name(Row("", "Z", completion="A"), "17", "f:9")


def test_question_keeps_continuations_of_a_conversation_together() -> None:
    more = (*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes"})
    assert Row("a", messages=tuple(CHAT)).question == Row("b", messages=more).question


def test_the_unit_is_a_column_that_no_model_reads() -> None:
    plain = to_row({"prompt": "Q", "completion": " A", "unit": 7}, None, "f:1")
    with_unit = IdRegister().name(plain, None, "f:1", unit=7)
    without = IdRegister().name(plain, None, "f:1", unit="  ")
    assert (with_unit.unit, without.unit) == ("7", None)
    assert with_unit.id == without.id and with_unit.content == without.content
