"""What can be seen without starting anything: Python, packages, memory, disk, devices, interfaces, the hub.

No torch, and no other package that may be missing unless its absence is what is looked for.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from pipeline.distributed.devices import accelerator_memory, machine_memory, visible_devices
from pipeline.doctor.finding import Finding
from pipeline.errors import SetupError
from pipeline.fetch import cache_folder
from pipeline.hub import unreachable
from pipeline.setup.install import compiler_fault, headers_fault

ROOT = Path(__file__).resolve().parents[2]
GIGABYTE = 10**9
LEAST_MEMORY, LEAST_DISK = 4 * GIGABYTE, 2 * GIGABYTE
"""The embedded default trains in 3 GB; its model, data and run folder take less than 1 GB."""
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def machine_findings() -> Iterator[Finding]:
    """One finding after another; a check that breaks is itself a finding."""
    checks: tuple[Callable[[], Finding], ...] = (python, packages, memory, disk, devices, interfaces, hub)
    for check in checks:
        try:
            yield check()
        except Exception as error:  # a doctor who dies helps nobody
            remedy = "Report this line: the check itself is wrong."
            yield Finding(check.__name__, "FAIL", f"cannot be checked ({type(error).__name__}: {error})", remedy)


def python() -> Finding:
    """Which, and on what system; a version that is too old has been refused by launch.sh."""
    told = f"{platform.python_version()} ({sys.executable}) on {platform.system()} {platform.machine()}"
    if platform.system() != "Linux":
        return Finding("python", "FAIL", f"{told}; loradrop runs on Linux", "Use a Linux machine, WSL 2 or a container")
    return Finding("python", "ok", told)


def pip_install(*packages: str) -> str:
    """The command that puts packages at their known versions into the environment of this command."""
    pins = ROOT / "constraints.txt"
    constraints = ["-c", str(pins)] if pins.is_file() else []
    return shlex.join([sys.executable, "-m", "pip", "install", *constraints, *packages])


def packages() -> Finding:
    """Whether what pyproject.toml asks for is installed."""
    project = ROOT / "pyproject.toml"
    whole = pip_install("-e", str(ROOT)) if project.is_file() else pip_install("--upgrade", "loradrop")
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in requirements_of(project)]
    except (ImportError, metadata.PackageNotFoundError):
        remedy = f"bash {ROOT / 'launch.sh'}" if project.is_file() else whole
        return Finding("packages", "FAIL", f"are not installed in {sys.executable}", remedy)
    wrong = []
    for one in asked:
        try:
            there = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(there, prereleases=True):
            wrong.append(f"{one.name} {there} is not {one.specifier}")
    if wrong:
        return Finding("packages", "FAIL", "; ".join(wrong), whole)
    return Finding("packages", "ok", f"{len(asked)} as asked for, torch {metadata.version('torch')} among them")


def requirements_of(project: Path) -> list[str]:
    """Those of a checkout's pyproject.toml, else of the installed package; without extras."""
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return [line for line in metadata.requires("loradrop") or [] if "extra ==" not in line]


def memory() -> Finding:
    """Main memory that a process may use."""
    total = machine_memory()
    told = f"{total / GIGABYTE:.1f} GB of main memory, {os.cpu_count()} cores"
    if total < LEAST_MEMORY:
        return Finding("memory", "FAIL", told, "Give the machine or the container at least 4 GB (docker run -m 8g).")
    return Finding("memory", "ok", told)


def disk() -> Finding:
    """Free space and rights where run folders and the cache are written."""
    told = []
    for name, place, remedy in (
        ("here", Path.cwd(), "cd to a folder of yours on a larger disk"),
        ("in the cache", cache_folder(), "export LORADROP_CACHE=/a/folder/of/yours"),
    ):
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            return Finding("disk", "FAIL", f"{there} cannot be written", remedy)
        if free < LEAST_DISK:
            return Finding("disk", "FAIL", f"{free / GIGABYTE:.1f} GB free {name} ({there}), 2 GB are needed", remedy)
        told.append(f"{free / GIGABYTE:.0f} GB free {name} ({place})")
    return Finding("disk", "ok", ", ".join(told))


def devices() -> Finding:
    """NVIDIA devices, their driver, and what compiling for them needs. Whether torch reaches them is tried apart."""
    nodes, program = Path("/dev/nvidia0").exists(), shutil.which("nvidia-smi")
    found = accelerator_memory()
    if not found:
        if program is None and not nodes:
            return Finding("devices", "ok", "no NVIDIA device: training runs on the CPUs")
        told = "nvidia-smi lists no device" if program else "there is /dev/nvidia0, but no nvidia-smi"
        remedy = "Install or load the driver (nvidia-smi must list the devices); in a container: docker run --gpus all."
        return Finding("devices", "FAIL", told, remedy)
    names = ", ".join(f"{name} {size / 2**30:.0f} GiB" for name, size in found)
    told = f"{names}; driver {driver_version()}"
    if visible := visible_devices():
        told += f"; CUDA_VISIBLE_DEVICES={','.join(visible)}"
    faults: list[SetupError] = [fault for fault in (compiler_fault(), headers_fault()) if fault]
    if faults:
        return Finding("devices", "FAIL", f"{told}; {faults[0].field} {faults[0].constraint}", faults[0].remedy)
    return Finding("devices", "ok", told)


def driver_version() -> str:
    """As nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def interfaces() -> Finding:
    """By which names and addresses the processes of one or several nodes meet."""
    names = [name for _, name in socket.if_nameindex()]
    for variable in INTERFACE_VARIABLES:
        asked = os.environ.get(variable, "")
        chosen = [one.lstrip("^=").partition(":")[0] for one in asked.split(",") if one]
        exact = variable == "GLOO_SOCKET_IFNAME" or asked.startswith("=")  # NCCL takes beginnings of names
        known = [any(name == one or (not exact and name.startswith(one)) for name in names) for one in chosen]
        if not asked.startswith("^") and not all(known):
            told = f"{variable}={asked}, and there is no such interface; there are {', '.join(names)}"
            return Finding("interfaces", "FAIL", told, f"unset {variable}")
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        told = f"nothing can listen on 127.0.0.1 ({error}), where processes of one machine meet"
        return Finding("interfaces", "FAIL", told, "ip link set lo up")
    try:
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "no address"
    return Finding("interfaces", "ok", f"{', '.join(map(shown_interface, names))}; {socket.gethostname()} is {own}")


def shown_interface(name: str) -> str:
    """With its addresses, where psutil is there to say them."""
    try:
        import psutil
    except ImportError:
        return name
    given = [one.address for one in psutil.net_if_addrs().get(name, []) if one.family == socket.AF_INET]
    return f"{name} {' '.join(given)}".rstrip()


def hub() -> Finding:
    """Whether models and data sets can be fetched; the embedded ones, and local files, need no hub."""
    try:
        reason = unreachable()
    except ImportError:
        return Finding("hub", "skipped", "huggingface_hub is not installed")
    if not reason:
        return Finding("hub", "ok", "answers")
    remedy = "For hub names: connect, or export HF_ENDPOINT=https://a.mirror or HTTPS_PROXY=http://a.proxy:port"
    return Finding("hub", "note", f"out of reach ({reason}); local files and its cache work", remedy)
