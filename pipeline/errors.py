"""What can go wrong, by whose hand, and with which exit code the command ends.

A `UserError` is anything the user can mend: it names the field, the value, the constraint and
the way out, and is raised before a model is loaded wherever that is possible.
"""

from __future__ import annotations

import errno
import os
import re

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_STOPPED = 75
"""A stop was requested, everything was saved: the same command continues (EX_TEMPFAIL)."""


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]")
"""What rules a terminal or its reader's eye instead of being seen: C0 and C1 controls but tab and line break, line and
paragraph separators, what turns the direction of text, lone surrogates."""


_LONGEST_SENTENCE = 2000
_FILE_FAULTS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
}
"""Rights, and one kind of thing where another belongs."""


def printable(text: str) -> str:
    r"""`text` as it may be printed, whoever wrote it: control characters are shown, as \x1b or \u202e, not obeyed.

    Line breaks and tabs stay; where a text must not begin a line of its own, `one_line` shows them, too.
    """
    return _UNPRINTABLE.sub(_escape, text)


def one_line(text: str) -> str:
    r"""`printable`, with \n and \t for line breaks and tabs."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class LoradropError(Exception):
    """Base of every error this package raises on purpose; its text is `printable`."""

    exit_code = EXIT_FAILED

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(LoradropError):
    """A fault in what the user gave: `field = value: constraint. remedy`."""

    exit_code = EXIT_USER

    def __init__(self, field: str, value: object, constraint: str, remedy: str = "") -> None:
        self.field, self.value, self.constraint, self.remedy = field, value, constraint, remedy
        shown = "" if value is None else f" = {_shorten(value)}"
        tail = f" {_sentence(remedy)}" if remedy else ""
        super().__init__(f"{one_line(field)}{shown}: {_sentence(constraint).rstrip('.')}.{tail}")


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class DataError(UserError):
    """A data file or a row of it is wrong; `field` names file, row and column."""


class RunFolderError(UserError):
    """A run folder lacks a file that a stage needs, or holds a damaged one."""


class SetupError(UserError):
    """The machine lacks something: an interpreter, a compiler, disk space, a device."""


def file_fault(error: OSError) -> UserError | None:
    """What the user can mend of an error of the file system that nobody has foreseen; None where it is another one."""
    name = error.filename2 or error.filename  # of a renaming, the target
    if error.errno not in _FILE_FAULTS or not isinstance(name, str | bytes):
        return None
    what = f"cannot be read or written ({error.strerror})"
    return UserError(os.fsdecode(name), None, what, "Mend that, or give another file or folder.")


class ErrorList(UserError):
    """Several user errors found in one pass, shown together."""

    def __init__(self, errors: list[UserError]) -> None:
        self.errors = errors
        Exception.__init__(self, "\n".join(str(error) for error in errors))


def joined(errors: list[UserError]) -> UserError:
    """One error as it is, several as an `ErrorList`."""
    return errors[0] if len(errors) == 1 else ErrorList(errors)


class Stopped(LoradropError):
    """A stop was requested; everything is saved and the same command continues."""

    exit_code = EXIT_STOPPED


class DiskFull(LoradropError):
    """No space is left; what was published before is whole, and the same command continues."""


class StageFailed(LoradropError):
    """A stage's process ended with a failure that is not the user's; its log says why."""


def _shorten(value: object, limit: int = 120) -> str:
    try:
        text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of more digits than Python writes
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _sentence(text: str) -> str:
    """On one line and of bounded length, whatever an exception or a name within it has to say."""
    return re.sub(r"\s*[\r\n]\s*", " ", text[:_LONGEST_SENTENCE])
