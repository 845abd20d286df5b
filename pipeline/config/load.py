"""YAML file + dotted overrides -> `RunConfig`, with every fault named at once."""

from __future__ import annotations

import copy
import os
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.adapter import UNSET_RATES
from pipeline.config.names.hints import way_out
from pipeline.config.plain_yaml import DEEPEST, PlainDumper, YamlFault, parse_yaml, read_yaml
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError, joined

__all__ = [
    "build_config", "config_keys", "dump_config", "find_recipe", "load_config", "merge_trees", "overridden_tree",
    "read_yaml", "recipe_files", "validate", "with_values", "without_dropout",
]

ModelT = TypeVar("ModelT", bound=BaseModel)

CLOSE_QUOTES = "Close its quotes and brackets, and put the whole key=value in single quotes."
INSTEAD = {("train", "max_steps"): "epochs", ("train", "epochs"): "max_steps"}
"""(section, key) -> the key of which an override takes the place."""
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
_UNION_TAG = re.compile(r"str|int|float|Method|\[key\]|(tuple|union|literal|nullable|function-\w+)\[.*\]")
MOST_ERRORS = 10
"""Faults shown at once."""


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a file, or a name in pipeline/recipes), apply `key.path=value` overrides, validate.

    Values are YAML: `train.max_steps=5`, `adapter.target_modules=[q_proj,v_proj]`.

    Raises:
        ConfigError: unreadable file, unknown key (with the nearest right one), wrong type or value.
    """
    return build_config(overridden_tree(read_yaml(find_recipe(source)) if source is not None else {}, overrides))


def overridden_tree(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `key.path=value` applied. Raises `ConfigError` on an override of another form."""
    tree = copy.deepcopy(tree)
    given = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        _apply_override(tree, override)
        section, _, key = override.partition("=")[0].partition(".")
        if (section, key) in INSTEAD and f"{section}.{INSTEAD[section, key]}" not in given:
            tree[section].pop(INSTEAD[section, key], None)
    return tree


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`config` with dotted keys set to new values, validated again. What is said in epochs takes the place of steps,
    and the other way round."""
    tree = _dumped(config)
    for (section, key), other in INSTEAD.items():
        if values.get(f"{section}.{key}") is not None and f"{section}.{other}" not in values:
            tree[section].pop(other, None)
    for key, value in values.items():
        _set(tree, key, copy.deepcopy(value))  # a later key may lie within it
    return build_config(tree)


def without_dropout(config: RunConfig) -> RunConfig:
    """The same run of plain LoRA (or plain AdaLoRA)."""
    return with_values(config, {"adapter.method": "none", **UNSET_RATES, "adapter.rescale": "inverse"})


def merge_trees(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `over` put on top."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge_trees(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_config(tree: Mapping[str, Any]) -> RunConfig:
    """Validate a plain tree of settings. Raises `ConfigError` (an `ErrorList` where several are wrong)."""
    return validate(RunConfig, tree)


def validate(model: type[ModelT], tree: Mapping[str, Any]) -> ModelT:
    """`model` from `tree`, pydantic's complaints turned into our errors with the way out."""
    try:
        return model.model_validate(dict(tree))
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        errors: list[UserError] = _merge_union_errors([_to_error(model, item) for item in faults[:MOST_ERRORS]])
    if len(faults) > MOST_ERRORS:
        errors.append(ConfigError("configuration", None, f"has {len(faults)} faults; these are the first"))
    raise joined(errors)


def dump_config(config: RunConfig) -> str:
    """The YAML text that `load_config` turns into an equal configuration."""
    return yaml.dump(_dumped(config), Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


def _dumped(config: RunConfig) -> dict[str, Any]:
    """The tree of an equal configuration: where epochs say how long training is, max_steps does not."""
    tree: dict[str, Any] = config.model_dump(mode="json")
    if config.train.epochs is not None:
        del tree["train"]["max_steps"]
    return tree


def find_recipe(source: str | Path) -> Path:
    """A path as given, or the file of that name (`default`, `papers/gpt2-medium-e2e`) in pipeline/recipes.

    Raises:
        ConfigError: there is neither. (What is there and no file is refused by who reads it.)
    """
    recipes = recipe_files()
    if os.path.isfile(source):
        return Path(source)
    if found := recipes.get(posixpath.normpath(source)):
        return found
    if source and os.path.exists(source):
        return Path(source)
    fault = "is neither a file nor a recipe" if source else "is empty"
    raise ConfigError("--config", str(source), fault, f"Recipes: {', '.join(recipes)}.")


def recipe_files() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package."""
    return {p.relative_to(RECIPES).with_suffix("").as_posix(): p for p in sorted(RECIPES.glob("**/*.yaml"))}


def config_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration model."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for section in _models_in(field.annotation):
            if section.__name__.endswith("Config"):
                yield from config_keys(section, f"{key}.")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key or not key.isprintable() or key.count(".") >= DEEPEST:
        raise ConfigError("override", override, "is not of the form key.path=value", "Example: train.max_steps=100.")
    try:
        value = parse_yaml(text) if text else ""
    except YamlFault as error:
        raise ConfigError(key, text, error.constraint, error.remedy) from error
    except yaml.YAMLError as error:
        raise ConfigError(key, text, "is not a valid YAML value", CLOSE_QUOTES) from error
    _set(tree, key, value)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; what stands in its way and is no mapping gives way."""
    *parents, leaf = key.split(".")
    for parent in parents:
        if not isinstance(tree.get(parent), dict):
            tree[parent] = {}
        tree = tree[parent]
    tree[leaf] = value


def _to_error(model: type[BaseModel], item: Mapping[str, Any]) -> ConfigError:
    location = [str(part) for part in item["loc"] if not _is_union_tag(part)]
    key = ".".join(location)
    value = item.get("input")
    if item["type"] == "extra_forbidden":
        return ConfigError(key, value, "is not a known key", way_out(key, list(config_keys(model))))
    if item["type"] == "model_type" and key in model.model_fields:
        return ConfigError(key, value, "is a section of keys, not a key with a value", f"See loradrop keys {key}.")
    message = str(item["msg"]).removeprefix("Value error, ").replace("a valid tuple", "a list, such as [a, b]")
    shown = value if not isinstance(value, dict | BaseModel) else None
    return ConfigError(key or "configuration", shown, message[:1].lower() + message[1:], _meaning(model, location))


def _meaning(model: type[BaseModel], location: Sequence[str]) -> str:
    """What the key at `location` means, from its docstring: the way out of a wrong value."""
    description: str | None = None
    for name in location:
        if name not in model.model_fields:
            return ""
        field = model.model_fields[name]
        description = field.description
        model = next(_models_in(field.annotation), model)
    return f"Its meaning: {' '.join(description.split())}" if description else ""


def _is_union_tag(part: object) -> bool:
    """pydantic names the union branch it tried; that is no part of the user's key."""
    return isinstance(part, str) and _UNION_TAG.fullmatch(part) is not None


def _merge_union_errors(errors: list[ConfigError]) -> list[UserError]:
    """One error per key: a union reports each branch it tried; the last is the most specific."""
    by_key: dict[str, ConfigError] = {}
    for error in errors:
        by_key.setdefault(error.field, error)
    return list(by_key.values())


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
