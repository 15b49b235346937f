"""The settings as people read them: the verb `hhnet config`, and what --print-config prints."""

import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated, Any, Self

import typer

from pipelines.artifacts.result import Result
from pipelines.cli.help import format_setting, value_of
from pipelines.cluster.access import refuse_credentials
from pipelines.config.loading import as_toml, nearest_name
from pipelines.config.recipes import left_open
from pipelines.config.settings import Config, setting_meanings
from pipelines.errors import ConfigError

COLUMNS = 100
"""Width of the list in characters where stdout is no terminal."""
LEAST_MEANING_CHARS = 30
UNSET = "-"


@dataclass(frozen=True, kw_only=True)
class PrintedConfig(Result):
    """All settings of a run, in words as a file for --config."""

    verb: str = "config"
    status: str = "done"
    uri: str = ""
    settings: dict[str, Any]
    chosen_later: list[str]
    """Settings whose values here are not used: the recipe chooses them as the training begins."""

    @classmethod
    def of_config(cls, config: Config) -> Self:
        """Return the result that shows this configuration. Raises UsageError where it holds a secret."""
        refuse_credentials("the configuration", config.model_dump_json())
        return cls(digest=None, settings=config.model_dump(mode="json"), chosen_later=left_open(config))

    def as_text(self) -> str:
        """Return the settings as TOML."""
        return as_toml(self.settings, self.chosen_later)


@dataclass(frozen=True, kw_only=True)
class SettingsListing(Result):
    """Settings with name, value, default and meaning; unset values are None."""

    verb: str = "config"
    status: str = "done"
    uri: str = ""
    settings: list[dict[str, Any]]

    def as_text(self) -> str:
        """Return the settings as a table, with a heading for each section."""
        sections: dict[str, list[dict[str, Any]]] = {}
        for one in self.settings:
            sections.setdefault(one["name"].partition(".")[0], []).append(one)
        return "\n\n".join("\n".join(_section_lines(name, rows)) for name, rows in sections.items())


def config_command(
    settings: Config,
    name: Annotated[
        str | None, typer.Argument(help="A section such as train, or one setting such as train.lr.", metavar="SECTION")
    ] = None,
) -> Result:
    """List the settings with value, default and meaning, as --config and --set make them.

    Example: hhnet config train

    Example: hhnet config --config run.toml --set train.recipe=plain train.lr
    """
    found = [one for one in setting_meanings(Config) if name is None or f"{one}.".startswith(f"{name}.")]
    if not found:
        near = nearest_name(str(name))
        hint = f"did you mean {near}?" if near else f"sections are {', '.join(Config.model_fields)}"
        raise ConfigError(f"unknown setting {name}: {hint}")
    refuse_credentials("the configuration", settings.model_dump_json())
    meanings, usual = setting_meanings(Config), Config()
    rows = [
        {"name": one, "value": value_of(settings, one), "default": value_of(usual, one), "meaning": meanings[one]}
        for one in found
    ]
    return SettingsListing(digest=None, settings=rows)


def _section_lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return a section's heading and its settings in columns, the meanings wrapped."""
    config = Config.model_fields[name].annotation
    heads = ("setting", "value", "default")
    columns = [(one["name"], _in_column(one["value"]), _in_column(one["default"])) for one in rows]
    widths = [max(len(cells[n]) for cells in (heads, *columns)) for n in range(len(heads))]
    indent = " " * (sum(widths) + 2 * len(widths) + 2)
    width = max(shutil.get_terminal_size((COLUMNS, 0)).columns - len(indent), LEAST_MEANING_CHARS)
    lines = [f"{name}: {(config.__doc__ or '').strip()}"]
    for cells, meaning in zip((heads, *columns), ("meaning", *(one["meaning"] for one in rows)), strict=True):
        first, *more = textwrap.wrap(meaning, width)
        cut = "  ".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True))
        lines += [f"  {cut}  {first}", *(indent + line for line in more)]
    return lines


def _in_column(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={one}" for key, one in value.items()) or UNSET
    return format_setting(value) or UNSET
