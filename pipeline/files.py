"""Files and folders that are never half-written: written aside, fsynced, renamed, proven by a manifest.

A manifest holds sizes and hashes: it proves that a file is intact, not where it came from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DiskFull, RunFolderError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
MOST_JSON_BYTES = 2**28
"""Of a JSON file of ours: more than any run has written."""
LONGEST_LINE = 2**24
"""Bytes of a line in any file that is read by lines, ours or the user's: 16 MiB."""


def write_text(path: Path, text: str) -> None:
    """Write aside, fsync, rename."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write aside, fsync, rename."""
    with full_disk_named(path.parent, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        _fsync_folder(path.parent)


@contextmanager
def full_disk_named(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn what a full disk (or quota) raises into `DiskFull`, also from libraries that do not raise an OSError."""
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None)
        text = str(error)
        if number not in (errno.ENOSPC, errno.EDQUOT) and "(os error 28)" not in text and "(os error 122)" not in text:
            raise
        raise _disk_full(folder, needed) from error


def _disk_full(folder: Path, needed: int) -> DiskFull:
    wanted = f"{needed:,} bytes are needed, " if needed else ""
    return DiskFull(
        f"{folder}: no space left on the device: {wanted}{shutil.disk_usage(folder).free:,} are free. Free some, or"
        " move the run folder to another disk; what is published is whole, and the same command continues from it."
    )


def write_json(path: Path, value: Any) -> None:
    """JSON, written aside and renamed. NaN is refused: other readers cannot parse it."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "") -> Any:
    """Parsed JSON. Raises `RunFolderError` where the file is missing, broken, too large or no regular file."""
    try:
        return json.loads(read_bytes(path, MOST_JSON_BYTES))
    except FileNotFoundError as error:
        raise RunFolderError(str(path), None, "does not exist", remedy) from error
    except OSError as error:
        raise RunFolderError(str(path), None, f"cannot be read ({error.strerror or error})", remedy) from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, deep nesting
        raise RunFolderError(str(path), None, f"is damaged ({error})", remedy) from error


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes; a pipe or a device would be waited for without end.

    Raises:
        OSError: it is not there, cannot be read, is no regular file, or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {most:,}")
        return file.read()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file; a line cut off by a crash at the end is passed over.

    Raises:
        RunFolderError: naming the line that holds no JSON object, or is longer than `LONGEST_LINE`; no regular file.
    """
    if not path.exists():
        return
    if not path.is_file():  # a pipe would be waited for
        raise RunFolderError(str(path), None, "is no regular file", "Remove it.")
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, LONGEST_LINE), b""), start=1):
            if not line.endswith(b"\n"):
                if len(line) == LONGEST_LINE:
                    raise _damaged_line(path, number, f"more than {LONGEST_LINE >> 20} MiB")
                return
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise _damaged_line(path, number, str(error)) from error
            if not isinstance(row, dict):
                raise _damaged_line(path, number, "no JSON object")
            yield row


def cut_torn_line(path: Path) -> int:
    """Cut what a crash left behind the last whole line of a file: what is appended next must not be glued to it.

    Returns:
        Whole lines; 0 where there is no file.
    """
    if not path.exists():
        return 0
    count = size = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                file.truncate(size)
                break
            count, size = count + 1, size + len(line)
    return count


def _damaged_line(path: Path, number: int, why: str) -> RunFolderError:
    return RunFolderError(f"{path}:{number}", None, f"is damaged ({why})", "Remove that line, or restore the file.")


def open_append(path: Path) -> IO[bytes]:
    """Open a file of ours to append to, unbuffered; made where it is not there, and never through a link.

    Raises:
        RunFolderError: a symbolic link, a folder, a pipe or a device has its name: whoever made the run folder would
            choose what is written to.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO) and not path.is_symlink():
            raise
        raise _no_file_of_ours(path) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_file_of_ours(path)
    return os.fdopen(descriptor, "ab", buffering=0)


def _no_file_of_ours(path: Path) -> RunFolderError:
    what = f"is a symbolic link to {os.readlink(path)}" if path.is_symlink() else "is no regular file"
    return RunFolderError(str(path), None, f"{what}: nothing is appended to it", "Remove it, or use another folder.")


def publish_folder(target: Path, fill: Callable[[Path], None], needed: int = 0) -> None:
    """Let `fill` write a folder aside, add sizes and hashes to its manifest.json, fsync, rename to `target`.

    An existing `target` is replaced only once the new folder is complete.

    Args:
        needed: bytes that `fill` is going to write, where that is known.

    Raises:
        DiskFull: nothing is published, and what was written aside is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(target.parent).free < needed:
        raise _disk_full(target.parent, needed)
    with full_disk_named(target.parent, needed):
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            fill(aside)
            write_manifest(aside)
            os.chmod(aside, 0o755)
            old = None
            if target.exists():
                old = target.with_name(f".{target.name}.old")
                shutil.rmtree(old, ignore_errors=True)
                os.rename(target, old)
            os.rename(aside, target)
            _fsync_folder(target.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_folder(path: Path) -> None:
    """Remove a published folder: out of sight first, so that none is ever seen half-removed."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_asides(folder: Path, names: str) -> None:
    """Remove what killed writers of `names` (a regular expression) left aside in `folder`. Nobody may be writing."""
    pattern = re.compile(rf"\.({names})\.[^.]+")
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if pattern.fullmatch(path.name):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def manifest_faults(folder: Path) -> list[str]:
    """What is wrong with a published folder; empty when it is whole."""
    try:
        entries = read_json(folder / MANIFEST)["files"].items()
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except (RunFolderError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder.name}: no readable {MANIFEST} ({error})"]
    faults = []
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            if not path.is_file():
                faults.append(f"{name} is missing")
            elif path.stat().st_size != size:
                faults.append(f"{name} has {path.stat().st_size} bytes, not {size}")
            elif sha256_file(path) != sha256:
                faults.append(f"{name} does not have the recorded hash")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
    return faults


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes: proves integrity, not origin."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """Sizes and hashes of all files of a folder, on disk before they are recorded, into its manifest."""
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST):
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    write_json(folder / MANIFEST, {**manifest, "files": files})


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
