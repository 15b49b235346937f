"""Loads settings from files, flags and recipes into one tree; its errors name the nearest setting."""

import difflib
import json
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.config.recipes import AUTO, recipe_settings
from pipelines.config.settings import Config, declared_settings, setting_meanings
from pipelines.errors import ConfigError


def changed_settings(config: Config) -> list[str]:
    """Return the settings that differ from the defaults or the recipe, as section.key=value.

    They are for a submitted job: `ray.address` becomes the job's own cluster, and `ray.driver_labels` is left out,
    since the place of its driver is already decided.
    """
    changed = [] if config.train.recipe is None else [f"train.recipe={config.train.recipe}"]
    defaults = load_config(sets=changed).model_dump(mode="json")
    for section, settings in config.model_dump(mode="json").items():
        # This recipe chooses settings that nobody named, so a default that the user named is told too.
        named = getattr(config, section).model_fields_set if config.train.recipe == AUTO else ()
        for key, value in settings.items():
            usual, setting = defaults[section][key], f"{section}.{key}"
            unchanged = value == usual and key not in named
            if unchanged or setting in ("ray.address", "ray.driver_labels", "train.recipe"):
                continue
            if isinstance(value, dict) and usual:  # a nested group of settings
                changed += [f"{setting}.{name}={json.dumps(one)}" for name, one in value.items() if one != usual[name]]
            else:
                changed.append(f"{setting}={_toml(value)}")
    return [*changed, "ray.address=auto"]


def as_toml(tree: Mapping[str, Any], chosen_later: Collection[str] = (), prefix: str = "") -> str:
    """Write a tree of settings as a file for --config; what is unset, or chosen later, becomes a comment."""
    below = [name for name, value in tree.items() if isinstance(value, dict) and f"{prefix}{name}" in _SECTIONS]
    lines = [
        f"# {name} is chosen by the recipe as the training begins"
        if f"{prefix}{name}" in chosen_later
        else f"# {name} is unset"
        if value is None
        else f"{name} = {_toml(value)}"
        for name, value in tree.items()
        if name not in below
    ]
    heading = [f"[{prefix.removesuffix('.')}]"] if prefix else []
    own = ["\n".join([*heading, *lines])] if lines else []
    return "\n\n".join([*own, *(as_toml(tree[name], chosen_later, f"{prefix}{name}.") for name in below)])


def _toml(value: Any) -> str:
    """Write a value as TOML; TOML reads all JSON values except objects."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(one)}" for name, one in value.items()) + "}"


def load_config(
    file: str | Path | None = None, sets: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Build the tree from a TOML file, `section.key=value` strings and named flags, later ones winning.

    `flags` maps dotted names to values; None means that the flag was not given. If any of these sets `train.recipe`,
    they all override the settings of that recipe. Raises ConfigError.
    """
    return config_from(load_tree(file, sets, flags))


def load_tree(
    base: str | Path | Mapping[str, Any] | None = None, sets: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Collect the user's settings, as `load_config` does: sections of plain values, without defaults or recipe.

    `base` is a TOML file, or a tree, which is not changed.
    """
    tree = merge_trees({}, base) if isinstance(base, Mapping) else read_toml(Path(base)) if base is not None else {}
    for text in sets:
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--set {text!r}: write section.key=value, as in --set train.epochs=5")
        set_in_tree(tree, name.strip(), _parse_value(value.strip()))
    for name, value in (flags or {}).items():
        if value is not None:
            set_in_tree(tree, name, value)
    return tree


def merge_trees(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one tree of settings over another: sections are merged key by key, values replaced."""
    tree = dict(below)
    for key, value in above.items():
        under = tree.get(key)
        if isinstance(value, Mapping):
            value = merge_trees(under if isinstance(under, Mapping) else {}, value)
        tree[key] = value
    return tree


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a tree of settings by their dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def config_from(tree: Mapping[str, Any]) -> Config:
    """Validate a tree from `load_tree`, over its recipe. Raises ConfigError."""
    whole = merge_trees({}, tree)
    _start_from_recipe(whole)
    return validate_tree(whole)


def validate_tree(tree: Mapping[str, Any], kind: type[Config] = Config) -> Config:
    """Check a tree of settings; raise ConfigError with the setting, its value and the allowed values."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, kind)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file; raise ConfigError where there is none or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"configuration {path} cannot be read as TOML: {error}") from None


def _parse_value(text: str) -> Any:
    """Read `text` as a TOML value; other text becomes a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def set_in_tree(tree: dict[str, Any], name: str, value: Any) -> None:
    """Enter a value in the tree under its dotted name."""
    *parents, leaf = name.split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{name}: {parent} is a value, not a section")
        tree = node
    tree[leaf] = value


def _start_from_recipe(tree: dict[str, Any]) -> None:
    """Add the settings of the recipe below those of the user."""
    train = tree.get("train")
    name = train.get("recipe") if isinstance(train, dict) else None
    for path, value in recipe_settings(name).items() if isinstance(name, str) else ():
        section, key = path.split(".")
        if isinstance(said := tree.setdefault(section, {}), dict):
            said.setdefault(key, value)


def _explain(error: ValidationError, kind: type[Config]) -> str:
    """Describe the first problem in one line; for an unknown key, name the nearest known one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = nearest_name(where, kind)
        hint = f"did you mean {near}?" if near else "`hhnet config` lists them all"
        return f"unknown setting {where}: {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where} = {problem['input']!r}: {message}{more}"


_SECTIONS = {name for name, _ in declared_settings(Config)} - set(setting_meanings(Config))
"""Names of the sections, in contrast to settings whose values are tables."""


def known_names(kind: type[Config] = Config) -> list[str]:
    """List every section and setting, by dotted name."""
    return [name for name, _ in declared_settings(kind)]


def nearest_name(name: str, kind: type[Config] = Config) -> str | None:
    """Return the section or setting whose name is nearest to a wrong one, or None if none is near."""
    return next(iter(difflib.get_close_matches(name, known_names(kind), n=1, cutoff=0.5)), None)
