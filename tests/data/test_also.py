"""Rows of the other data sets of a run: read as its own are, none of which it was shown."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from pipeline.config import DataConfig, TemplateConfig
from pipeline.config.evaluate import AlsoConfig
from pipeline.data.rows import Row
from pipeline.data.shapes.also import check_also, load_also
from pipeline.data.splits import Splits
from pipeline.errors import DataError, ErrorList

CHOICES = (" bad", " good")
TEMPLATE = TemplateConfig(prompt="{text}\nMood:", choices=CHOICES, label="label")
DATA = DataConfig(path="mine.jsonl", template=TEMPLATE)


def row(name: str, **more: object) -> Row:
    return Row(**{"id": name, "prompt": f"{name}\nMood:", "choices": CHOICES, "label": 1, **more})  # type: ignore[arg-type]


OWN = Splits([row("seen")], [row("b")], [row("c")], [row("tested")], "")


def written(path: Path, rows: list[dict[str, object]]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def labelled(*texts: str) -> list[dict[str, object]]:
    return [{"text": text, "label": "good"} for text in texts]


def test_rows_are_read_as_the_runs_own_and_none_of_its_questions_is_among_them(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", labelled("new", "seen", "tested", "newer", "new"))
    found = load_also({"a": AlsoConfig(path=path)}, DATA, OWN)["also_a"]
    assert {one.prompt for one in found.rows} == {"new\nMood:", "newer\nMood:"} and found.labels
    assert [(one.choices, one.label) for one in found.rows] == [(CHOICES, 1)] * 2 and found.shown == 2


def test_fewer_rows_are_among_more_and_whole_units_come_together(tmp_path: Path) -> None:
    rows = [{**one, "unit": f"u{number // 3}"} for number, one in enumerate(labelled(*map(str, range(30))))]
    path = written(tmp_path / "a.jsonl", rows)
    few, more, every = (
        load_also({"a": AlsoConfig(path=path, rows=count)}, DATA, OWN)["also_a"] for count in (6, 12, None)
    )
    assert len(few.rows) == 6 and len(every.rows) == 30 and more.rows[:6] == few.rows
    assert len({one.unit for one in few.rows}) == 2
    assert few.fingerprint != more.fingerprint


def test_rows_without_labels_take_the_choices_of_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", [{"text": "far"}, {"text": "away", "label": "oos"}])
    with pytest.raises(ErrorList, match=r"evaluate\.also\.a\.labels.*labels: false"):
        load_also({"a": AlsoConfig(path=path)}, DATA, OWN)
    found = load_also({"a": AlsoConfig(path=path, labels=False)}, DATA, OWN)["also_a"]
    assert not found.labels and {(one.prompt, one.choices) for one in found.rows} == {
        ("far\nMood:", CHOICES), ("away\nMood:", CHOICES)}
    plain = DataConfig(path="mine.jsonl")  # {prompt, choices, label}
    path = written(tmp_path / "b.jsonl", [{"prompt": "far"}])
    (only,) = load_also({"a": AlsoConfig(path=path, labels=False)}, plain, OWN)["also_a"].rows
    assert only.choices == CHOICES
    generated = Splits([row("x", choices=(), label=None, completion="y")] * 1, [], [], [], "")
    path = written(tmp_path / "c.jsonl", [{"prompt": "far", "completion": "z"}])
    with pytest.raises(DataError, match=r"evaluate\.also\.a\.labels.* wants rows with choices"):
        load_also({"a": AlsoConfig(path=path, labels=False)}, plain, generated)


def test_a_set_may_have_a_template_and_a_folder_of_its_own(tmp_path: Path) -> None:
    written(tmp_path / "parts" / "far.jsonl", [{"q": "new", "a": "good"}])
    template = TemplateConfig(prompt="{q}?", choices=CHOICES, label="a")
    one = AlsoConfig(path=str(tmp_path / "parts"), split="far", template=template)
    assert load_also({"a": one}, DATA, OWN)["also_a"].rows[0].prompt == "new?"
    (tmp_path / "parts" / "packed.jsonl.gz").write_bytes(gzip.compress((tmp_path / "parts" / "far.jsonl").read_bytes()))
    packed = one.model_copy(update={"split": "packed"})
    assert load_also({"a": packed}, DATA, OWN)["also_a"].rows[0].prompt == "new?"
    with pytest.raises(DataError, match=r"evaluate\.also\.a\.split = 'test': is no file of"):
        load_also({"a": one.model_copy(update={"split": "test"})}, DATA, OWN)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "seen", "label": 1}], "holds no row whose question"),
        ([{"prompt": "p", "completion": "c"}], "holds completion rows, and the run has choice rows"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(tmp_path: Path, rows: list[dict[str, object]], said: str) -> None:
    path = written(tmp_path / "a.jsonl", rows)
    template = TemplateConfig(prompt="{prompt}", completion="{completion}") if "prompt" in rows[0] else None
    with pytest.raises(DataError, match=rf"evaluate\.also\.a.*{said}"):
        load_also({"a": AlsoConfig(path=path, template=template)}, DATA, OWN)


def test_before_a_start_local_sets_are_read_and_get_their_templates(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", labelled("one", "two", "three") + [{"text": "four", "label": "bad"}])
    also = {"a": AlsoConfig(path=path), "far": AlsoConfig(path="embedded:tweets")}
    checked = check_also(also, DataConfig(path="embedded:movie-reviews"), [], classifier=False)
    assert checked["far"] == also["far"]
    template = checked["a"].template
    assert template is not None and (template.choices, template.label) == ((" bad", " good"), "label")
    assert check_also({"a": AlsoConfig(path=path)}, DATA, [], False)["a"].template is None, "the run's"
    with pytest.raises(DataError, match=r"evaluate\.also\.x\.path = 'embedded:tweet': is not embedded"):
        check_also({"x": AlsoConfig(path="embedded:tweet")}, DATA, [], None)
    with pytest.raises(DataError, match="has other choices"):
        check_also({"a": AlsoConfig(path=path)}, DATA, [row("b", choices=("x", "y"))], classifier=True)
