"""What `loradrop serve` is told beside its options, as key=value: where requests end."""

from __future__ import annotations

import difflib
import hmac
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.config.load import overridden_tree, validate
from pipeline.config.section import NonNegative, Positive, Section
from pipeline.errors import ConfigError
from pipeline.files import read_bytes

KEY_VARIABLE = "LORADROP_API_KEY"
TRUST = "model.trust_remote_code"
SHORTEST_KEY = 16
"""Characters."""

Seconds = Annotated[float, Field(gt=0.0, le=86400.0)]


class Limits(Section):
    """Where requests end."""

    waiting: Positive = 256
    """Requests (of completions: prompts) that wait, at most; one more is answered with 503 and Retry-After."""
    gather_ms: NonNegative = 3
    """Milliseconds for which an idle server waits for more requests to put into the same pass."""
    body_bytes: Positive = 2**20
    """Of a request's body."""
    body_seconds: Seconds = 10.0
    """In which a request's head must have come, and then its body."""
    seconds: Seconds = 60.0
    """In which a request must be answered, waiting included; 504 otherwise."""
    rows: Positive = 256
    """Of a classification."""
    tokens: Positive = 16384
    """Of a request, without counting members: of all its rows, or of its prompts with what is to be written."""
    new_tokens: Positive = 1024
    """That a completion may have; `max_tokens` of a request says how many."""
    sequences: Positive = 32
    """Written at once, each under every member."""


@dataclass(frozen=True)
class ServeSettings:
    """Where it listens, to whom, and how far requests go."""

    host: str
    port: int
    key: str | None
    """What clients have to show as `Authorization: Bearer KEY`; None: nothing."""
    limits: Limits
    trusted: bool = False
    """Whether code that comes with the model may run."""

    def admits(self, header: str | None) -> bool:
        """Whether an Authorization header shows the key; how long it takes says nothing about the key."""
        if self.key is None:
            return True
        scheme, _, shown = (header or "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), self.key.encode())


def read_settings(host: str | None, port: int | None, key_file: str | None, words: Sequence[str]) -> ServeSettings:
    """The settings of a command.

    Args:
        host: None: this machine alone.
        port: None: 8000; 0: any that is free.
        key_file: whose first line is the key; None: the environment variable, if it is set.
        words: key=value.

    Raises:
        ConfigError: a key or value that is wrong; no API key where others than this machine could ask.
    """
    for word in words:
        name = word.partition("=")[0]
        if name != TRUST and name not in Limits.model_fields:
            near = difflib.get_close_matches(name, Limits.model_fields, 1)
            remedy = f"Did you mean {near[0]}?" if near else f"There are {', '.join(Limits.model_fields)} and {TRUST}."
            raise ConfigError(word, None, "is not read by serve", remedy)
    limits = validate(Limits, overridden_tree({}, [word for word in words if not word.startswith(TRUST)]))
    trusted = [word.partition("=")[2].lower() == "true" for word in words if word.startswith(TRUST)]
    if port is not None and not 0 <= port <= 65535:
        raise ConfigError("--port", port, "must be between 0 and 65535", "Give another, or 0 for any that is free.")
    host, key = (host or "127.0.0.1").strip("[]"), _key(key_file)
    if key is None and not _is_loopback(host):
        raise ConfigError(
            "--host", host, "can be reached from other machines, and no API key is set",
            f"Give --api-key-file FILE (or set {KEY_VARIABLE}), or leave --host out.",
        )
    return ServeSettings(host, 8000 if port is None else port, key, limits, any(trusted))


def _key(file: str | None) -> str | None:
    """The API key, if one is given. Raises `ConfigError` where it is none that keeps anybody out."""
    field, given = KEY_VARIABLE, os.environ.get(KEY_VARIABLE)
    if file is not None:
        field = "--api-key-file"
        try:
            given = (read_bytes(Path(file).expanduser(), 2**16).decode().splitlines() or [""])[0]
        except (OSError, ValueError, RuntimeError) as error:
            remedy = "Give a text file whose first line is the key."
            raise ConfigError(field, file, f"cannot be read ({error})", remedy) from error
    if given is None:
        return None
    key = given.strip()  # never shown in an error
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        what = f"must be at least {SHORTEST_KEY} visible ASCII characters without blanks"
        raise ConfigError(field, file, what, "`openssl rand -hex 32` makes one.")
    return key


def _is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address; a name other than localhost may mean any."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
