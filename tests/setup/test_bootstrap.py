"""Set-up: launch.sh, bootstrap and installation, in copies of the checkout and with stand-ins for venv and pip."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

from pipeline.errors import EXIT_USER, ErrorList, SetupError
from pipeline.setup import install
from pipeline.setup.venv import Environment

CLI = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "cwd": os.getcwd(), "file": __file__, "python": sys.executable}))
"""

# Plays three parts: the interpreter that makes the environment, the environment's pip, the environment's command.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    "-m pipeline.cli"*) echo "command ${*:3}" ;;
    *"-m venv"*) echo venv >> "$EVENTS"; mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
    *"-m pip"*) echo "pip $$" >> "$EVENTS"; echo "${@: -1}" >> "$EVENTS.asked"
                echo "Collecting something"; eval "$FAKE_PIP"; code=$?
                echo "pip end" >> "$EVENTS"; exit $code ;;
esac
"""

START = (
    "import sys; sys._base_executable = {fake!r}; from pathlib import Path; from pipeline.setup.bootstrap import main; "
    "sys.exit(main({words!r}, Path({root!r})))"
)
TRAIN = ("train", "a=1")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the real set-up code and a command that tells how it was called."""
    root = tmp_path / "check out"
    (root / "pipeline" / "setup").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    for name in ("errors.py", "setup/__init__.py", "setup/bootstrap.py", "setup/install.py", "setup/venv.py"):
        shutil.copy(ROOT / "pipeline" / name, root / "pipeline" / name)
    (root / "pipeline" / "__init__.py").touch()
    (root / "pipeline" / "cli.py").write_text(CLI)
    return root


class Launches:
    """Starts bootstrap in processes of their own, with the stand-ins, and reads what they did."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.fake, self.events_file = root, folder / "python3", folder / "events"
        self.fake.write_text(FAKE_PYTHON)
        self.fake.chmod(0o755)

    def start(self, pip: str = "true", words: tuple[str, ...] = TRAIN) -> subprocess.Popen[str]:
        code = START.format(fake=str(self.fake), root=str(self.root), words=list(words))
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "EVENTS": str(self.events_file), "FAKE_PIP": pip}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        # As from a terminal: a shell that runs the tests in the background has them ignore SIGINT.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
        return subprocess.Popen([sys.executable, "-c", code], env=variables, text=True, preexec_fn=listen, **pipes)

    def run(self, pip: str = "true", words: tuple[str, ...] = TRAIN) -> tuple[int, str, str]:
        process = self.start(pip, words)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def events(self) -> list[str]:
        return self.events_file.read_text().splitlines() if self.events_file.exists() else []

    def asked(self) -> list[str]:
        """What each pip was to install."""
        return Path(f"{self.events_file}.asked").read_text().splitlines()

    def wait_for_pip(self) -> int:
        """The process id of a running pip."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pips = [line.split()[1] for line in self.events() if line.startswith("pip ") and line != "pip end"]
            if pips:
                return int(pips[-1])
            time.sleep(0.02)
        raise AssertionError("pip was never started")


@pytest.fixture
def launches(checkout: Path, tmp_path: Path) -> Launches:
    return Launches(checkout, tmp_path)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")  # a zombie whose parent has not looked is not running
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


# --- launch.sh --------------------------------------------------------------------------------------------------------


def run_launch(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "LORADROP_PYTHON"}
    environment = {**environment, "LORADROP_PYTHON": sys.executable, **variables}
    command = [shutil.which("bash") or "/bin/bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=30, check=False)


def without_python(folder: Path) -> Path:
    """A folder for PATH with what launch.sh itself uses and nothing else."""
    folder.mkdir()
    for name in ("dirname", "readlink"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


@pytest.mark.parametrize("old", [False, True], ids=["no python", "an old python"])
def test_launch_without_a_usable_python_says_so(checkout: Path, tmp_path: Path, old: bool) -> None:
    path = without_python(tmp_path / "bin")
    if old:
        (path / "python3").write_text("#!/bin/sh\necho\n")  # what the probe prints under Python 3.10
        (path / "python3").chmod(0o755)
    result = run_launch(checkout / "launch.sh", "train", cwd=tmp_path, PATH=str(path), LORADROP_PYTHON="")
    assert result.returncode == EXIT_USER
    assert result.stderr.count("\n") == 1
    assert "no Python >= 3.11" in result.stderr and "LORADROP_PYTHON=" in result.stderr
    assert not (checkout / ".venv").exists()


def test_help_needs_no_installation_and_keeps_the_callers_folder(checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "pipeline").mkdir(parents=True)  # a folder of that name must not be taken for the package
    (elsewhere / "pipeline" / "cli.py").write_text("raise SystemExit('the wrong package')")
    link = tmp_path / "link.sh"
    link.symlink_to(checkout / "launch.sh")
    result = run_launch(link, "data.path=my rows.jsonl", "--help", cwd=elsewhere, PYTHONPATH=str(elsewhere))
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["arguments"] == ["data.path=my rows.jsonl", "--help"]
    assert said["cwd"] == str(elsewhere)
    assert said["file"] == str(checkout / "pipeline" / "cli.py")
    assert not (checkout / ".venv").exists()


def test_a_complete_environment_is_used_at_once(checkout: Path, tmp_path: Path) -> None:
    environment = Environment(checkout)
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    environment.mark_complete()
    result = run_launch(checkout / "launch.sh", "train", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert json.loads(result.stdout)["python"] == str(environment.python)
    assert sorted(path.name for path in environment.folder.iterdir()) == ["bin", "complete.json"]


# --- when is an environment complete? ---------------------------------------------------------------------------------


def test_only_an_untouched_environment_is_complete(checkout: Path, tmp_path: Path) -> None:
    environment = Environment(checkout)
    interpreter = tmp_path / "python3.x"
    interpreter.touch()
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(interpreter)
    assert not environment.is_ready()
    environment.mark_complete()
    assert environment.is_ready()

    interpreter.unlink()
    assert not environment.is_ready(), "its interpreter was removed"
    interpreter.touch()
    for name in ("constraints.txt", "pyproject.toml"):
        before = (checkout / name).read_text()
        (checkout / name).write_text(before + "\n")
        assert not environment.is_ready(), name
        (checkout / name).write_text(before)
    assert environment.is_ready()

    moved = checkout.with_name("moved")
    shutil.copytree(checkout, moved, symlinks=True)
    assert not Environment(moved).is_ready(), "paths are written into an environment"
    for damaged in ("", "[1]", '"text"', '{"packages":'):
        environment.marker.write_text(damaged)
        assert not environment.is_ready(), damaged


# --- what the machine lacks -------------------------------------------------------------------------------------------


def test_missing_compiler_headers_modules_and_disk_are_all_named_at_once(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    programs = without_python(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(install, "find_spec", lambda name: None if name == "ensurepip" else object())
    monkeypatch.setattr(install.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: usage._replace(free=1_200_000_000))
    with pytest.raises(ErrorList) as caught:
        install.check_machine(Environment(checkout))
    assert len(str(caught.value).splitlines()) == 2, "without CUDA nothing is compiled"
    (programs / "nvidia-smi").touch(mode=0o755)
    with pytest.raises(ErrorList) as caught:
        install.prepare(Environment(checkout))
    assert caught.value.exit_code == EXIT_USER
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    module, compiler, headers, disk = str(caught.value).splitlines()
    assert "'ensurepip'" in module and f"apt install {version}-venv" in module
    assert "C++ compiler" in compiler and "apt install g++" in compiler
    assert "Python.h" in headers and f"apt install {version}-dev" in headers
    assert "1.2 GB" in disk and "12 GB" in disk and str(checkout) in disk
    assert not (checkout / ".venv").exists(), "nothing is left behind"


def test_a_machine_with_a_cuda_driver_needs_more_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: usage._replace(free=6 * 10**9))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.disk_fault(tmp_path) is None
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    fault = install.disk_fault(tmp_path)
    assert fault is not None and "12 GB" in str(fault)


def test_a_compiler_named_in_cxx_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "my-compiler")
    assert isinstance(install.compiler_fault(), SetupError)
    (tmp_path / "my-compiler").touch(mode=0o755)
    assert install.compiler_fault() is None


# --- making it --------------------------------------------------------------------------------------------------------


def test_first_launch_installs_then_runs_the_command(launches: Launches) -> None:
    code, out, err = launches.run()
    assert (code, out) == (0, "command train a=1\n"), err
    assert [event.split()[0] for event in launches.events()] == ["venv", "pip", "pip"]
    assert Environment(launches.root).is_ready()
    assert "Collecting something" in (launches.root / ".venv" / "install.log").read_text()
    assert "Collecting" not in err, "pip's output belongs into the log"
    assert not (launches.root / ".venv" / "tmp").exists()


def test_users_get_no_test_tools_and_test_adds_them_once(launches: Launches) -> None:
    assert launches.run()[:2] == (0, "command train a=1\n")
    code, out, err = launches.run(words=("test", "--fast"))
    assert (code, out) == (0, "command test --fast\n") and "adding the test tools" in err
    assert launches.asked() == [".", ".[test]"] and launches.events().count("venv") == 1
    assert launches.run(words=("test",))[2] == "" and launches.run()[2] == ""
    with (launches.root / "constraints.txt").open("a") as file:
        file.write("one-more==1\n")
    launches.run()
    assert launches.asked() == [".", ".[test]", ".[test]"], "they are kept up to date with the rest"
    assert launches.run(words=("test",))[2] == ""


def test_an_environment_of_before_is_brought_up_to_date(launches: Launches) -> None:
    launches.run()
    marker = Environment(launches.root).marker
    recorded = json.loads(marker.read_text())
    marker.write_text(json.dumps({key: recorded[key] for key in ("packages", "place")}))  # as earlier versions wrote it
    assert launches.run()[2] == "" and launches.asked() == ["."]
    assert launches.run(words=("test",))[0] == 0 and launches.asked() == [".", ".[test]"]


def test_the_doctor_works_where_the_environment_cannot_be_made(launches: Launches) -> None:
    code, out, err = launches.run("false", words=("doctor", "--json"))
    said = json.loads(out)
    assert code == 0 and said["arguments"] == ["doctor", "--json"] and said["python"] == sys.executable
    assert "the set-up failed" in err and not Environment(launches.root).is_ready()


def test_changed_pins_update_in_place(launches: Launches) -> None:
    launches.run()
    with (launches.root / "constraints.txt").open("a") as file:
        file.write("one-more==1\n")
    code, out, err = launches.run()
    assert (code, out) == (0, "command train a=1\n"), err
    assert launches.events().count("venv") == 1 and launches.events().count("pip end") == 2
    assert Environment(launches.root).is_ready()


def test_an_interrupted_update_is_not_taken_for_complete(launches: Launches) -> None:
    launches.run()
    with (launches.root / "constraints.txt").open("a") as file:
        file.write("one-more==1\n")
    assert launches.run("false")[0] == 1
    shutil.copy(ROOT / "constraints.txt", launches.root / "constraints.txt")  # the old pins again
    assert not Environment(launches.root).is_ready()
    assert launches.run()[0] == 0
    assert launches.events().count("venv") == 2


def test_a_removed_interpreter_is_replaced(launches: Launches) -> None:
    launches.run()
    python = launches.root / ".venv/bin/python"
    python.unlink()
    python.symlink_to("/no/such/python")
    Environment(launches.root).mark_complete()  # complete, from the interpreter that is gone
    assert launches.run()[:2] == (0, "command train a=1\n")
    assert launches.events().count("venv") == 2


def test_an_environment_of_the_users_own_is_left_alone(launches: Launches) -> None:
    mine = launches.root / ".venv" / "bin" / "python"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    code, _, err = launches.run()
    assert code == EXIT_USER and "Rename it" in err
    assert mine.read_text() == "mine" and launches.events() == []


def test_the_environment_of_another_checkout_is_not_emptied_through_a_link(launches: Launches, tmp_path: Path) -> None:
    assert launches.run()[0] == 0
    second = tmp_path / "second checkout"
    shutil.copytree(launches.root, second, ignore=shutil.ignore_patterns(".venv"))
    (second / ".venv").symlink_to(launches.root / ".venv")
    before = sorted((launches.root / ".venv").rglob("*"))
    other = Launches(second, tmp_path)
    code, _, err = other.run()
    assert code == EXIT_USER and "is a link to the environment of" in err and "Remove the link" in err
    assert sorted((launches.root / ".venv").rglob("*")) == before
    shutil.rmtree(launches.root)  # where that is gone, nobody loses it: a checkout that was moved
    (second / ".venv").unlink()
    assert other.run()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_set_up_stops_at_once_and_can_be_repeated(launches: Launches, number: signal.Signals) -> None:
    # As pip does, the step starts a process of its own; neither may outlive the interruption.
    process = launches.start('touch "$(dirname "$0")/half-made"; sleep 60 & echo "pip $!" >> "$EVENTS"; wait')
    launches.wait_for_pip()
    while not (launches.root / ".venv/bin/half-made").exists() or len(launches.events()) < 3:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and out == ""
    assert "the same command starts the set-up again" in err and "Traceback" not in err
    deadline = time.monotonic() + 5
    started = [int(line.split()[1]) for line in launches.events() if line.startswith("pip ")]
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(started) == 2 and not any(map(is_running, started))
    assert not Environment(launches.root).is_ready()
    assert launches.run()[:2] == (0, "command train a=1\n")
    assert not (launches.root / ".venv/bin/half-made").exists(), "the half-made environment was made anew"


def test_an_orphaned_pip_keeps_the_next_launch_waiting(launches: Launches) -> None:
    first = launches.start("sleep 1.2")
    pip = launches.wait_for_pip()
    first.kill()
    first.communicate(timeout=10)
    assert is_running(pip)
    code, out, err = launches.run()
    assert (code, out) == (0, "command train a=1\n"), err
    assert "another launch is preparing .venv" in err
    events = [event if event == "pip end" else event.split()[0] for event in launches.events()]
    assert events == ["venv", "pip", "pip end", "venv", "pip", "pip end"], "one after the other, and made anew"


def test_two_launches_at_once_install_once(launches: Launches) -> None:
    both = [launches.start("sleep 0.5") for _ in range(2)]
    results = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert [out for out, _ in results] == ["command train a=1\n"] * 2
    assert launches.events().count("venv") == launches.events().count("pip end") == 1


def test_a_failed_set_up_shows_the_end_of_the_log(launches: Launches) -> None:
    code, out, err = launches.run('echo "ERROR: No matching distribution found for torch"; false')
    assert (code, out) == (1, "")
    assert "ERROR: No matching distribution found for torch" in err
    assert str(launches.root / ".venv" / "install.log") in err and "Traceback" not in err
    assert launches.run()[0] == 0


def test_a_disk_that_fills_up_is_named(launches: Launches) -> None:
    code, _, err = launches.run('echo "ERROR: Could not install: [Errno 28] No space left on device"; false')
    assert code == EXIT_USER
    assert "free disk space" in err and str(launches.root / ".venv") in err


# --- what is installed ------------------------------------------------------------------------------------------------


def test_constraints_pin_every_package_and_no_place_or_build() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator and name and version and not set("@+/ ") & set(line), line
    pins = dict(line.lower().split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for extra in project["optional-dependencies"].values() for line in extra]
    wanted += map(Requirement, project["dependencies"])
    assert [one.name for one in wanted if one.name.lower() not in pins] == []
    assert [str(one) for one in wanted if not one.specifier.contains(pins[one.name.lower()])] == []


def test_packages_whose_inner_parts_are_used_have_an_upper_bound() -> None:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounded = {one.name for one in map(Requirement, lines) if any(part.operator == "<" for part in one.specifier)}
    assert {"deepspeed", "transformers", "ray"} <= bounded


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("pipeline", "tune", "ds_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "README.md").write_text("The long description.")
    files = {path.relative_to(source).as_posix() for path in source.rglob("*/**/*") if path.is_file()}
    expected = {name.removeprefix("pipeline/interface/") if "/loradrop/" in name else name for name in files}
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True)
    (wheel,) = tmp_path.glob("loradrop-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt")))
    assert packed == expected
    assert b"loradrop = pipeline.cli:main" in entry_points
