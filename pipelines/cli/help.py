"""How `--help` is laid out: the verbs in groups, in the order of work, and the flags with their defaults."""

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ByteSize
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.models import OptionInfo, ParameterInfo

from pipelines.config.settings import Config

if TYPE_CHECKING:  # Typer gives these types no public name
    from typer._click import Context, Parameter

PANELS: Mapping[str, tuple[str, ...]] = {
    "The whole pipeline": ("demo", "run", "study"),
    "Step by step, in the order of work": ("ingest", "train", "encode", "index", "search", "evaluate"),
    "What there is": ("status", "verify", "rejects", "plan", "config"),
    "Later": ("retry-rejects", "dedupe", "agreement", "alias", "export", "gc"),
}
"""Verbs by the title of their group, in the order of work."""
EVERY_VERB = "Common options"
"""Title of the flags that all verbs have."""

_ORDER = [name for names in PANELS.values() for name in names]
_KINDS = {int: "N", float: "X", str: "TEXT"}

P = TypeVar("P", bound=ParameterInfo)


class VerbCommand(TyperCommand):
    """A verb, whose help shows no type for flags without a value."""

    def get_params(self, ctx: "Context") -> list["Parameter"]:
        """List the arguments and flags."""
        return _without_types(super().get_params(ctx))

    def parse_args(self, ctx: "Context", args: list[str]) -> list[str]:
        """Parse what follows the verb; refuse what is too much in one line."""
        ctx.allow_extra_args = True  # refused here, since Typer would print all files of an expanded pattern
        rest = super().parse_args(ctx, args)
        if rest and not ctx.resilient_parsing:
            more = f"{len(rest)} unexpected arguments, the first is {rest[0]}" if rest[1:] else f"unexpected: {rest[0]}"
            hint = "; quote a pattern so that the shell does not expand it" if rest[1:] else ""
            ctx.fail(more + hint)
        return rest


class VerbGroup(TyperGroup):
    """The verbs in the order of PANELS; those of other packages come last."""

    def list_commands(self, ctx: "Context") -> list[str]:
        """List the names of the verbs."""
        return sorted(self.commands, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))

    def get_params(self, ctx: "Context") -> list["Parameter"]:
        """List the flags."""
        return _without_types(super().get_params(ctx))


def _without_types(parameters: list["Parameter"]) -> list["Parameter"]:
    for one in parameters:
        if isinstance(one, TyperOption) and one.is_flag:
            one.metavar = ""  # for None Typer would write <bool>
    return parameters


def panel_of(name: str) -> str | None:
    """Return the title of a verb's group; None for one that PANELS does not list."""
    return next((title for title, names in PANELS.items() if name in names), None)


class Flag(OptionInfo):
    """Declares a flag, beside its type: its help, a word for its value, and the setting that it stands for."""

    def __init__(
        self, help: str, metavar: str | None = None, names: Sequence[str] = (), setting: str | None = None, **more: Any
    ) -> None:
        """Take the help and, if the name is not that of the parameter, `names`; `more` is what Typer takes besides."""
        super().__init__(default=..., param_decls=names, help=help, metavar=metavar, **more)
        self.setting = setting


def laid_out(info: P, name: str, kind: object = None, needed: bool = False) -> P:
    """Return a flag's declaration with `name`, a short word for its type and, in its help, the default of its setting.

    `needed` marks a flag that the command line itself does not require, since there is another way to give it.
    """
    made = copy.copy(info)
    if isinstance(info, OptionInfo):  # an argument has its own name
        made.metavar = info.metavar or next((word for one, word in _KINDS.items() if one is kind), None)
    setting = None
    if isinstance(info, Flag):
        made.param_decls = info.param_decls or (name,)  # else Typer would add a flag such as --no-prune
        setting = info.setting
    default = None if setting is None else format_setting(value_of(Config(), setting))
    if default:
        made.help = rf"{info.help} [dim]\[default: {default}][/dim]"
    if needed:
        made.help = rf"{info.help} [dim red]\[required][/dim red]"
    return made


def format_setting(value: object) -> str:
    """Format the value of a setting as it may be given; "" for one that is unset."""
    if value is None or value == ():
        return ""
    if isinstance(value, ByteSize):
        return value.human_readable().replace(".0", "")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def value_of(config: Config, setting: str) -> object:
    """Return the value of a setting, given its dotted name."""
    return reduce(getattr, setting.split("."), config)
