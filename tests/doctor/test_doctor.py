"""`loradrop doctor`: a fault is a red line with the command that mends it, whatever the process that met it did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

import pytest
from helpers import ROOT

from pipeline.cli import main
from pipeline.doctor import machine, steps
from pipeline.doctor.finding import Finding, lines_of
from pipeline.doctor.machine import machine_findings
from pipeline.doctor.steps import Step, machine_steps, run_step
from pipeline.errors import EXIT_FAILED, EXIT_OK
from pipeline.stages import doctor


def step(code: str, seconds: float = 30.0) -> Step:
    return Step("thing", ("-I", "-S", "-c", code), "does it", "mend it", seconds)


@pytest.mark.parametrize(
    ("code", "state", "detail"),
    [
        ("", "ok", "does it"),
        ("import os; os.abort()", "FAIL", "was ended by SIGABRT"),
        ("raise RuntimeError('no such \\x1b[31mdevice')", "FAIL", r"RuntimeError: no such \x1b[31mdevice"),
        ("import sys; print('x.y.OSError: cut'); print('bye'); sys.exit(3)", "FAIL", "x.y.OSError: cut"),
        ("raise SystemExit(3)", "FAIL", "ended with exit code 3"),
    ],
)
def test_whatever_a_step_does_is_a_finding(code: str, state: str, detail: str) -> None:
    (found,) = run_step(step(code), Event())
    assert (found.check, found.state, found.detail) == ("thing", state, detail)
    assert found.remedy == ("mend it" if state == "FAIL" else "")


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = f"import subprocess, time; p = subprocess.Popen(['sleep', '600'], start_new_session=True); " \
           f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(600)"
    (found,) = run_step(step(code, seconds=0.5), Event())
    assert found.state == "FAIL" and "has not ended after 0.5 s" in found.detail and found.remedy == "mend it"
    if (tmp_path / "pid").exists():  # a slow machine may not have come so far
        left, deadline = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat"), time.monotonic() + 10
        while runs(left):  # a signal that was sent has not arrived at once
            assert time.monotonic() < deadline


def runs(process: Path) -> bool:
    try:
        return process.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_an_interruption_ends_what_is_running_and_starts_nothing_more(tmp_path: Path) -> None:
    waits, never = "import time; time.sleep(600)", f"open({str(tmp_path / 'never')!r}, 'w')"
    running = steps.run_steps([step(""), step(waits, 600.0), step(waits, 600.0), *[step(never)] * 9])
    assert next(running).state == "ok"
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)  # returns at once: a step that slept on would keep the pool
    assert not (tmp_path / "never").exists()


def test_a_step_says_more_in_its_file(tmp_path: Path) -> None:
    entries = [vars(Finding("a", "FAIL", "b", "own")), vars(Finding("a", "FAIL", "c")), vars(Finding("a", "ok", "d"))]
    (tmp_path / "found").write_text(json.dumps(entries))
    code = f"import shutil, sys; shutil.copy({str(tmp_path / 'found')!r}, sys.argv[-1])"
    assert [found.remedy for found in run_step(step(code), Event())] == ["own", "mend it", ""]


def test_the_report_its_exit_code_and_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = [Finding("python", "ok", "3"), Finding("ray", "FAIL", "dead\nagain", "pip install ray")]
    monkeypatch.setattr(doctor, "machine_findings", lambda: given[:1])
    monkeypatch.setattr(doctor, "run_steps", lambda asked: given[1:])
    assert main(["doctor"]) == EXIT_FAILED
    assert capsys.readouterr().out == (
        "ok      python         3\n"
        "FAIL    ray            dead\\nagain\n"
        "                       -> pip install ray\n\n1 of 2 to mend\n"
    )
    assert main(["doctor", "--json"]) == EXIT_FAILED
    told = json.loads(capsys.readouterr().out)
    assert not told["ok"] and told["findings"][1] == vars(given[1])
    monkeypatch.setattr(doctor, "run_steps", lambda asked: [])
    assert main(["doctor"]) == EXIT_OK and capsys.readouterr().out.endswith("fit to run\n")


def test_a_configuration_is_looked_at_where_one_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(doctor, "machine_findings", list)
    monkeypatch.setattr(doctor, "run_steps", lambda steps: asked.append([one.name for one in steps]) or [])
    main(["doctor"])
    main(["doctor", "model.path=x/y"])
    assert "configuration" not in asked[0] and asked[1] == [*asked[0], "configuration"]
    assert asked[0] == ["torch", "bitsandbytes", "deepspeed", "nccl", "ray"]


def test_lines_fit_a_terminal_and_remedies_stay_whole() -> None:
    shown = lines_of(Finding("hub", "note", "word " * 40, "x" * 100), columns=80, colour=True)
    lines = shown.splitlines()
    assert lines[0].startswith("\x1b[33mnote   \x1b[0m hub")
    assert max(len(line) for line in lines[1:-1]) <= 80 and lines[-1].endswith("x" * 100)


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("GLOO_SOCKET_IFNAME", "nosuch0", True), ("NCCL_SOCKET_IFNAME", "=l", True), ("NCCL_SOCKET_IFNAME", "l", False),
        ("NCCL_SOCKET_IFNAME", "^docker", False), ("GLOO_SOCKET_IFNAME", "lo", False),
    ],
)
def test_an_interface_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fault: bool
) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setattr(socket, "gethostbyname", lambda _: "127.0.0.1")
    for variable in machine.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    found = machine.interfaces()
    assert (found.state, found.remedy) == (("FAIL", f"unset {name}") if fault else ("ok", ""))


def test_what_the_machine_lacks_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "unreachable", lambda: "no route")
    monkeypatch.setattr(machine, "machine_memory", lambda: 10**9)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: shutil_usage(10**8))
    monkeypatch.setattr(machine, "requirements_of", lambda _: ["numpy<1", "nosuchpackage>=1", "psutil>=1"])
    monkeypatch.setattr(machine, "accelerator_memory", list)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    found = {one.check: one for one in machine_findings()}
    assert [name for name, one in found.items() if one.state == "FAIL"] == ["packages", "memory", "disk", "devices"]
    assert found["hub"].state == "note" and "no route" in found["hub"].detail
    assert "numpy" in found["packages"].detail and "nosuchpackage is missing" in found["packages"].detail
    assert "psutil" not in found["packages"].detail and "constraints.txt" in found["packages"].remedy
    assert all(one.remedy for one in found.values() if one.state == "FAIL")


def shutil_usage(free: int) -> object:
    return type("Usage", (), {"free": free})


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise ValueError("what?")

    monkeypatch.setattr(machine, "unreachable", lambda: "")
    monkeypatch.setattr(machine, "machine_memory", broken)
    (found,) = [one for one in machine_findings() if one.state == "FAIL"]
    assert found.check == "memory" and "ValueError: what?" in found.detail


def test_a_python_without_packages_is_told_how_to_get_them(tmp_path: Path) -> None:
    """-I -S: the standard library alone, as on a machine that has only been cloned to."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.cli import main; sys.exit(main(['doctor']))"
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_FAILED and done.stderr == ""
    red = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert len(red) == 1 and "packages" in red[0] and f"-> bash {ROOT}/launch.sh" in done.stdout
    assert "torch " not in done.stdout, "what nobody has need not be tried"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("raise RuntimeError('CUDA Setup failed: libbitsandbytes is not there')", "libbitsandbytes is not there"),
        ("import os\nos.kill(os.getpid(), 11)", "SIGSEGV"),
    ],
    ids=["import", "crash"],
)
def test_a_broken_bitsandbytes_is_a_red_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, said: str
) -> None:
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (asked,) = [one for one in machine_steps() if one.name == "bitsandbytes"]
    (found,) = run_step(asked, Event())
    assert found.state == "FAIL" and said in found.detail and "pip install" in found.remedy
    assert "Traceback" not in found.detail


@pytest.mark.slow
def test_every_step_succeeds_on_a_whole_machine() -> None:
    found = list(steps.run_steps(machine_steps()))
    assert [one.check for one in found] == ["torch", "bitsandbytes", "deepspeed", "nccl", "ray"]
    assert [one for one in found if one.state not in ("ok", "skipped")] == []
