"""The frame of every verb of the command line: common options, errors, exit codes, and output.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once.
"""

import copy
import errno
import functools
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from pipelines.artifacts.commit import has_begun
from pipelines.artifacts.result import Result
from pipelines.cli.config import PrintedConfig
from pipelines.cli.help import EVERY_VERB, Flag, VerbCommand, laid_out, panel_of
from pipelines.cli.next_step import next_step
from pipelines.cluster.records import job_records
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.console import JSON_VARIABLE, LEVEL_VARIABLE, Level, show_log
from pipelines.errors import DamagedArtifact, HeadLost, HHNetError, StoreRefused, UsageError
from pipelines.storage import use_unsigned

_log = logging.getLogger(__name__)

SEND_AGAIN_S = 0.1
EXTRAS = {"ray": "train", "prefect": "flows", "pooch": "flows", "faiss": "cpu"}
"""Extras that bring the packages without which some verbs cannot work."""
MAX_ERROR_CHARS = 300
"""Largest length of an error message in characters; --debug shows all of it."""

CommonFlag = functools.partial(Flag, rich_help_panel=EVERY_VERB)
ConfigOption = Annotated[Path | None, CommonFlag("TOML file of settings.", "FILE.toml")]
SetsOption = Annotated[
    list[str] | None,
    CommonFlag(
        "Change one setting, as in --set train.epochs=5; repeatable. `hhnet config` lists them all.",
        "section.key=value",
        names=("--set",),
    ),
]
PrintConfigOption = Annotated[bool, CommonFlag("Do nothing; print all settings as they would be used, as TOML.")]
OutOption = Annotated[str, Flag("Where to write: a folder or s3://bucket/prefix.", "URI")]
CodesOption = Annotated[list[str], Flag("Codes to read; repeatable.", "URI")]
JSON_OPTION = Annotated[bool, CommonFlag("Print the result as one line of JSON on stdout.", names=("--json",))]
QUIET_OPTION = Annotated[bool, CommonFlag("Show errors only: --log-level error.", names=("--quiet", "-q"))]
VERBOSE_OPTION = Annotated[
    bool, CommonFlag("Show each retry and give-up too: --log-level info.", names=("--verbose", "-v"))
]
LOG_LEVEL_OPTION = Annotated[
    Level,
    CommonFlag("Lowest level that is logged on stderr: debug, info, warning or error.", "LEVEL", envvar=LEVEL_VARIABLE),
]
LOG_JSON_OPTION = Annotated[bool, CommonFlag("Log each record as one line of JSON.", envvar=JSON_VARIABLE)]
DEBUG_OPTION = Annotated[bool, CommonFlag("Show an error's whole message and its traceback.")]
COMMON_OPTIONS = {
    "json_output": (JSON_OPTION, False),
    "quiet": (QUIET_OPTION, False),
    "verbose": (VERBOSE_OPTION, False),
    "log_level": (LOG_LEVEL_OPTION, "warning"),
    "log_json": (LOG_JSON_OPTION, False),
    "debug": (DEBUG_OPTION, False),
}
PLACE = "_place"
"""End of the name of the argument that stands for a flag; see `Main`."""


class Terminated(BaseException):
    """Raised on SIGTERM, so that open resources are closed on the way out."""


@dataclass(frozen=True)
class Main:
    """Stands beside a flag's declaration: it names the verb's main artifact, also without the flag."""

    metavar: str


class Flags:
    """Base of the frozen dataclasses that hold the flags of a verb, each field with its declaration."""

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for, by dotted name; None where the flag was not given."""
        flags = {name: _mark(hint, Flag) for name, hint in get_type_hints(type(self), include_extras=True).items()}
        return {flag.setting: getattr(self, name) for name, flag in flags.items() if flag and flag.setting}


def verb(group: typer.Typer, name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as a verb: adds the flags of every verb, turns errors into exit codes, prints the result.

    A parameter whose type is a subclass of `Flags` stands for all its fields. One of type `Config` receives the
    settings, with those that flags stand for, and adds --print-config, which is answered here unless the function takes
    `print_config` itself. --config and --set are there in any case.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        own = inspect.signature(function, eval_str=True).parameters.values()
        declared = {key: value for parameter in own for key, value in _declarations(parameter).items()}
        usual: dict[str, tuple[Any, Any]] = {"config": (ConfigOption, None), "sets": (SetsOption, None)}
        if any(parameter.annotation is Config for parameter in own):
            usual["print_config"] = (PrintConfigOption, False)
        declared |= {key: value for key, value in usual.items() if key not in declared} | COMMON_OPTIONS
        options = {one.name: one for key, (kind, default) in declared.items() for one in _options(key, kind, default)}
        mains = {key: (main, default) for key, (kind, default) in declared.items() if (main := _mark(kind, Main))}

        @functools.wraps(function)
        def command(
            *,
            json_output: bool,
            debug: bool,
            log_level: Level,
            log_json: bool,
            quiet: bool,
            verbose: bool,
            **given: Any,
        ) -> None:
            show_log("error" if quiet else "info" if verbose else log_level, log_json)

            def work() -> Result:
                if quiet and verbose:
                    raise UsageError("--quiet and --verbose exclude each other: give one of them")
                for key, (main, default) in mains.items():
                    given[key] = _main_artifact(key, main, default is inspect.Parameter.empty, given)
                return _work(function, own, given)

            code = _run(work, given, json_output, debug)
            if code:
                raise typer.Exit(code)

        # Typer reads a command's options from its signature; mypy knows no such attribute of a function.
        command.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
        command.__annotations__ = {key: option.annotation for key, option in options.items()}
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        text = "\n\n".join(" ".join(words.split()) for words in paragraphs)
        group.command(name, cls=VerbCommand, help=text, rich_help_panel=panel_of(name))(command)
        return function

    return register


def _declarations(parameter: inspect.Parameter) -> dict[str, tuple[Any, Any]]:
    """Return the flags that a parameter of a verb's function stands for: by name, the declaration and the default."""
    kind = parameter.annotation
    if kind is Config:
        return {}
    if not _holds_flags(kind):
        return {parameter.name: (kind, parameter.default)}
    hints = get_type_hints(kind, include_extras=True)
    defaults = {one.name: inspect.Parameter.empty if one.default is MISSING else one.default for one in fields(kind)}
    return {name: (hints[name], default) for name, default in defaults.items()}


def _options(name: str, declared: Any, default: Any) -> Iterator[inspect.Parameter]:
    """Yield what the command line takes for a flag: an option and, for the main artifact, an argument before it."""
    info, main, named = _mark(declared, OptionInfo | ArgumentInfo), _mark(declared, Main), _flag_name(name)
    if info is None:  # declared in Typer's older way, by its default
        yield _option(name, declared, default)
        return
    kind, needed = get_args(declared)[0], default is inspect.Parameter.empty
    if main:
        place = typer.Argument(help=f"{info.help} Or: {named}.", metavar=main.metavar, show_default=False)
        yield _option(name + PLACE, Annotated[kind | None, laid_out(place, named, needed=needed)], None)
        info, kind, default = copy.copy(info), kind | None, None if needed else default
        info.hidden = True
    yield _option(name, Annotated[kind, laid_out(info, named, _bare(kind))], default)


def _bare(kind: Any) -> Any:
    """Return the type of a single value: `str` for `list[str] | None`."""
    one = next((part for part in get_args(kind) if part is not type(None)), kind)
    return _bare(one) if one is not kind else kind


def _flag_name(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def _option(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _mark(declared: Any, kind: Any) -> Any:
    """Return what stands beside the type in a flag's declaration and is of this kind, or None."""
    return next((mark for mark in getattr(declared, "__metadata__", ()) if isinstance(mark, kind)), None)


def _holds_flags(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Flags)


def _main_artifact(name: str, main: Main, needed: bool, given: dict[str, Any]) -> Any:
    """Return the main artifact of a verb, given as an argument or by its flag. Raises UsageError for none or both."""
    flag, placed, named = _flag_name(name), given.pop(name + PLACE), given[name]
    if isinstance(placed, list) or isinstance(named, list):
        found: Any = [*(placed or ()), *(named or ())] or None
    elif placed is not None and named is not None:
        raise UsageError(f"{main.metavar} is given twice, as {placed} and with {flag} {named}: give it once")
    else:
        found = named if placed is None else placed
    if found is None and needed:
        raise UsageError(f"{main.metavar} is missing: give it after the verb, or with {flag}")
    return found


def _work(function: Callable[..., Result], own: Iterable[inspect.Parameter], given: Mapping[str, Any]) -> Result:
    """Call a verb's function with the arguments that the given options make, or print its settings instead."""
    named: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    takes_config = False
    for parameter in own:
        kind, value = parameter.annotation, given.get(parameter.name)
        if _holds_flags(kind):
            value = kind(**{field.name: given[field.name] for field in fields(kind)})
            named |= value.settings()
        takes_config = takes_config or kind is Config
        arguments[parameter.name] = value
    if takes_config or "config" not in arguments:
        config = load_config(given["config"], given["sets"] or (), named)
        use_unsigned(config.store.unsigned)
        if given.get("print_config") and "print_config" not in arguments:
            return PrintedConfig.of_config(config)
        arguments |= {parameter.name: config for parameter in own if parameter.annotation is Config}
    return function(**arguments)


def _run(work: Callable[[], Result], given: Mapping[str, Any], json_output: bool, debug: bool) -> int:
    """Do a verb's work and print its result or error; return the exit code of the contract.

    In a submitted job the result is not printed, but recorded for the process that follows the job.
    """
    with job_records() as records:
        try:
            with _signals_raised():
                result = work()
        except BaseException as error:
            message, code, expected = _explained(error)
            if records is not None:
                refused = {"refused": True} if isinstance(error, StoreRefused) else {}
                records.write(error=message, code=code, **refused)
            if not expected or (debug and isinstance(error, HHNetError)):
                if not isinstance(error, HeadLost):
                    raise
                traceback.print_exc()
            _complain(message)
            # A normal exit would run Ray's own hooks, which wait for the lost head.
            if isinstance(error, HeadLost):
                os._exit(code)
            return code
        if records is not None:
            records.write(result=result.as_json())
        elif _print(_json_line(result.as_json()) if json_output else _in_words(result, given)):
            return 1
    return 4 if result.status == "degraded" else 0


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise SIGTERM and a hang-up as `Terminated`, also where Python drops an exception of a signal handler."""
    previous, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    hung_up = signal.getsignal(signal.SIGHUP)
    if hung_up is signal.SIG_DFL:  # otherwise nohup or the like wants the verb to outlive its terminal
        signal.signal(signal.SIGHUP, _hang_up)
    # Python calls this hook where an exception cannot be raised, such as that of a signal during a finaliser.
    sys.unraisablehook = _send_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.signal(signal.SIGHUP, hung_up)
        sys.unraisablehook = hook


def _explained(error: BaseException) -> tuple[str, int, bool]:
    """Return an error's message, its exit code, and whether the message suffices without a traceback."""
    goes_on = "; what was committed stays, the same command goes on from there" if has_begun() else ""
    if isinstance(error, DamagedArtifact):
        return f"{error}; {error.REMEDY}", error.exit_code, True
    if isinstance(error, HHNetError):
        return str(error), error.exit_code, True
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get(str(error.name).partition(".")[0])):
        return f"this needs {error.name}, which is not installed: pip install 'hhnet[{extra}]'", 2, True
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted{goes_on}", 130, True
    if isinstance(error, Terminated | SystemExit):  # while Ray starts, its own handler answers SIGTERM by exiting
        return f"terminated{goes_on}", 143, True
    return f"{type(error).__name__}: {error}", 1, False


def _in_words(result: Result, given: Mapping[str, Any]) -> str:
    """Return a result in words, and below it the next command."""
    return "\n\n".join(filter(None, (result.as_text(), next_step(result, given))))


def _json_line(result: Mapping[str, Any]) -> str:
    """Return a result as one line of JSON; in ASCII if the console cannot show some character."""
    text = json.dumps(result, ensure_ascii=False)
    return text if _shown(text) == text else json.dumps(result)


_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that would let a name move the console's cursor, colour it, or turn the direction of writing."""


def _shown(text: str) -> str:
    """Return the text with \\x, \\u and \\U escapes for characters that would harm the console or do not fit it."""
    text = _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = (sys.stdout and sys.stdout.encoding) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str) -> int:
    """Write a result to stdout; return 1, after a line on stderr, where that fails, else 0."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(_shown(text) + "\n")
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # its buffer would fail again at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stays = "; what was published stays" if has_begun() else ""
        _complain(f"the result cannot be written to stdout: {error.strerror}{stays}")
        return 1
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _hang_up(_number: int, _frame: FrameType | None) -> None:
    """End a verb whose terminal is gone in the same way as SIGTERM, by its present handler."""
    signal.raise_signal(signal.SIGTERM)


def _send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Deliver a signal once more if its exception was raised where Python drops it.

    That is the case in a hook, for example at a fork.
    """
    number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(SEND_AGAIN_S, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _complain(message: str) -> None:
    if len(message) > MAX_ERROR_CHARS:
        message = f"{message[:MAX_ERROR_CHARS]} ... (all of it with --debug)"
    _log.error(_shown(message))
