"""What every verb of the command line shares: its options, errors, exit codes, output, and the way to a Ray job.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once.
"""

import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from pipelines.config import Config, load_config
from pipelines.errors import HHNetError

Result = dict[str, Any]

SEND_AGAIN_S = 0.1
TABLES = ("versions", "changes", "states", "summary", "steps")
"""What of a result there are several of."""
ROWS_SHOWN = 50

ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.", metavar="FILE.toml")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, as in --set train.epochs=5; repeatable.", metavar="section.key=value"),
]
Out = Annotated[str, typer.Option("--out", help="Root of the artifact: a folder or s3://bucket/prefix.", metavar="URI")]
Codes = Annotated[list[str], typer.Option("--codes", help="A codes artifact; repeatable.", metavar="URI")]
JSON_OPTION = Annotated[bool, typer.Option("--json", help="Print the result as one line of JSON on stdout.")]
DEBUG_OPTION = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Terminated(BaseException):
    """SIGTERM arrived; raised so that what must be closed is closed."""


def verb(group: typer.Typer, name: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as a verb: adds --json and --debug, turns errors into exit codes, prints the result."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def command(*args: Any, json_output: bool, debug: bool, **kwargs: Any) -> None:
            code = _run(lambda: function(*args, **kwargs), json_output, debug)
            if code:
                raise typer.Exit(code)

        common = [("json_output", JSON_OPTION), ("debug", DEBUG_OPTION)]
        signature = inspect.signature(function, eval_str=True)
        extra = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
            for key, kind in common
        ]
        command.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *extra])  # type: ignore[attr-defined]
        command.__annotations__ = {key: parameter.annotation for key, parameter in signature.parameters.items()}
        command.__annotations__ |= dict(common)
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        group.command(name, help="\n\n".join(" ".join(words.split()) for words in paragraphs))(command)
        return function

    return register


def _run(work: Callable[[], Result], json_output: bool, debug: bool) -> int:
    """Do a verb's work and report it; the exit code of the contract."""
    previous, hook = signal.signal(signal.SIGTERM, _terminate), sys.unraisablehook
    sys.unraisablehook = _send_again
    try:
        result = work()
    except HHNetError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; what was committed stays, the same command goes on from there")
        return 130
    except (Terminated, SystemExit):  # while Ray starts, its own handler answers SIGTERM by exiting
        _complain("terminated; what was committed stays, the same command goes on from there")
        return 143
    finally:
        signal.signal(signal.SIGTERM, previous)
        sys.unraisablehook = hook
    text = json.dumps(result, ensure_ascii=False) if json_output else present(result)
    sys.stdout.write(text.encode(errors="replace").decode() + "\n")  # names of files need not be UTF-8
    return 4 if result.get("status") == "degraded" else 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


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
    sys.stderr.write(f"hhnet: {message}\n")


def present(result: Mapping[str, Any]) -> str:
    """A result for people: what happened, then its facts, one per line, and what there are several of as a table."""
    if result.get("results"):
        page = [f"page  {result['html']}"] if "html" in result else []
        return "\n\n".join([*(_present_query(entry) for entry in result["results"]), *page])
    lines = [f"{result['verb']}: {result['status']}"]
    elsewhere = ("verb", "status", *TABLES, "commands", "kinds")  # the planner shows its kinds before any work
    facts = {key: value for key, value in result.items() if key not in elsewhere and value not in (None, "", [], {})}
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        first, *rest = _fact(value)
        lines += [f"  {key:<{width}}  {first}", *(f"  {'':<{width}}  {text}" for text in rest)]
    for name in TABLES:
        lines += _table(result.get(name, []))
    commands = [f"  {command}" for command in result.get("commands", [])]
    return "\n".join([*lines, *(["", "next:", *commands] if commands else [])])


def _fact(value: Any) -> list[str]:
    """Its lines: what is counted by name on one, texts on one each."""
    if isinstance(value, Mapping):
        return [", ".join(f"{name} {one}" for name, one in value.items())]
    if isinstance(value, list):
        texts = [str(one) for one in value[:ROWS_SHOWN]]
        more = [f"... and {len(value) - ROWS_SHOWN:,} more, all of them with --json"] if len(value) > ROWS_SHOWN else []
        return [*(texts if isinstance(value[0], str) else [", ".join(texts)]), *more]
    if isinstance(value, bool):
        return ["yes" if value else "no"]
    if isinstance(value, float):
        return [f"{value:.4g}"]
    return [f"{value:,}" if isinstance(value, int) else str(value)]


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first rows under a heading; a digest by its first digits."""
    if not rows:
        return []
    heading = list(dict.fromkeys(name for row in rows for name in row))
    cells = [heading, *([_cell(row.get(name)) for name in heading] for row in rows[:ROWS_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["", *("  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in cells)]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{13,}", text) else text


def _present_query(entry: Mapping[str, Any]) -> str:
    near = entry["neighbours"]
    scored = bool(near) and "score" in near[0]
    heading = f"  {'score':>6}" if scored else ""
    labels = [", ".join(map(str, found["labels"])) or "-" for found in near]
    width = max(map(len, ["labels", *labels]))
    lines = [f"query {entry['query']}", f"  {'rank':>4}{heading}  {'distance':>8}  {'labels':<{width}}  key"]
    for rank, (found, label) in enumerate(zip(near, labels, strict=True), start=1):
        score = f"  {found['score']:>6.4f}" if scored else ""
        lines.append(f"  {rank:>4}{score}  {found['distance']:>8}  {label:<{width}}  {found['key']}")
    return "\n".join(lines)


def configure(config: Path | None, sets: list[str] | None, **flags: Any) -> Config:
    """The settings of a verb; `flags` are named by setting, with __ for the dot, and None where not given."""
    named = {name.replace("__", "."): value for name, value in flags.items()}
    return load_config(config, sets or (), named)


def submit(config: Config, words: list[str], flags: Mapping[str, str | list[str] | None]) -> Result | None:
    """Run the verb as a Ray job when `ray.address` is an http(s) URL; None when it runs here."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        return None
    from pipelines.cluster.jobs import submit_verb

    arguments = list(words)
    for name, value in flags.items():
        for one in value if isinstance(value, list) else [value]:
            arguments += [name, one] if one is not None else []
    for setting in changed_settings(config):
        arguments += ["--set", setting]
    return submit_verb(address, arguments)


def changed_settings(config: Config) -> list[str]:
    """Every setting that is not a default or its recipe's, as section.key=value; `ray.address` points at the job's own
    cluster."""
    changed = [] if config.train.recipe is None else [f"train.recipe={config.train.recipe}"]
    defaults = load_config(sets=changed).model_dump(mode="json")
    for section, settings in config.model_dump(mode="json").items():
        for key, value in settings.items():
            if value == defaults[section][key] or (section, key) == ("ray", "address"):
                continue
            usual = defaults[section][key]
            nested = value.items() if isinstance(value, dict) else [(None, value)]
            changed += [
                f"{section}.{key}{'.' + name if name else ''}={json.dumps(one)}"
                for name, one in nested
                if not name or name not in usual or one != usual[name]
            ]
    return [*changed, "ray.address=auto"]
