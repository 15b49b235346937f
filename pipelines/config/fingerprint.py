"""Lists the settings that change a result, and so belong to its fingerprint."""

from collections.abc import Mapping
from functools import cache, reduce
from typing import Any

from pipelines.config.loading import set_in_tree, validate_tree
from pipelines.config.settings import Config, declared_settings


@cache
def settings_by_kind(tree: type[Config]) -> Mapping[str, tuple[str, ...]]:
    """List for each kind of artifact the dotted names of the settings that are declared to change it."""
    found: dict[str, tuple[str, ...]] = {}
    for name, kinds in declared_settings(tree):
        for kind in kinds:
            found[kind] = (*found.get(kind, ()), name)
    return found


def result_settings(config: Config, kind: str) -> dict[str, Any]:
    """Return the settings of `config` that change an artifact of `kind`, by dotted name, as plain JSON values."""
    values = config.model_dump(mode="json")
    names = settings_by_kind(type(config))[kind]
    return {name: reduce(lambda node, key: node[key], name.split("."), values) for name in names}


def config_of(settings: Mapping[str, Any]) -> Config:
    """Return a tree with the given settings, by dotted name, and all others at their defaults."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        set_in_tree(tree, name, value)
    return validate_tree(tree)
