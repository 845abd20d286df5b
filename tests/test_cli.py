"""The command line: help without torch, faults with exit code 2 before anything is written or loaded."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from pipeline.cli import main
from pipeline.config import RunConfig, dump_config, load_config
from pipeline.distributed.worker import stage_main
from pipeline.errors import ConfigError
from pipeline.plan.request import Request
from pipeline.plan.resolve import fit_micro_batch, resolve_new, resolve_saved
from pipeline.run_folder.mark import claim
from pipeline.stages.table import STAGES


def rows(path: Path, lines: list[object]) -> str:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return f"data.path={path}"


def good_row(i: int) -> dict[str, object]:
    return {"prompt": f"text {i}", "choices": [" a", " b"], "label": i % 2}


@pytest.mark.parametrize("words", ["--help", "--version", "train --help"])
def test_help_and_version_import_nothing_heavy(words: str) -> None:
    code = (
        f"import sys; sys.argv=['x', *'{words}'.split()]\nfrom pipeline.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
    )
    code += "print([m for m in ('torch','transformers','pydantic','numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("[]")
    assert "loradrop" in done.stdout


def test_a_fault_is_found_without_torch_and_leaves_nothing(tmp_path: Path) -> None:
    code = "import sys\nfrom pipeline.cli import main\ncode = main(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    arguments = ["train", "--run-dir", str(tmp_path / "run"), "adapter.rate=1.5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.stdout.strip() == "2 False"
    assert "adapter.rate" in done.stderr and "1.5" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("missing", ["data.path", "nothing.jsonl"]),
        ("empty", ["empty"]),
        ("no label", ["label"]),
        ("out of range", ["label", "7"]),
        ("model", ["model.path", "no-model"]),
        ("deepspeed", ["train.deepspeed", "zero2"]),
        ("embedded model", ["embedded:smollm3", "embedded:smollm2-135m-instruct"]),
    ],
)
def test_faults_of_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, parts: list[str]) -> None:
    file = tmp_path / "rows.jsonl"
    good = [good_row(i) for i in range(50)]
    argument = {
        "missing": f"data.path={tmp_path}/nothing.jsonl",
        "empty": rows(file, []) if fault != "empty" else f"data.path={file}",
        "no label": rows(file, [*good, {"prompt": "x", "choices": [" a", " b"]}]) if fault == "no label" else "",
        "out of range": rows(file, [*good, {**good_row(1), "label": 7}]) if fault == "out of range" else "",
        "model": f"model.path={tmp_path}/no-model",
        "deepspeed": "train.deepspeed=zero9",
        "embedded model": "model.path=embedded:smollm3",
    }[fault]
    if fault == "empty":
        file.write_text("")
    before = sorted(tmp_path.iterdir())
    assert main(["train", "--run-dir", str(tmp_path / "run"), argument]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert sorted(tmp_path.iterdir()) == before


def test_an_unknown_stage_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["trian"])
    assert caught.value.code == 2
    assert "train" in capsys.readouterr().err


def test_a_key_given_as_an_option_is_told_how_keys_are_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--lora-r", "8"]) == 2
    assert "Keys are set as key.path=value, without dashes: see loradrop keys lora_r," in capsys.readouterr().err
    assert main(["train", "--dryrun"]) == 2
    assert "Did you mean --dry-run?" in capsys.readouterr().err


def test_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", "--run-dir", str(tmp_path / "run"), *tiny_settings]) == 0
    shown = capsys.readouterr().out
    assert "nothing has been started" in shown and "search" in shown and "rank: 4" in shown
    assert not list(tmp_path.iterdir())


def test_a_later_stage_without_a_run_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--run-dir", str(tmp_path / "none")]) == 2
    assert "Train first" in capsys.readouterr().err


def test_a_folder_of_another_configuration_is_refused(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.processes.run_world_stage", lambda *_: 0)
    claim(tmp_path, "run")
    (tmp_path / "config.yaml").write_text(dump_config(load_config("default", [*tiny_settings, "train.seed=5"])))
    (tmp_path / "metrics.jsonl").touch()
    assert main(["train", "--run-dir", str(tmp_path), *tiny_settings]) == 2
    assert "another configuration" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()  # ended before its first step, over a value that is mended now
    assert main(["train", "--run-dir", str(tmp_path), *tiny_settings]) == 0
    assert load_config(str(tmp_path / "config.yaml")).train.seed == 0


@pytest.mark.parametrize("stage", ["run", "search", "train", "evaluate", "report", "export", "compare", "data"])
def test_a_folder_of_the_old_layout_is_refused_in_one_sentence(
    tmp_path: Path, tiny_settings: list[str], capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    """As before version 0.2: export.members in config.yaml, members.json in the run's root."""
    tree = yaml.safe_load(dump_config(load_config("default", tiny_settings)))
    tree["export"] = {"forms": ["adapter", "members"], "members": None}
    for folder in (tmp_path / "x", tmp_path / "x-search", tmp_path / "x-compare"):
        folder.mkdir()
        for name in ("config.yaml", "requested.yaml"):
            (folder / name).write_text(yaml.safe_dump(tree))
    (tmp_path / "x" / "members.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = tiny_settings if stage in ("run", "search", "train", "compare") else []
    assert main([stage, "--run-dir", str(tmp_path / "x"), *settings]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loradrop: ")]
    assert "before loradrop 0.2" in said and "give another --run-dir" in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_micro_batch_that_processes_cannot_share_is_made_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["train.global_batch=16", "train.micro_batch=8", "launch.processes=4"])
    assert fit_micro_batch(config.train, config.launch).micro_batch == 4 and "8 -> 4" in capsys.readouterr().err
    assert {name for name, stage in STAGES.items() if stage.trains} == {"run", "train", "compare"}
    with pytest.raises(ConfigError, match=r"train\.global_batch=18"):
        fit_micro_batch(config.train, config.launch.model_copy(update={"processes": 6}))


def test_own_data_are_not_cut_to_the_sizes_of_the_embedded_rows(tmp_path: Path) -> None:
    config = resolve_new(Request(overrides=(f"data.path={tmp_path}",)), "train")
    assert (config.data.train_rows, config.data.max_tokens) == (None, 512)


def test_later_stages_refuse_keys_that_they_do_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None)))
    with pytest.raises(ConfigError, match="not read by evaluate"):
        resolve_saved(Request(run_dir=str(tmp_path), overrides=("adapter.rank=16",)), "evaluate")
    resolve_saved(Request(run_dir=str(tmp_path), overrides=("launch.processes=1",)), "evaluate")


def test_a_later_stage_takes_what_it_makes_again_and_sends_the_rest_to_who_does(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None)))

    def resolved(stage: str, *words: str) -> RunConfig:
        return resolve_saved(Request(run_dir=str(tmp_path), overrides=words), stage)

    source = "data.evaluation={path: x.jsonl, splits: {validation: a, calibration: b, test: c}}"
    found = resolved("evaluate", "ensemble.size=16", "evaluate.ece_bins=9", source)
    assert (found.ensemble.size, found.evaluate.ece_bins) == (16, 9) and found.data.evaluation is not None
    assert resolved("report", "ensemble.average=logit").ensemble.average == "logit"
    assert resolved("report", "ensemble.adaptive=0.05").ensemble.adaptive == 0.05
    assert resolved("export", "export.draws=3").export.draws == 3
    for stage, word, owner in (
        ("report", "ensemble.size=16", "evaluate"), ("export", "ensemble.size=16", "evaluate"),
        ("evaluate", "export.draws=3", "export"), ("report", "data.evaluation=null", "evaluate"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"Give it to {owner}: loradrop {owner} --run-dir"):
            resolved(stage, word)
    (tmp_path / "compare.json").write_text("{}")
    resolved("evaluate", "ensemble.size=16")
    with pytest.raises(ConfigError, match="not read by evaluate"):
        resolved("evaluate", source)  # its trainings are compared by their own validation


def test_a_file_that_may_not_be_read_is_said_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "aside"), None, str(tmp_path / "logs"))

    assert stage_main("report", refused, tmp_path) == 2
    said = capsys.readouterr()
    assert f"{tmp_path / 'logs'}: cannot be read or written (Permission denied)." in said.err + said.out
    assert "Traceback" not in said.err + said.out
    monkeypatch.setattr("pipeline.cli.dispatch", refused)
    assert main(["report"]) == 2
    assert "cannot be read or written (Permission denied)." in capsys.readouterr().err
    monkeypatch.setattr("pipeline.cli.dispatch", lambda _: os.stat(tmp_path / "gone"))  # ours to mend, not the user's
    with pytest.raises(FileNotFoundError):
        main(["report"])
