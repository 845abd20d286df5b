"""`import loradrop`: every name is there, none of them costs torch before it is used, and pip finds the package."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
from pathlib import Path

import loradrop
import pytest
from helpers import ROOT
from setuptools.config.expand import find_packages


def test_importing_loads_no_torch() -> None:
    code = (
        "import sys, loradrop; loradrop.load_config; loradrop.train; loradrop.UserError; loradrop.Callback;"
        " assert 'torch' not in sys.modules, 'torch'; print(loradrop.__version__)"
    )
    path = f"{ROOT}:{ROOT / 'pipeline' / 'interface'}"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == loradrop.__version__, done.stderr


def test_every_name_is_there() -> None:
    for name in loradrop.__all__:
        assert getattr(loradrop, name).__doc__ or name == "__version__", name
    assert set(loradrop.__all__) <= set(dir(loradrop))
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        loradrop.fit  # noqa: B018


def test_the_packages_that_are_installed() -> None:
    """As setuptools reads pyproject.toml: loradrop lies in pipeline/interface, and is no part of pipeline."""
    finding = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    places: dict[str, str] = {}
    found = find_packages(root_dir=str(ROOT), fill_package_dir=places, **finding)
    assert {"pipeline", "pipeline.ensemble", "pipeline.recipes.papers", "tune", "ds_configs", "loradrop"} <= set(found)
    assert not [name for name in found if name.startswith("pipeline.interface")]
    assert Path(places["loradrop"]) == Path("pipeline/interface/loradrop")
    assert "tests" not in found and "benchmarks" not in found
