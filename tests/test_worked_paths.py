"""What docs/architecture.md says about adding things holds: by the files that it names, and no others."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from pipeline.config import dump_config, load_config
from pipeline.config.method import LEGAL
from pipeline.files import write_text
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths

HELLO = '''"""Says hello."""

from __future__ import annotations

from pathlib import Path

from pipeline.files import write_text
from pipeline.run_folder.mark import claim
from pipeline.run_folder.paths import RunPaths, load_saved


def say_hello(run_dir: Path) -> None:
    """Write hello.txt."""
    config = load_saved(RunPaths(run_dir).config)
    write_text(run_dir / "hello.txt", f"hello, rank {config.adapter.rank}")
'''
ROW = '        Stage("hello", "says hello", "one", "saved", "pipeline.stages.hello:say_hello"),\n'
COLUMN_MASK = '''

def column_mask(keys: RowKeys, rows: slice, layer_key: int, features: int, site: Site) -> Tensor:
    """Pattern `column` of an input: a feature is dropped for all tokens of an example."""
    kept = ~dropped_hidden(keys, rows, layer_key, features, site)
    return kept.expand(-1, keys.position.shape[1], -1).to(torch.float32) / (1.0 - site.rate)
'''
TRY = """
import sys
from pipeline.config import load_config
from pipeline.support.sites import legal_sites, tiny_model, try_cell
(site,) = [s for s in legal_sites() if (s.position, s.pattern) == ("lora_input", "column")]
config = load_config(None, ["adapter.method=[{position: lora_input, pattern: column, rate: 0.2}]"])
assert config.adapter.resolved_method().sites[0].pattern == "column"
for family in ("llama", "bert"):
    try_cell(tiny_model(family), site)
print("tested")
"""


def files_named(path: str) -> set[str]:
    """The files of one worked path of the document."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text[text.index("## Four worked paths"):]
    start = section.index(f"**{path}**")
    following = re.search(r"\n(?:\*\*Add|## )", section[start:])
    return set(re.findall(r"`(pipeline/[\w/]+\.py)`", section[start : start + (following.start() if following else 0)]))


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the code, to build on."""
    for name in ("pipeline", "tune", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def build(house: Path, file: str, old: str, new: str) -> str:
    """Replace `old` once in a file of the copy; returns the file's name."""
    text = (house / file).read_text(encoding="utf-8")
    assert text.count(old) == 1, (file, old)
    (house / file).write_text(text.replace(old, new), encoding="utf-8")
    return file


def run(house: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(house), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, check=False)


def test_a_stage_is_one_file_and_one_row(house: Path, tiny_settings: list[str]) -> None:
    (house / "pipeline" / "stages" / "hello.py").write_text(HELLO, encoding="utf-8")
    last = '        Stage("test", "the project'
    build(house, "pipeline/stages/table.py", last, ROW + last)
    assert files_named("Add a stage") == {"pipeline/stages/table.py"}  # and the new file
    assert re.search(r"^  hello +says hello$", run(house, "-m", "pipeline.cli", "--help").stdout, re.MULTILINE)

    folder = house / "run"
    missing = run(house, "-m", "pipeline.cli", "hello", "--run-dir", str(folder))
    assert missing.returncode == 2 and "holds no run" in missing.stderr
    claim(folder, "run")
    write_text(RunPaths(folder).config, dump_config(load_config(None, tiny_settings)))
    planned = run(house, "-m", "pipeline.cli", "hello", "--dry-run", "--run-dir", str(folder))
    assert planned.returncode == 0 and f"hello     -> {folder}" in planned.stdout
    done = run(house, "-m", "pipeline.cli", "hello", "--run-dir", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "hello.txt").read_text(encoding="utf-8") == "hello, rank 4"
    assert json.loads((folder / "status.json").read_text(encoding="utf-8"))["hello"]["state"] == "done"
    assert "python" in (folder / "logs" / "hello.log").read_text(encoding="utf-8")  # in a process of its own
    refused = run(house, "-m", "pipeline.cli", "hello", "--run-dir", str(folder), "adapter.rank=8")
    assert refused.returncode == 2 and "is not read by hello" in refused.stderr


@pytest.mark.slow
def test_a_dropout_site_is_a_cell_its_mask_and_its_place(house: Path) -> None:
    """`lora_input` with the pattern `column`: one more legal cell."""
    assert "column" not in LEGAL["lora_input"][0]  # not there yet
    built = {
        build(house, "pipeline/config/method.py", 'input": (("element",)', 'input": (("element", "column")'),
        build(house, "pipeline/adapters/masks.py", "\n\ndef dropped_keys(", f"{COLUMN_MASK}\n\ndef dropped_keys("),
        build(
            house, "pipeline/adapters/linear.py",
            "mask = element_mask(keys, keys.rows_of(m, m + 1), layer_key, features, site.rate, rescale)",
            "rows = keys.rows_of(m, m + 1)\n"
            "        mask = (column_mask(keys, rows, layer_key, features, site) if site.pattern == 'column'"
            " else element_mask(keys, rows, layer_key, features, site.rate, rescale))",
        ),
        build(house, "pipeline/adapters/linear.py", "import dropped_hidden", "import column_mask, dropped_hidden"),
    }
    places = {"pipeline/adapters/sites/attention.py", "pipeline/adapters/sites/ffn.py"}  # of the other positions
    assert built == files_named("Add a dropout site") - places
    done = run(house, "-c", TRY)
    assert done.returncode == 0 and done.stdout.strip().endswith("tested"), done.stderr
