"""Templates in Jinja: when a text is one, what it may do, what it says of its faults."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config import TemplateConfig
from pipeline.data.formats.record import Unusable
from pipeline.data.shapes.jinja import render
from pipeline.data.template import ColumnError, check_template, fill, to_row
from pipeline.errors import DataError


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{{ a }}!", "A!"),
        ("{{ a }}\n", "A\n"),
        ("{% if b %}{{ b }}{% endif %}{{ a }}", "A"),
        ("{{ n + 1 }}", "8"),
        ("{{ answers.text[0] }}", "first"),
        ("{% for t in answers.text %}{{ loop.index }}. {{ t }}\n{% endfor %}", "1. first\n2. second\n"),
        ("{{ answers | tojson }}", '{"text": ["first", "second"]}'),
        ('{{ a }} {"json": 1}', 'A {"json": 1}'),
        ("{{ late | default('none') }}", "none"),
        ("{a} {{a}}", "A {a}"),  # the short form, as ever: a column in single braces
        ("{a}", "A"),
        ("no mark", "no mark"),
    ],
)
def test_fill(text: str, filled: str) -> None:
    values = {"a": "A", "b": "", "n": 7, "answers": {"text": ["first", "second"]}}
    assert fill(text, values, "f:1") == filled


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ txet }}", "f:1 = '{{ txet }}': names what is no column ('txet' is undefined); the columns are a, none"),
        ("{% if txet %}x{% endif %}", "'txet' is undefined"),
        ("{{ a.b.c }}", "has no attribute 'b'"),
        ("{{ none }}{{ gap }}", "has a column without a value, in the template '{{ none }}{{ gap }}'. Fill in"),
        ("{{ nan }}", "holds what is neither a text nor a number"),
        ("{{ list }}", "f:1 = ['x']: holds what is neither a text nor a number"),
        ("{{ bad }}", "holds no UTF-8 text"),
        ("{{ a.__class__.__mro__ }}", "unsafe"),
        ("{{ list.append('y') }}", "is unsafe"),
        ("{{ 1 / 0 }}", "cannot be filled in (division by zero)"),
        ("{% for i in range(1000000000) %}x{% endfor %}", "Range too big"),
        ("{{ half }}", "holds half a character"),
    ],
)
def test_faults_name_the_line_and_the_columns(text: str, said: str) -> None:
    values: dict[str, Any] = {
        "a": "A", "gap": None, "nan": float("nan"), "list": ["x"], "bad": Unusable("no UTF-8 text"), "half": "\ud83d",
    }
    values = {"a": "A", "none": "ok", **values}
    with pytest.raises(DataError) as caught:
        fill(text, values, "f:1")
    assert said in str(caught.value), str(caught.value)


def test_a_text_that_is_no_jinja_is_refused_before_any_row() -> None:
    with pytest.raises(DataError, match=r"data.template.prompt = '{{ a': is not valid Jinja \(unexpected end"):
        check_template(TemplateConfig(prompt="{{ a", completion="x"))
    with pytest.raises(DataError, match="data.template.choices.*is not valid Jinja"):
        check_template(TemplateConfig(choices=("{% if %}", "x")))
    check_template(TemplateConfig(prompt="{a} {{no jinja!}}", completion="x"))
    assert fill("{a} {{no jinja!}}", {"a": "A"}, "f:1") == "A {no jinja!}"


def test_an_unknown_name_is_a_fault_of_the_table() -> None:
    with pytest.raises(ColumnError):
        to_row({"a": "A"}, TemplateConfig(prompt="{{ b }}", completion="x"), "f:1")


def test_choices_in_a_column() -> None:
    template = TemplateConfig(prompt="{q}", choices=" {options}.", label="key")
    row = to_row({"q": "Q", "options": '["w", "x"]', "key": "B"}, template, "f:1")
    assert (row.choices, row.label) == ((" w.", " x."), 1)
    with pytest.raises(DataError, match="f:1: options = 'w': must be a list of texts"):
        to_row({"q": "Q", "options": "w", "key": "B"}, template, "f:1")
    with pytest.raises(DataError, match="data.template.choices = 'yes': must be a list of texts, or name one column"):
        check_template(TemplateConfig(choices="yes"))


@pytest.mark.parametrize("text", ["{{ 9 ** 9 ** 9 }}", "{{ 'x' * 1000000000 }}", "{{ '%1000000000d' % 1 }}"])
def test_nothing_huge_is_made_of_something_small(text: str) -> None:
    with pytest.raises(DataError, match="whole numbers"):
        render(text, {}, "data.template")
    assert render("{{ 3 * n }}", {"n": 4}, "data.template") == "12"


def test_a_row_whose_columns_are_all_blank_is_a_fault() -> None:
    template = TemplateConfig(prompt="{title}\n{text}\nLabel:", choices=(" a", " b"), label="label")
    assert to_row({"title": "", "text": "t", "label": 0}, template, "f:1").prompt == "\nt\nLabel:"
    with pytest.raises(DataError, match="f:2: title and text = '': is empty. Fill in the text, or leave the row out."):
        to_row({"title": "", "text": " ", "label": 0}, template, "f:2")
