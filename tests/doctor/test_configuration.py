"""What the doctor says of a configuration: settings, model, rows, pad token, chat template, label words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.doctor import configuration
from pipeline.doctor.configuration import configuration_findings, label_words, pad_token
from pipeline.doctor.finding import Finding
from pipeline.plan.request import Request
from pipeline.support.tiny import byte_level_tokenizer, tiny_tokenizer


def look(*overrides: str) -> dict[str, Finding]:
    return {found.check: found for found in configuration_findings(Request(overrides=overrides))}


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {name: one.state for name, one in found.items()}


def test_a_sound_configuration(tiny_settings: list[str]) -> None:
    found = look(*tiny_settings)
    assert states(found) == dict.fromkeys(("configuration", "model", "data", "pad token", "label words"), "ok")
    assert "causal" in found["model"].detail and "64 train" in found["data"].detail
    assert "' negative' 1, ' positive' 1" in found["label words"].detail


@pytest.mark.parametrize(
    ("override", "check", "remedy"),
    [
        ("adapter.rnak=3", "configuration", "rank"),
        ("model.path=/no/such/model", "model", "model folder"),
        ("data.path=/no/such/rows.jsonl", "data", "local file"),
        ("data.max_tokens=1", "data", "data.max_tokens="),
    ],
)
def test_each_fault_stands_under_its_section_with_the_way_out(
    tiny_settings: list[str], override: str, check: str, remedy: str
) -> None:
    found = look(*tiny_settings, override)
    red = {name: one for name, one in found.items() if one.state == "FAIL"}
    assert list(red) == [check] and remedy in red[check].remedy + red[check].detail


def test_chats_need_a_template(tmp_path: Path, tiny_folder: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good film"}]
    rows = [{"messages": [{**turns[0], "content": f"hello {n}"}, turns[1]]} for n in range(40)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [f"data.{split}_rows=5" for split in ("train", "validation", "calibration", "test")]
    given = [f"model.path={tiny_folder / 'model'}", f"data.path={tmp_path / 'chats.jsonl'}", *sizes]
    found = look(*given)
    assert found["chat template"].state == "FAIL" and "chat_template.jinja" in found["chat template"].remedy
    assert "label words" not in found


def test_what_is_fetched_at_the_first_start_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORADROP_CACHE", str(tmp_path))
    assert states(look("train.max_steps=3")) == {"configuration": "ok", "model": "note", "data": "note"}


def test_pad_tokens() -> None:
    tokenizer = tiny_tokenizer()
    assert "end token" in pad_token(tokenizer).detail
    tokenizer.pad_token = None
    assert pad_token(tokenizer).state == "FAIL"


def test_label_words_that_the_model_cannot_tell_apart() -> None:
    from pipeline.data.rows import Row

    tokenizer = tiny_tokenizer()
    rows = [Row("1", prompt="a", choices=(" good", "  good"), label=0)]
    assert "the same tokens" in label_words(tokenizer, rows).detail
    rows = [Row("1", prompt="a", choices=(" good", " marvellous"), label=0)]
    assert "vocabulary" in label_words(tokenizer, rows).detail
    assert label_words(byte_level_tokenizer(), rows).state == "ok"
    many = [Row("1", prompt="a", choices=tuple(f" {n}" for n in range(20)), label=0)]
    assert f"and {20 - configuration.LISTED} more" in label_words(byte_level_tokenizer(), many).detail
