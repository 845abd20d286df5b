"""YAML file + dotted overrides -> `RunConfig`, with every fault named at once."""

from __future__ import annotations

import copy
import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.adapter import UNSET_RATES
from pipeline.config.names.faults import in_our_words, keys_of
from pipeline.config.plain_yaml import DEEPEST, PlainDumper, YamlFault, parse_yaml, read_yaml
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError

__all__ = [
    "build_config", "config_keys", "dump_config", "find_recipe", "load_config", "merge_trees", "overridden_tree",
    "read_yaml", "recipe_files", "validate", "with_values", "without_dropout",
]

ModelT = TypeVar("ModelT", bound=BaseModel)

CLOSE_QUOTES = "Close its quotes and brackets, and put the whole key=value in single quotes."
INSTEAD = {("train", "max_steps"): "epochs", ("train", "epochs"): "max_steps"}
"""(section, key) -> the key of which an override takes the place."""
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


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
        complaint = error
    raise in_our_words(model, complaint)


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


def config_keys() -> Iterator[str]:
    """Every dotted key of a configuration."""
    return keys_of(RunConfig)


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
