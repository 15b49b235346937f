"""What every verb of the command line shares: its options, errors, exit codes, output, and the way to a Ray job.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once.
"""

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
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from pipelines.cli.present import present
from pipelines.cluster.records import job_records
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.console import Level, show_log
from pipelines.errors import HeadLost, HHNetError
from pipelines.storage import use_unsigned

_log = logging.getLogger(__name__)

Result = dict[str, Any]

SEND_AGAIN_S = 0.1
LINE_CHARS = 300
"""Longest message of an error; --debug shows all of it."""

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.", metavar="FILE.toml")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, as in --set train.epochs=5; repeatable.", metavar="section.key=value"),
]
Out = Annotated[str, typer.Option("--out", help="Root of the artifact: a folder or s3://bucket/prefix.", metavar="URI")]
Codes = Annotated[list[str], typer.Option("--codes", help="A codes artifact; repeatable.", metavar="URI")]
JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")]
LOG_LEVEL_OPTION = Annotated[Level, typer.Option("--log-level", help="Least level of what is logged on stderr.")]
LOG_JSON_OPTION = Annotated[bool, typer.Option("--log-json", help="Log one line of JSON for each record.")]
_DEFAULTS = {"log_level": "warning"}
DEBUG_OPTION = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Terminated(BaseException):
    """SIGTERM arrived; raised so that what must be closed is closed."""


def verb(
    group: typer.Typer, name: str, shown: Callable[[Result], str] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as a verb: adds --json, --debug and --log-*, turns errors into exit codes, prints the result.

    `shown` puts a result into words where `present` is not what people want to see.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def command(
            *args: Any, json_output: bool, debug: bool, log_level: Level, log_json: bool, **kwargs: Any
        ) -> None:
            show_log(log_level, log_json)
            code = _run(lambda: function(*args, **kwargs), json_output, debug, shown or present)
            if code:
                raise typer.Exit(code)

        common: list[tuple[str, Any]] = [("json_output", JSON_OPTION), ("debug", DEBUG_OPTION)]
        common += [("log_level", LOG_LEVEL_OPTION), ("log_json", LOG_JSON_OPTION)]
        signature = inspect.signature(function, eval_str=True)
        extra = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS.get(key, False), annotation=kind)
            for key, kind in common
        ]
        command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
        command.__annotations__ = {key: parameter.annotation for key, parameter in signature.parameters.items()}
        command.__annotations__ |= dict(common)
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        group.command(name, help="\n\n".join(" ".join(words.split()) for words in paragraphs))(command)
        return function

    return register


def _run(work: Callable[[], Result], json_output: bool, debug: bool, shown: Callable[[Result], str]) -> int:
    """Do a verb's work and report it, to who follows the job where it was submitted; the exit code of the contract."""
    previous, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    hung_up = signal.getsignal(signal.SIGHUP)
    if hung_up is signal.SIG_DFL:  # else somebody, such as nohup, wants the verb to outlive its terminal
        signal.signal(signal.SIGHUP, _hang_up)
    sys.unraisablehook = _send_again
    with job_records() as records:
        try:
            result = work()
        except BaseException as error:
            message, code, expected = _explained(error)
            if records is not None:
                records.write(error=message, code=code)
            if not expected or (debug and isinstance(error, HHNetError)):
                if not isinstance(error, HeadLost):
                    raise
                traceback.print_exc()
            _complain(message)
            if isinstance(error, HeadLost):  # Ray would wait for its head before it lets the process end
                os._exit(code)
            return code
        finally:
            signal.signal(signal.SIGTERM, previous)
            signal.signal(signal.SIGHUP, hung_up)
            sys.unraisablehook = hook
        if records is not None:
            records.write(result=result)
        elif code := _print(_json_line(result) if json_output else shown(result)):
            return code
    return 4 if result.get("status") == "degraded" else 0


def _explained(error: BaseException) -> tuple[str, int, bool]:
    """The message of an error that ends a verb, its exit code, and whether that is enough without a traceback."""
    goes_on = "what was committed stays, the same command goes on from there"
    if isinstance(error, HHNetError):
        return str(error), error.exit_code, True
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {goes_on}", 130, True
    if isinstance(error, Terminated | SystemExit):  # while Ray starts, its own handler answers SIGTERM by exiting
        return f"terminated; {goes_on}", 143, True
    return f"{type(error).__name__}: {error}", 1, False


def _json_line(result: Result) -> str:
    """A result as one line of JSON, in ASCII where the console cannot show all of it."""
    text = json.dumps(result, ensure_ascii=False)
    return text if _shown(text) == text else json.dumps(result)


_HARMFUL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What a name must not do to a console: move its cursor, colour it, or turn the direction of writing."""


def _shown(text: str) -> str:
    """The text with control characters and what the console cannot encode as \\x, \\u and \\U escapes."""
    text = _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = (sys.stdout and sys.stdout.encoding) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _print(text: str) -> int:
    """Write a result to stdout; 1 and a line on stderr where that fails."""
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        sys.stdout.write(_shown(text) + "\n")
        sys.stdout.flush()
    except OSError as error:
        if sys.stdout is not None:  # what it still holds would fail once more at the end of the process
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _complain(f"the result cannot be written to stdout: {error.strerror}; what was published stays")
        return 1
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _hang_up(_number: int, _frame: FrameType | None) -> None:
    """End a verb whose terminal is gone as SIGTERM does, by whatever handler that has at the moment."""
    signal.raise_signal(signal.SIGTERM)


def _send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """A signal that arrives in a hook, at a fork for example, raises where Python drops it: deliver it once more."""
    number = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}.get(unraisable.exc_type)
    if number is None:
        sys.__unraisablehook__(unraisable)
        return
    timer = threading.Timer(SEND_AGAIN_S, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _complain(message: str) -> None:
    if len(message) > LINE_CHARS:
        message = f"{message[:LINE_CHARS]} ... (all of it with --debug)"
    _log.error(_shown(message))


def configure(config: Path | None, sets: list[str] | None, **flags: Any) -> Config:
    """The settings of a verb; `flags` are named by setting, with __ for the dot, and None where not given."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    settings = load_config(config, sets or (), named)
    use_unsigned(settings.store.unsigned)
    return settings
