"""`loradrop keys [PREFIX]`: what every key of the configuration means, its type, range and default."""

from __future__ import annotations

import json
import shutil
import textwrap
from dataclasses import asdict

from pipeline.config.names.foreign import FOREIGN
from pipeline.config.names.hints import way_out
from pipeline.config.names.reference import Key, all_keys, default_text
from pipeline.errors import EXIT_OK, ConfigError, UserError
from pipeline.plan.request import Request
from pipeline.terminal import say

WIDEST = 100


def show_keys(request: Request) -> int:
    """Print the keys that begin with a word, are called so by other tools, or contain it; all of them without one.

    Raises:
        UserError: more than one word, or one that stands for no key.
    """
    if len(request.overrides) > 1:
        raise UserError("keys", " ".join(request.overrides), "takes one beginning of a key", "Example: keys train.")
    word = request.overrides[0].partition("=")[0] if request.overrides else ""
    known = all_keys()
    found = [key for key in known if key.key.startswith(word)]
    if not found and word in FOREIGN:
        found = [key for key in known if key.key in FOREIGN[word].here]
        say(f"{word}: {FOREIGN[word]}\n")
    elif not found:
        found = [key for key in known if word in key.key]
    if not found and word not in FOREIGN:
        raise ConfigError(word, None, "is not a known key", way_out(word, [key.key for key in known]))
    if request.json:
        print(json.dumps([asdict(key) for key in found], ensure_ascii=False, indent=2))
    elif found:
        width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
        print("\n\n".join(entry(key, width) for key in found))
    return EXIT_OK


def entry(key: Key, width: int) -> str:
    """`key = default`, and below it type, range and meaning."""
    head = key.key if key.type == "section" else f"{key.key} = {default_text(key.default)}"
    body = f"{', '.join(part for part in (key.type, key.range) if part)}. {key.meaning}".strip()
    lines = textwrap.wrap(head, width, subsequent_indent=" " * 8, break_on_hyphens=False)
    indent = " " * 4
    lines += textwrap.wrap(body, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)
