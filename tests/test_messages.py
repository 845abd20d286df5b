"""Messages for users that no other test reaches, in tables: what is wrong, and what is said (tests/messages.py)."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.config import load_config
from pipeline.config.deepspeed import fill_ds_config
from pipeline.config.load import read_yaml
from pipeline.config.space import FIXED, read_space
from pipeline.data.encode_classifier import refuse_for_causal, shared_choices
from pipeline.data.formats.faults import MOST_KINDS, Faults
from pipeline.data.rows import IdRegister, Row
from pipeline.data.template import to_row
from pipeline.ensemble.readout import free_text
from pipeline.errors import DataError, SetupError, UserError
from pipeline.plan.request import usable_place
from pipeline.run_folder.members import read_members
from pipeline.run_folder.metrics import read_metrics
from pipeline.run_folder.paths import read_saved
from pipeline.setup import install
from pipeline.stages import predict
from pipeline.stages.reference import test


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter.method=[{position: lora_A, rate: 0.5}]", "adapter.rate=0.1"], "adapter.rate goes with a preset"),
        (["adapter.method=[{position: lora_A, rate: 0.5, layers: [0.5, 0.5]}]"], "layers must satisfy 0 <= from < to"),
        (["adapter.kind=adalora", "adapter.adalora.warmup=1.5"], "must be a whole number of steps, or a fraction"),
        (["data.splits={test: test}"], "data.splits must name train"),
        (["data.sources=[{path: a.csv}]", "data.columns=[a]"], "data.columns belongs to data.path"),
        (["data.sources=[{path: a.csv}]", "data.streaming=true"], "data.streaming reads one source; keep data.path,"),
        (["launch.nodes=2"], "launch.nodes = 2 needs launch.processes, launch.master_addr, launch.master_port too"),
        (["a.b.c"], "is not of the form key.path=value"),
        (["adapter.rank=[1"], "is not a valid YAML value"),
    ],
)
def test_settings(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as found:
        load_config(None, overrides)
    assert said in str(found.value)


ZERO_3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"scheduler": {}}, "x.json: scheduler: is the run's own business. Remove it and set train.schedule."),
        ({"optimizer": {}}, "Remove it and set train.learning_rate."),
        ({"some": {"key": "auto"}}, "x.json: some.key = 'auto': is not decided by the run. Give it a value."),
        ({"train_batch_size": 3}, "contradicts the run, which has 4"),
        ({"bf16": {"enabled": True}}, "would cast the fp32 adapters"),
        ({**ZERO_3, "fp16": {"enabled": True}}, "fp16.enabled = True: would need loss scaling. Use bf16."),
        (ZERO_3, "is missing; ZeRO-3 needs it. Start from ds_configs/zero3.json."),
        ({**ZERO_3, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "= 'bf16': must be fp32"),
    ],
)
def test_deepspeed_files(source: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        fill_ds_config(source, {"train_batch_size": 4}, "x.json")
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "must hold a mapping of sections. Start with"),
        ("a: {b: 1, b: 2}\n", ":1: names 'a.b' twice. Keep one of the two."),
        ("a: 99999999999999999999\n", "does not fit 64 bits. Give a smaller number."),
        (f"a: 0x{'f' * 700}\n", "which is no number that can be read. What is to be a text goes into quotes."),
        ('a: "\\0"\n', "in a text. Leave it out."),
        ("a: [1\n", "is not valid YAML"),
    ],
)
def test_files_of_settings(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as found:
        read_yaml(tmp_path / "mine.yaml")
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{next(iter(FIXED))}: {{choice: [1]}}", "cannot be searched"),
        ("adapter.rank: {choice: [4, 4]}", "choice must list at least one value and none twice"),
        ("adapter.rank: {choice: []}", "choice must list at least one value and none twice"),
        ("adapter.alpha: {loguniform: [0.0, 1.0]}", "loguniform must be [low, high] with 0 < low < high"),
        ("adapter.rank: [4]", "must be a mapping. Example: `adapter.rank: {choice: [...]}`."),
    ],
)
def test_search_spaces(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(UserError) as found:
        read_space(tmp_path / "space.yaml")
    assert said in str(found.value)


def chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Q"}, *turns]}


CALL = {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (chat({"role": "assistant"}), "must be {role, content} with two texts"),
        (chat({**CALL, "tool_calls": [{"x": 1}]}), "must be {function: {name, arguments}}"),
        (chat({**CALL, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}), "arguments that are no JSON ("),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "{"}]},
         "is a function call that is no JSON ("),
        ({**chat({"role": "assistant", "content": "A"}), "tools": "search"},
         "f:1: tools = 'search': must be a list of functions (JSON schemas). Mend it, or leave the column out."),
    ],
)
def test_rows(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as found:
        to_row(values, None, "f:1")
    assert said in str(found.value)


def test_rows_that_a_model_cannot_take() -> None:
    with pytest.raises(DataError, match="has no rows. Give rows {prompt, choices, label}"):
        shared_choices([])
    with pytest.raises(DataError, match=r"row a \(f:1\): second = 'two': is the second text of a pair.*use an encoder"):
        refuse_for_causal([Row("a", "one", ("x", "y"), 0, second="two", where="f:1")])
    with pytest.raises(DataError, match="must be a name of at most 1000 characters, without NUL. Shorten it"):
        IdRegister().name(Row("", "Q", completion="A"), "x" * 1001, "f:1")
    faults = Faults("f")
    for number in range(MOST_KINDS + 2):
        faults.add(DataError("f:1", None, f"has the fault {'x' * number}"))
    assert str(faults.errors()[-1]) == "f: has 2 more kinds of faults."


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("", "Give a folder's name, or leave --run-dir out"), ("a\x1bb", "holds characters that cannot be shown"),
        ("/", "is the root of the file system"), ("x" * 250, "has too long a name"),
    ],
)
def test_places(place: str, said: str) -> None:
    with pytest.raises(UserError) as found:
        usable_place(place)
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["keys", "train", "data"], "takes one beginning of a key. Example: keys train."),
        (["verify", "a", "b"], "takes one folder. Example: loradrop verify runs/mine"),
    ],
)
def test_commands(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2 and said in capsys.readouterr().err


def test_run_folders(tmp_path: Path) -> None:
    for name, text, read, said in (
        ("config.yaml", "export: {members: 2}", lambda: read_saved(tmp_path / "config.yaml"), "before loradrop 0.2"),
        ("members.json", "[]", lambda: read_members(tmp_path), "names no member"),
        ("metrics.jsonl", json.dumps({"kind": "train"}) + "\n", lambda: list(read_metrics(tmp_path / "metrics.jsonl")),
         "no step that could be one. Remove that line, or restore the file."),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as found:
            read()
        assert said in str(found.value)
    assert "Rows with choices, or a score, can be predicted; `loradrop serve` writes texts." in str(free_text(tmp_path))


def test_files_of_predict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist. Give a file with rows, or - for standard input"):
        predict._source(str(tmp_path / "absent.jsonl"), tmp_path, 1)
    with pytest.raises(UserError, match="is another one on each of 2 nodes. Give a file that all see"):
        predict._source("-", tmp_path, 2)
    with pytest.raises(UserError, match="is no file.*Name a new file, such as answers.jsonl"):
        predict._usable("-")
    with pytest.raises(UserError, match="is no folder. Name a new file"):
        predict._usable(str(tmp_path / "absent" / "answers.jsonl"))


def test_what_a_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "find_spec", lambda name: None)
    assert "Python module = 'venv': is missing, so no environment can be made" in str(install.venv_fault())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "is missing, and CUDA kernels compile against it" in str(install.headers_fault())
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(SetupError, match="is needed, but holds something that launch.sh did not make. Rename it"):
        install._empty(tmp_path)
    monkeypatch.setattr(test, "ROOT", tmp_path)
    with pytest.raises(SetupError, match="holds no tests. Run it in a checkout"):
        test.run_tests(None)  # type: ignore[arg-type]
