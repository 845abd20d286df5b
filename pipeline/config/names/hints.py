"""The way out of a wrong key: our name for what other tools call so, the section of a bare key, or the nearest key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pipeline.config.names.foreign import FOREIGN

NEAR = 0.72
"""Likeness (difflib's ratio) of two names of which one may be the other misspelt: `rnak` and `rank` have 0.75."""
GUESSED_SECTION = 0.08
"""By how much likelier a bare key must be, because keys of all sections may be meant."""
MOST_NAMED = 4
"""Sections that are named for a bare key."""


def way_out(key: str, keys: Sequence[str]) -> str:
    """A sentence for the dotted key `key`, which is none of `keys`, or was written as one word; never empty."""
    if key in keys:
        parts = key.split(".")
        return f"In a file a key stands in its section: {': {'.join(parts)}: …{'}' * (len(parts) - 1)}."
    section = next((part for part in (key.rpartition(".")[0], key.partition(".")[0]) if part in keys), "")
    return meant(key, keys) or f"See loradrop keys{' ' + section if section else ''}."


def meant(key: str, keys: Sequence[str]) -> str:
    """What of `keys` the name stands for, as a sentence: in other tools, in other sections, misspelt; or empty."""
    section, _, leaf = key.rpartition(".")
    found = FOREIGN.get(key) or FOREIGN.get(leaf)
    if found is not None and (not found.here or any(here in keys or _leaf(here) in keys for here in found.here)):
        return str(found)  # of a section alone, keys are without its name
    beside = nearest(key, [known for known in keys if known.rpartition(".")[0] == section]) if section else None
    if beside:
        return f"Did you mean {beside}?"
    deepest = 1 if section else 2  # `model.name` is not meant to be logging.wandb.name
    same = [known for known in keys if _leaf(known) == leaf and known.count(".") <= deepest]
    if len(same) == 1:
        return f"Here: {same[0]}."
    if 1 < len(same) <= MOST_NAMED:
        return f"There are {', '.join(same)}."
    near = nearest(key, keys)
    return f"Did you mean {near}?" if near else ""


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def nearest(key: str, keys: Sequence[str]) -> str | None:
    """The one of `keys` that `key` is misspelt, with or without its section; None where none is near.

    Parts are compared one by one: two keys of a section would be alike in all that the section's name is.
    """
    parts = key.split(".")

    def likeness(known: str) -> float:
        ends = known.split(".")[-len(parts):]
        if len(ends) < len(parts):
            return 0.0
        matchers = [difflib.SequenceMatcher(None, *pair) for pair in zip(parts, ends, strict=True)]
        if any(matcher.real_quick_ratio() < NEAR for matcher in matchers):  # by length alone; a word may have megabytes
            return 0.0
        least = min(matcher.ratio() for matcher in matchers)
        return least if known.count(".") == key.count(".") else least - GUESSED_SECTION

    best = max(keys, key=lambda known: (likeness(known), known), default=None)
    return best if best is not None and likeness(best) >= NEAR else None
