"""Every key with its meaning, type, range and default, and the JSON Schema of a configuration; both from the fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.config.section import LARGEST

Node = dict[str, Any]
"""A part of a JSON Schema."""

_NAMES = {
    "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null",
    "object": "mapping",
}  # fmt: skip
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
_LENGTHS = {"minLength": "not empty", "minItems": "at least one"}


@dataclass(frozen=True)
class Key:
    """One key, in words."""

    key: str
    meaning: str
    type: str
    """What a value is: `section` where it holds keys of its own."""
    range: str
    """Bounds, `""` where there are none."""
    default: Any
    """As JSON; of a section, and of a key that its section requires, None."""


def all_keys() -> tuple[Key, ...]:
    """Every dotted key of a configuration, in the order of the sections' files."""
    schema = json_schema()
    return tuple(_keys_in(schema, schema, ""))


def json_schema() -> Node:
    """The JSON Schema of a configuration file: descriptions are the fields' docstrings, unknown keys are errors."""
    schema: Node = _tidied(RunConfig.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "loradrop configuration", **schema}


def _tidied(node: Any) -> Any:
    """Without the titles that pydantic makes of names; a docstring's lines are one text."""
    if isinstance(node, list):
        return [_tidied(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {name: part for name, part in node.items() if not (name == "title" and isinstance(part, str))}
    return {
        name: " ".join(part.split()) if name == "description" and isinstance(part, str) else _tidied(part)
        for name, part in kept.items()
    }


def _keys_in(section: Node, schema: Node, prefix: str) -> Iterator[Key]:
    for name, node in section["properties"].items():
        inner = _section_of(node, schema)
        meaning = node.get("description") or (inner or {}).get("description", "")
        default = None if "$ref" in node else node.get("default")
        yield Key(f"{prefix}{name}", meaning, _type(node, schema), _range(node), default)
        if inner is not None:
            yield from _keys_in(inner, schema, f"{prefix}{name}.")


def _section_of(node: Node, schema: Node) -> Node | None:
    """The section that a key is, may be beside null, is a list of, or has under names."""
    for part in (node, *node.get("anyOf", ()), node.get("items", {}), *node.get("patternProperties", {}).values()):
        name = part.get("$ref", "").rpartition("/")[2]
        if name.endswith("Config"):
            section: Node = schema["$defs"][name]
            return section
    return None


def _type(node: Node, schema: Node) -> str:
    match node:
        case {"anyOf": parts}:
            return " or ".join(_type(part, schema) for part in parts)
        case {"$ref": ref}:
            name = ref.rpartition("/")[2]
            inner = schema["$defs"][name]["properties"]
            return "section" if name.endswith("Config") else "{" + ", ".join(inner) + "}"
        case {"enum": values}:
            return " | ".join(map(str, values))
        case {"const": value}:
            return str(value)
        case {"prefixItems": parts}:
            return f"[{', '.join(_type(part, schema) for part in parts)}]"
        case {"type": "array", "items": part}:
            inner_type = _type(part, schema)
            return f"list of {f'({inner_type})' if ' or ' in inner_type else inner_type}"
        case {"type": "object", "additionalProperties": {} as part} if part:
            names = node.get("propertyNames", {}).get("enum")
            return f"mapping of {' | '.join(names) if names else 'names'} to {_type(part, schema)}"
        case {"type": "object", "patternProperties": parts}:
            return f"mapping of names to {' or '.join(_type(part, schema) for part in parts.values())}"
        case {"type": kind}:
            return str(_NAMES.get(kind, kind))
    return "any value"


def _range(node: Node) -> str:
    bounds = [f"{sign} {_number(node[name])}" for name, sign in _BOUNDS if node.get(name, LARGEST) != LARGEST]
    bounds += [text for name, text in _LENGTHS.items() if node.get(name)]
    if "prefixItems" in node:
        bounds = []  # its type says how many
    for part in node.get("anyOf", ()):
        bounds += [one] if (one := _range(part)) else []
    for inner in (node.get("items"), node.get("additionalProperties")):
        if isinstance(inner, dict) and (one := _range(inner)):
            bounds.append(f"each {one}")
    return ", ".join(bounds)


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def default_text(default: Any) -> str:
    """As it would be written on the command line."""
    return default if isinstance(default, str) and default else json.dumps(default, ensure_ascii=False)
