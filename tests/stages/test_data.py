"""`loradrop data`: what is printed, by an independent count, and on public data sets of four kinds."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT
from rich.console import Console

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.stages.data import show_data
from pipeline.support.tiny import byte_level_tokenizer

SHARED = ROOT.parent / "shared" / "data"
SIZES = ["data.train_rows=20", "data.validation_rows=5", "data.calibration_rows=5", "data.test_rows=6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and a configuration, and no weights: loading a model would fail."""
    folder = tmp_path_factory.mktemp("model")
    byte_level_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def shown(model: Path, data: Path, *settings: str, rows: int = 1, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, soft_wrap=True, highlight=False, force_terminal=colour,
                      color_system="standard" if colour else None)
    show_data(load_config(None, [f"model.path={model}", f"data.path={data}", *SIZES, *settings]), rows, console)
    return stream.getvalue()


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def figures(text: str, split: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(f"{split} ") and "·" not in line)


def test_choices_and_figures(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "choices": [" yes", " no"], "label": i % 2} for i in range(40)]
    text = shown(model, written(tmp_path / "rows.jsonl", rows))
    assert len(re.findall(r"^Question \d+\?«(?: yes» *\nother choices: ' no'| no» *\nother choices: ' yes')",
                          text, re.MULTILINE)) == 4
    split, count, tokens, share, least, _, _, most, cut, refused, _ = figures(text, "train")
    assert (split, count, cut, refused) == ("train", "20", "0", "0")
    tokenizer = byte_level_tokenizer()
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) + 1 for row in rows]  # " yes", " no": a token each
    assert min(lengths) <= int(least) <= int(most) <= max(lengths)
    assert 20 * int(least) <= int(tokens) <= 20 * int(most)
    assert share == f"{20 / int(tokens):.1%}"


def test_padding_is_that_of_the_micro_batches(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02d}" + " a" * (i % 4), "completion": "b"} for i in range(36)]
    path = written(tmp_path / "rows.jsonl", rows)
    one = shown(model, path, "train.micro_batch=1", rows=0)
    assert figures(one, "train")[-1] == "0.0%"
    two = float(figures(shown(model, path, "train.micro_batch=2", rows=0), "train")[-1].rstrip("%"))
    whole = float(figures(shown(model, path, "train.micro_batch=16", rows=0), "train")[-1].rstrip("%"))
    assert 0 < two < whole < 50


def test_chats_colour_assistant_turns_only(model: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"},
             {"role": "user", "content": "more"}, {"role": "assistant", "content": "yes and no"}]
    rows = [{"messages": [{"role": "user", "content": f"hello {i}"}, *turns[1:]]} for i in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    text = shown(model, path)
    assert text.count("assistant\n«there<|im_end|>»\n<|im_start|>user\nmore<|im_end|>\n") == 4
    assert text.count("assistant\n«yes and no<|im_end|>»") == 4 and text.count("«") == 8
    coloured = shown(model, path, colour=True)
    assert "«" not in coloured and coloured.count("\x1b[1;32mthere<|im_end|>") == 4
    assert "\x1b[2m<|im_start|>system" in coloured


def test_cut_and_refused_rows_are_counted(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:02d} " + "x" * (30 if i % 2 else 3), "completion": "y" * (60 if i % 10 == 0 else 2)}
            for i in range(60)]
    text = shown(model, written(tmp_path / "rows.jsonl", rows), "data.train_rows=null", "data.max_tokens=20")
    tokenizer = byte_level_tokenizer()
    needed = max(sum(len(tokenizer(part)["input_ids"]) for part in row.values()) + 1 for row in rows)  # 1: eos
    assert f"data.max_tokens={needed} holds every row whole" in text
    assert re.search(r"cannot hold \((row \w{16} \(\S+rows\.jsonl:\d*1\), ){3}…\); training would stop", text)
    counted = [figures(text, split) for split in ("train", "validation", "calibration", "test")]
    assert sum(int(row[-2]) for row in counted) == 6 and sum(int(row[-3]) for row in counted) == 30


def test_classes_are_named(model: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    byte_level_tokenizer().save_pretrained(encoder)
    (encoder / "config.json").write_text('{"model_type": "bert"}')
    rows = [{"prompt": f"Text {i}", "choices": ["dull", "fine"], "label": 1} for i in range(40)]
    text = shown(encoder, written(tmp_path / "rows.jsonl", rows))
    assert text.count("\nclass: fine\nother choices: 'dull'") == 4 and "«" not in text


def test_the_command_needs_no_model_and_tells_a_fault_of_the_data(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": "yes"} for i in range(40)]
    path = written(tmp_path / "rows.jsonl", rows)
    settings = [f"model.path={model}", f"data.path={path}", *SIZES]
    assert main(["data", "--rows", "0", *settings]) == 0
    assert figures(capsys.readouterr().out, "test")[1] == "6"
    assert main(["data", *settings, "data.test_rows=60"]) == 2
    assert "data.test_rows" in capsys.readouterr().err


KINDS = {
    "pairs": ("glue_rte/train.tsv", "{prompt: '{sentence1}\nDoes it follow that: {sentence2}\nAnswer:',"
              " choices: [' entailment', ' not_entailment'], label: label}", r"Answer:«( entailment| not_entailment)»"),
    "multiple choice": ("arc_easy/ARC-Easy.train.json", "{prompt: '{instruction}\nThe correct answer is', choices:"
                        " [' answer1', ' answer2', ' answer3', ' answer4', ' answer5'], label: answer}",
                        r"The correct answer is« answer[1-5]»"),
    "generation": ("e2e/devset.csv", "{prompt: '{mr}\n', completion: '{ref}'}", r"\]\n«[A-Z][^«»]*<\|im_end\|>»"),
    "instruction": ("alpaca_en_1k/alpaca_en_demo.json", "{prompt: '{instruction}\n{input}\n', completion: '{output}'}",
                    r"\n«[^«»]+<\|im_end\|>»"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_public_data_of_four_kinds(model: Path, kind: str) -> None:
    name, template, pattern = KINDS[kind]
    if not (SHARED / name).is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    template = template.replace("\n", "\n\n")  # YAML folds a single line break inside quotes
    text = shown(model, SHARED / name, f"data.template={template}", "data.max_tokens=2048")
    assert len(re.findall(pattern, text)) == 4, text
    counts = [figures(text, split)[1] for split in ("train", "validation", "calibration", "test")]
    assert counts == ["20", "5", "5", "6"]
    assert 0.005 < float(figures(text, "train")[3].rstrip("%")) / 100 < 0.95


HOSTILE = "\x1b[2J\x1b]0;mine\x07\u202e\x9b1m\u2066"
SHOWN = r"\x1b[2J\x1b]0;mine\x07\u202e\x9b1m\u2066"


@pytest.mark.parametrize("colour", [False, True])
def test_control_characters_of_rows_are_shown_not_obeyed(model: Path, tmp_path: Path, colour: bool) -> None:
    rows = [
        {"id": f"{i}{HOSTILE}\nforged", "prompt": f"Q{i}{HOSTILE}\n?", "choices": [" yes", HOSTILE], "label": i % 2}
        for i in range(40)
    ]
    path = written(tmp_path / "rows.jsonl", rows)
    text = shown(model, path, rows=3, colour=colour)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # our own colours
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", plain)
    assert SHOWN in plain and rf"{SHOWN}\nforged" in plain and f"{SHOWN}\n?" in plain
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for file in model.iterdir():
        (encoder / file.name).write_bytes(file.read_bytes())
    (encoder / "config.json").write_text('{"model_type": "bert"}')
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown(encoder, path, rows=3, colour=colour))
    assert "\x1b" not in plain and f"class: {SHOWN}" in plain


def test_a_file_name_reaches_the_terminal_escaped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{HOSTILE}\nforged").touch()
    assert main(["data", f"model.path={model}", f"data.path={tmp_path}"]) == 2
    text = capsys.readouterr().err
    assert f"has no train file; it holds {SHOWN} forged." in text and "\x1b" not in text
    assert len(text.splitlines()) == 1
