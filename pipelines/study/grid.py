"""Reads a study from its TOML file, and expands it into the grid of its configurations.

    title = "Bits"
    seeds = [0, 1]
    [settings]                        # of every cell, as in a file for --config
    train.epochs = 20
    [axes]
    model.bits = [16, 32]             # an axis: the values of one setting
    [axes.recipe.plain]               # another: named variants, each of which sets what it likes
    data.augment = "none"
    [axes.recipe.ours]
    data.augment = "crop_flip"
    [search]                          # chosen for each group by the validation mAP
    train.lr = [1e-4, 1e-3]

A cell is one choice of each axis and a seed. The cells that differ in the seed alone are a group.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config.fingerprint import result_settings
from pipelines.config.loading import flattened, load_config, read_toml
from pipelines.config.recipes import AUTO
from pipelines.config.settings import Config
from pipelines.errors import ConfigError

SHIPPED_STUDIES = ("small", "baselines", "losses", "resolution", "paper")
MAX_CELLS = 10_000


class Description(BaseModel):
    """The contents of a study's TOML file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(min_length=1, max_length=200)
    about: str = ""
    """Question of the study, in a few sentences."""
    protocol: str | None = None
    """Published split that the study uses; the data set's files are named on the command line."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    settings: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    search: dict[str, Any] = {}


@dataclass(frozen=True)
class Choice:
    """One value of an axis: its label, and its settings by dotted name."""

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """The cells that differ in the seed alone: their label on each axis, and their settings."""

    labels: Mapping[str, str]
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Labels of the group: `recipe=ours, model.bits=64`."""
        return ", ".join(f"{axis}={label}" for axis, label in self.labels.items()) or "all"


@dataclass(frozen=True)
class Grid:
    """A study, ready to run: every configuration in it is valid, and no two are the same."""

    description: Description
    axes: Mapping[str, tuple[Choice, ...]]
    groups: tuple[Group, ...]
    candidates: tuple[Choice, ...]
    """Choices that a search tries; empty without a search."""
    file: Path | None
    sets: tuple[str, ...]

    @classmethod
    def make(cls, description: Description, file: Path | None = None, sets: Sequence[str] = ()) -> "Grid":
        """Expand a description into its grid; `file` and `sets` change settings of every cell. Raises ConfigError."""
        axes, searched = _axes(description.axes, "axes"), _axes(description.search, "search")
        _require_own_settings({**axes, **{f"search {name}": choices for name, choices in searched.items()}})
        size = len(description.seeds)
        for choices in (*axes.values(), *searched.values()):
            size *= len(choices)
        if size > MAX_CELLS:
            raise ConfigError(f"the study has {size} trainings, more than {MAX_CELLS}: take values from its axes")
        groups = tuple(_combinations(axes))
        candidates = tuple(Choice(one.name, one.settings) for one in _combinations(searched))
        base = [f"{name}={json.dumps(value)}" for name, value in flattened(description.settings)]
        grid = cls(description, axes, groups, candidates if searched else (), file, (*base, *sets))
        grid._require_distinct()
        return grid

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of each group."""
        return self.description.seeds

    def config(self, group: Group, seed: int, more: Mapping[str, Any] | None = None) -> Config:
        """Return the configuration of a cell; `more` holds the settings that a search chose."""
        return load_config(self.file, self.sets, {**group.settings, **(more or {}), "train.seed": seed})

    def base(self) -> Config:
        """Return the configuration that all cells share."""
        return load_config(self.file, self.sets)

    def _require_distinct(self) -> None:
        """Raise ConfigError where two cells, or two candidates of a group, would be the same training."""
        cells = {f"{group.name}, seed {seed}": self.config(group, seed) for group in self.groups for seed in self.seeds}
        if len(cells) < len(self.groups) * len(self.seeds):
            raise ConfigError("seeds: a seed is listed twice: list each once")
        if any(config.train.recipe == AUTO for config in cells.values()):
            problem = f"train.recipe = {AUTO!r} would choose other settings on another machine"
            raise ConfigError(f"{problem}: a study names its settings, or takes another recipe")
        if any(config.encode.batch_size == "auto" for config in cells.values()):
            raise ConfigError("encode.batch_size = 'auto' would be another number on another machine: write a number")
        _refuse_same(cells, ("model", "rotation", "codes", "report"))
        for group in self.groups:
            found = {c.label: self.config(group, self.seeds[0], c.settings) for c in self.candidates}
            _refuse_same(found, ("model", "rotation"))


def _refuse_same(configs: Mapping[str, Config], kinds: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for name, config in configs.items():
        mark = json.dumps([result_settings(config, kind) for kind in kinds], sort_keys=True)
        if mark in known:
            same = f"the study's {known[mark]} and {name} would be the same: what differs changes no result"
            raise ConfigError(f"{same}, so remove one")
        known[mark] = name


def read_description(source: str, protocol: str | None = None) -> Description:
    """Read a shipped study by its name, or one in a .toml file; `protocol` replaces its protocol.

    Raises ConfigError, in one line, where it is neither, or wrong.
    """
    if source in SHIPPED_STUDIES:
        tree = tomllib.loads(files(__package__).joinpath(f"{source}.toml").read_text(encoding="utf-8"))
    elif source.endswith(".toml"):
        tree = read_toml(Path(source))
    else:
        known = ", ".join(SHIPPED_STUDIES)
        raise ConfigError(f"study {source!r} is unknown: choose one of {known}, or name a .toml file")
    try:
        return Description.model_validate({**tree, **({"protocol": protocol} if protocol else {})})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        hint = "; settings stand below [settings]" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{source}: {where}: {first['msg']}{hint}") from None


def _axes(tree: Mapping[str, Any], where: str) -> dict[str, tuple[Choice, ...]]:
    """Return the axes in the order of the file: lists of a setting's values, or tables of named variants."""
    axes: dict[str, tuple[Choice, ...]] = {}
    for name, value in tree.items():
        if name in Config.model_fields:
            for setting, values in flattened({name: value}):
                if not isinstance(values, list):
                    raise ConfigError(f"{where}: {setting} is {values!r}: give a list of its values")
                axes[setting] = tuple(Choice(_label(one), {setting: one}) for one in values)
        elif isinstance(value, dict) and all(isinstance(one, dict) for one in value.values()):
            axes[name] = tuple(Choice(label, dict(flattened(variant))) for label, variant in value.items())
        else:
            raise ConfigError(f"{where}: {name} is neither section.key = [values] nor a table of named variants")
    for name, choices in axes.items():
        if not choices:
            raise ConfigError(f"{where}: {name} is empty: give it a value, or leave it out")
        if len({choice.label for choice in choices}) < len(choices):
            raise ConfigError(f"{where}: {name} has a value twice: list each once")
    return axes


def _label(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _combinations(axes: Mapping[str, Sequence[Choice]]) -> Iterator[Group]:
    """Yield each combination of one choice on every axis."""
    for row in product(*axes.values()):
        settings = {name: value for choice in row for name, value in choice.settings.items()}
        yield Group({axis: choice.label for axis, choice in zip(axes, row, strict=True)}, settings)


def _require_own_settings(axes: Mapping[str, Sequence[Choice]]) -> None:
    """Raise ConfigError where two axes set the same setting: the later one would silently win."""
    owner: dict[str, str] = {"train.seed": "seeds"}
    for axis, choices in axes.items():
        for setting in {name for choice in choices for name in choice.settings}:
            if setting in owner:
                raise ConfigError(f"{setting} is set by {owner[setting]} and by {axis}: let one of them do it")
            owner[setting] = axis
