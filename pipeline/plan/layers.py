"""Settings on top of each other: defaults, recipe, file, overrides; of every value it is known where it is from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from pipeline.config import RunConfig, build_config, dump_config
from pipeline.config.load import INSTEAD, merge_trees, overridden_tree
from pipeline.config.names.reference import default_text

DEFAULT, DERIVED, COMMAND_LINE = "default", "derived", "command line"
COLUMN = 46
"""In which sources stand behind values."""
LONGEST_VALUE = 48
WIDTH = 80


@dataclass(frozen=True)
class Layers:
    """A tree of settings, and which layer each value is from."""

    tree: dict[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    """Dotted key -> the name of the layer that gave it."""

    def with_tree(self, source: str, tree: Mapping[str, Any]) -> Layers:
        """`tree` on top: its leaves take the place of those below. One of train.epochs and train.max_steps takes the
        place of the other."""
        merged, sources = merge_trees(self.tree, tree), dict(self.sources)
        for key, value in leaves(tree):
            if value != {}:  # an empty mapping changes nothing
                sources = {one: by for one, by in sources.items() if not one.startswith(f"{key}.")} | {key: source}
        for (section, key), other in INSTEAD.items():
            given = tree.get(section)
            if isinstance(given, Mapping) and key in given and other not in given:
                merged[section] = {name: value for name, value in merged[section].items() if name != other}
                sources.pop(f"{section}.{other}", None)
        return Layers(merged, sources)

    def with_overrides(self, overrides: Sequence[str]) -> Layers:
        """`key.path=value` on top. Raises `ConfigError` on an override of another form."""
        tree, sources = overridden_tree(self.tree, overrides), dict(self.sources)
        for key in (word.partition("=")[0] for word in overrides):
            sources = {one: source for one, source in sources.items() if not one.startswith(f"{key}.")}
            sources |= {one: COMMAND_LINE for one, _ in leaves(tree) if f"{one}.".startswith(f"{key}.")}
        left = {key for key, _ in leaves(tree)}
        return Layers(tree, {key: source for key, source in sources.items() if key in left})

    @cached_property
    def config(self) -> RunConfig:
        """The configuration. Raises `ConfigError` (an `ErrorList` where several values are wrong)."""
        return build_config(self.tree)

    def source_of(self, key: str, value: Any, final: Mapping[str, Any]) -> str:
        """Where `value`, which `key` has in the end, is from.

        Args:
            final: key -> value of the configuration as the layers give it, before anything was derived.
        """
        if final.get(key, value) != value:
            return DERIVED
        return self.sources.get(key, DEFAULT)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is no mapping, or an empty one."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def annotated(layers: Layers, config: RunConfig) -> str:
    """`config` as YAML, with the source of every value that is no default as a comment behind it.

    Args:
        config: what the layers give, with what was derived since.
    """
    lines = dump_config(config).splitlines()
    given = dict(leaves(layers.config.model_dump(mode="json")))
    values = dict(leaves(config.model_dump(mode="json")))
    above: dict[int, str] = {}
    for key, name, value in _places(yaml.compose("\n".join(lines), Loader=yaml.SafeLoader)):
        source = layers.source_of(key, values.get(key), given)
        line = name.start_mark.line
        if source == DEFAULT:
            continue
        if isinstance(value, yaml.ScalarNode) and value.end_mark.line > line:  # behind it would be within the text
            above[line] = f"{' ' * name.start_mark.column}# {source}"
        else:
            lines[line] = f"{lines[line]:{COLUMN}}  # {source}"
    for line in sorted(above, reverse=True):
        lines.insert(line, above[line])
    return "\n".join(["# Behind a value: where it is from. What says nothing is a default.", *lines])


def _places(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """(dotted key, its node, its value's node) of every leaf of a YAML text."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _places(value, f"{key}.")
        else:
            yield key, name, value


def summary(layers: Layers, config: RunConfig) -> Iterator[str]:
    """A paragraph per source with the values that it gave, of those that are not what they are without it."""
    given = dict(leaves(layers.config.model_dump(mode="json")))
    usual = dict(leaves(RunConfig().model_dump(mode="json")))
    found: dict[str, list[str]] = {}
    for key, value in leaves(config.model_dump(mode="json")):
        source = layers.source_of(key, value, given)
        if usual.get(key, ...) != value and source != DEFAULT:
            text = default_text(value)
            shown = text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE - 1]}…"
            found.setdefault(source, []).append(f"{key}={shown}")
    for source, values in found.items():
        yield textwrap.fill(
            f"{source}: {' '.join(values)}", WIDTH, subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False,
        )
