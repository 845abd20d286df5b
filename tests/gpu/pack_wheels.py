"""Packs what a bare machine with a GPU lacks, for a place that nothing outside can be reached from.

    python tests/gpu/pack_wheels.py FOLDER                         # parts of at most 64 MiB, for Python 3.12
    python tests/gpu/pack_wheels.py FOLDER --has numpy scipy       # without what the machine has already
    bash FOLDER/part-1/install.sh /tmp/env                         # there, for every part; then /tmp/env/bin/python

Packed are the packages that pyproject.toml names and those of the tests, with all that they need, at the versions of
constraints.txt, as wheels; never torch, nor what comes with it. A wheel larger than a part is cut, and install.sh
joins it. What is there as source alone (DeepSpeed) is built here, which must not need a compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Collection, Iterable, Iterator
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("pytest", "pytest-xdist", "hypothesis", "packaging")
OF_CUDA = ("nvidia-", "cuda-")
"""Beginnings of the names of what comes with torch, which a machine with CUDA has, and must keep."""
SOURCES = ("deepspeed",)
"""Has no wheels; what is built is for every machine."""
GLIBC = range(5, 36)
"""Minor versions for which wheels are taken: that of the machine is at least the last."""
WHEELS = "wheels"
MIB = 2**20


def named() -> list[Requirement]:
    """What the project needs, without torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(line) for line in (*project["dependencies"], *TESTS)]


def gather(folder: Path, python: str, has: Collection[str]) -> None:
    """Wheels of everything that is needed, followed from wheel to wheel."""
    left_out = {*map(canonicalize_name, has), "torch", "triton"}
    asked: set[tuple[str, str]] = set()
    """Names with their extras, whose wheels have been read."""
    wheels: dict[str, Path] = {}
    wanted = named()
    while fresh := {
        (name, extra) for one in wanted for extra in ("", *one.extras)
        if (name := canonicalize_name(one.name)) not in left_out and not name.startswith(OF_CUDA)
    } - asked:
        download(folder, {name for name, _ in fresh} - wheels.keys(), python)
        wheels = {canonicalize_name(path.name.partition("-")[0]): path for path in folder.glob("*.whl")}
        wanted = [need for name, extra in fresh for need in needs(wheels[name], extra, python)]
        asked |= fresh


def download(folder: Path, names: Collection[str], python: str) -> None:
    """By pip: a wheel each, built here where there is none."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    pinned = ["--no-deps", "-c", str(ROOT / "constraints.txt")]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    platforms += [f"--platform=manylinux{year}_x86_64" for year in ("1", "2010", "2014")]
    if wheels := sorted(set(names) - set(SOURCES)):
        target = ["--only-binary=:all:", f"--python-version={python}", *platforms, "-d", str(folder)]
        subprocess.run([*pip, "download", *pinned, *target, *wheels], check=True)
    if sources := sorted(set(names) & set(SOURCES)):
        environment = {**os.environ, "DS_BUILD_OPS": "0"}  # DeepSpeed compiles at first use, there
        subprocess.run([*pip, "wheel", *pinned, "-w", str(folder), *sources], check=True, env=environment)


def needs(wheel: Path, extra: str, python: str) -> Iterator[Requirement]:
    """What the metadata of a wheel asks for on the machine with the GPU."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.3", "sys_platform": "linux", "os_name": "posix",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "extra": extra,
    }
    with zipfile.ZipFile(wheel) as files:
        metadata = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = HeaderParser().parsestr(files.read(metadata).decode()).get_all("Requires-Dist") or []
    for one in map(Requirement, lines):
        if one.marker is None or one.marker.evaluate(environment):
            yield one


def pieces(folder: Path, most: int) -> Iterator[Path]:
    """The files to carry: wheels, those above `most` bytes cut into NAME.00, NAME.01, …"""
    for wheel in sorted(folder.glob("*.whl")):
        if wheel.stat().st_size <= most:
            yield wheel
            continue
        with wheel.open("rb") as file:
            for number, content in enumerate(iter(lambda file=file: file.read(most), b"")):  # type: ignore[misc]
                piece = wheel.with_name(f"{wheel.name}.{number:02}")
                piece.write_bytes(content)
                yield piece


def distribute(files: Iterable[Path], most: int) -> list[list[Path]]:
    """As few parts as come of putting each file, largest first, where there is room."""
    parts: list[list[Path]] = []
    for file in sorted(files, key=lambda path: path.stat().st_size, reverse=True):
        size = file.stat().st_size
        room = (part for part in parts if size + sum(one.stat().st_size for one in part) <= most)
        chosen = next(room, None)
        if chosen is None:
            parts.append(chosen := [])
        chosen.append(file)
    return parts


def main() -> int:
    """Gather, cut, lay out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="of the machine (default 3.12)")
    parser.add_argument("--mib", type=int, default=64, help="of a part at the most (default 64)")
    parser.add_argument("--has", nargs="*", default=[], metavar="NAME", help="packages that the machine has")
    given = parser.parse_args()
    wheels, most = given.folder / WHEELS, given.mib * MIB - MIB // 16  # room for install.sh and the list
    wheels.mkdir(parents=True)
    gather(wheels, given.python, given.has)
    sums = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(wheels.glob("*.whl"))
    )
    for number, part in enumerate(distribute(list(pieces(wheels, most)), most), start=1):
        place = given.folder / f"part-{number}"
        place.mkdir()
        for file in part:
            file.rename(place / file.name)
        (place / "SHA256SUMS").write_text(sums, encoding="utf-8")
        shutil.copy(Path(__file__).with_name("install_wheels.sh"), place / "install.sh")
        size = sum(file.stat().st_size for file in place.iterdir())
        print(f"{place}: {len(part)} files, {size / MIB:.1f} MiB")
    shutil.rmtree(wheels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
