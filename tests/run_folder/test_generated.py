"""Which rows are one prompt, what answers them, and who writes."""

from __future__ import annotations

from pipeline.data.rows import Row
from pipeline.run_folder.generated import asked, distinct_prompts, references_of, writers_of
from pipeline.run_folder.members import Group, PredictedMember


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_rows_with_one_prompt_are_its_references() -> None:
    rows = [
        Row("a", "one", completion=" first "), Row("b", "two", completion="x"),
        Row("c", "one", completion="second", references=("third", " ")), Row("d", "three", completion="y"),
    ]
    groups = distinct_prompts(rows, 2)
    assert [[row.id for row in group] for group in groups] == [["a", "c"], ["b"]]
    assert [text for row in groups[0] for text in references_of(row)] == ["first", "second", "third"]
    assert len(distinct_prompts(rows, None)) == 3


def test_chats_are_asked_all_that_precedes_the_last_answer() -> None:
    begin = (turn("user", "hello"), turn("assistant", "yes?"))
    short, long = Row("a", messages=begin), Row("b", messages=(*begin, turn("user", "bye"), turn("assistant", "bye!")))
    other = Row("c", messages=(*begin[:1], turn("assistant", "what?")))
    assert short.question == long.question, "one question, two prompts"
    assert asked(short) == asked(other) != asked(long)
    assert references_of(long) == ["bye!"]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert references_of(Row("d", messages=(turn("user", "do"), call))) == []


def test_writers_are_the_systems_of_a_run() -> None:
    def members(*groups: Group) -> list[PredictedMember]:
        return [PredictedMember(f"{group} {n}", group) for n, group in enumerate(groups)]

    run = members("base", "mean_field", "mask_draw", "mask_draw", "plain", "searched", "searched")
    assert writers_of(run) == {"base": [0], "plain": [4], "mean_field": [1], "masks_2": [2, 3]}
    assert writers_of(members("base", "mean_field", "mask_draw")) == {"base": [0], "mean_field": [1]}
    assert writers_of(members("base", "compared", "compared")) == {}
