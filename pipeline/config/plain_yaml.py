"""YAML as settings need it: texts, numbers, lists and mappings, every key once, in a file of some kilobytes.

What YAML has beyond JSON is where it surprises and where it explodes. Tags, anchors and aliases are refused: an alias
makes one value of two places, which an override of one would change in both, and ten of them can stand for a billion.
Dates are texts. `1e-4`, which YAML 1.1 reads as text, is the number that people mean; what is quoted stays text.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError

MOST_BYTES = 256 * 1024
"""Of a file. The largest recipe has 3 KB; a template with many examples in it, some tens."""
MOST_VALUES = 10_000
DEEPEST = 24
"""Lists and mappings inside each other. `compare.methods` with sites of their own has 9."""
LONGEST_NUMBER = 100
"""Characters: Python itself refuses numbers of more than 4,300 digits, and not with a sentence."""
INT64 = range(-(2**63), 2**63)
ONE_PLACE = "Write the value out in each place."

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_NOT_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "value")}


class YamlFault(yaml.MarkedYAMLError):
    """What is wrong with a text, where, and the way out."""

    def __init__(self, mark: yaml.Mark, constraint: str, remedy: str) -> None:
        super().__init__(problem=constraint, problem_mark=mark)
        self.line, self.constraint, self.remedy = mark.line + 1, constraint, remedy


class _Loader(yaml.SafeLoader):
    """The nodes are counted as they come, so that nothing large is made before it is refused."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._values = self._depth = 0
        self._path: list[str] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise YamlFault(event.start_mark, f"has the YAML anchor or alias {event.anchor!r}", ONE_PLACE)
        if event.tag not in (None, "!"):
            remedy = "Write the value alone; what is to be a text goes into quotes."
            raise YamlFault(event.start_mark, f"has the YAML tag {event.tag!r}", remedy)
        self._values += 1
        if self._values > MOST_VALUES:
            raise YamlFault(event.start_mark, f"holds more than {MOST_VALUES:,} values", "Give fewer.")
        if self._depth == DEEPEST:
            raise YamlFault(event.start_mark, f"is nested more than {DEEPEST} deep", "Give a flatter value.")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Keys are texts, as they are written, and none stands twice."""
        found: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or not key.isprintable():
                raise YamlFault(key_node.start_mark, f"has the key {_short(key)}", "Keys are words.")
            self._path.append(key)
            if key in found:
                constraint = f"names {_short('.'.join(self._path))} twice"
                raise YamlFault(key_node.start_mark, constraint, "Keep one of the two.")
            found[key] = self.construct_object(value_node, deep=True)
            self._path.pop()
        return found

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A text that can be written again, and given to the system as a name."""
        text = str(self.construct_yaml_str(node))
        bad = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
        if bad is not None:
            raise YamlFault(node.start_mark, f"has the character {bad!r} in a text", "Leave it out.")
        return text

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """A whole number of 64 bits, or a float."""
        text, whole = node.value, node.tag.endswith(":int")
        try:
            if len(text) > LONGEST_NUMBER:
                raise ValueError
            number = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except (ValueError, OverflowError) as error:
            constraint = f"has {_short(text)}, which is no number that can be read"
            raise YamlFault(node.start_mark, constraint, "What is to be a text goes into quotes.") from error
        if whole and number not in INT64:
            raise YamlFault(node.start_mark, f"has {text}, which does not fit 64 bits", "Give a smaller number.")
        return number


class PlainDumper(yaml.SafeDumper):
    """Quotes the texts that would be read as numbers."""

    def ignore_aliases(self, data: Any) -> bool:
        """Equal values are written out in each place."""
        return True


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NOT_PLAIN]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, PlainDumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
for _name in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", _Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: a `YamlFault` where it is YAML, and not what settings may be made of.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except (ValueError, OverflowError) as error:  # "\U7fffffff" is no character
        raise yaml.YAMLError(str(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises `ConfigError` on a file that is missing, no file, too large, broken, or no mapping."""
    try:
        tree = parse_yaml(read_small(path))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), None, f"cannot be read ({error})", "Give another file.") from error
    except YamlFault as error:
        raise ConfigError(f"{path}:{error.line}", None, error.constraint, error.remedy) from error
    except yaml.YAMLError as error:
        fault = " ".join(str(error).split())
        remedy = "Mend the line, or give another file."
        raise ConfigError(str(path), None, f"is not valid YAML ({fault})", remedy) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(path), None, "must hold a mapping of sections", "Start with `model:` or `train:`.")
    return tree


def read_small(path: Path) -> str:
    """The text of a file of settings.

    Raises:
        ConfigError: a folder, pipe or device, or a file that is too large.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    # Before it is opened: opening a pipe waits for its other end, and a device may do anything.
    if not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(str(path), None, "is no regular file", "Give a file of settings.")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ConfigError(str(path), None, f"has more than {MOST_BYTES:,} bytes", "Settings are a few kilobytes.")
    return content.decode("utf-8")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
