"""What every verb of the command line shares: its options, errors, exit codes, output, and the way to a Ray job.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once.
"""

import errno
import functools
import inspect
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from pipelines.cluster.records import job_records
from pipelines.config import Config, load_config
from pipelines.errors import HeadLost, HHNetError, UsageError
from pipelines.storage import use_unsigned

Result = dict[str, Any]

SEND_AGAIN_S = 0.1
LINE_CHARS = 300
"""Longest message of an error; --debug shows all of it."""
PATHS = ("--shards", "--val", "--model", "--codes", "--index", "--out")
"""Flags of submitted verbs whose values are folders or URIs."""
TABLES = ("versions", "changes", "states", "summary", "by_step")
"""What of a result there are several of."""
ROWS_SHOWN = 50
FILES_SHOWN = 10

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


def verb(
    group: typer.Typer, name: str, shown: Callable[[Result], str] | None = None
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a function as a verb: adds --json and --debug, turns errors into exit codes, prints the result.

    `shown` puts a result into words where `present` is not what people want to see.
    """

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def command(*args: Any, json_output: bool, debug: bool, **kwargs: Any) -> None:
            code = _run(lambda: function(*args, **kwargs), json_output, debug, shown or present)
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
    with suppress(OSError):
        sys.stderr.write(f"hhnet: {_shown(message)}\n")
        sys.stderr.flush()


def present(result: Mapping[str, Any]) -> str:
    """A result for people: what happened, then its facts, one per line, and what there are several of as a table."""
    if result.get("results"):
        page = [f"page  {result['html']}"] if "html" in result else []
        return "\n\n".join([*(_present_query(entry) for entry in result["results"]), *page])
    lines = [f"{result['verb']}: {result['status']}"]
    elsewhere = ("verb", "status", *TABLES, "commands", "kinds")  # the planner shows its kinds before any work
    facts = {key: value for key, value in result.items() if key not in elsewhere and value not in (None, "", [], {})}
    if "skipped_files" in facts:
        facts["skipped_files"] = _first_skipped(result)
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        first, *rest = _fact(value)
        lines += [f"  {key:<{width}}  {first}", *(f"  {'':<{width}}  {text}" for text in rest)]
    for name in TABLES:
        lines += _table(result.get(name, []))
    commands = [f"  {command}" for command in result.get("commands", [])]
    return "\n".join([*lines, *(["", "next:", *commands] if commands else [])])


def _first_skipped(result: Mapping[str, Any]) -> list[str]:
    """The first files that were skipped, one per line with its reason, and how many more there are."""
    named, total = result["skipped_files"], result["skipped"]
    lines = ["  ".join(map(str, file.values())) for file in named[:FILES_SHOWN]]
    if total <= len(lines):
        return lines
    there = "all of them" if total == len(named) else f"the first {len(named):,}"
    return [*lines, f"... and {total - len(lines):,} more, {there} with --json"]


def _fact(value: Any) -> list[str]:
    """Its lines: what is counted by name on one, texts on one each."""
    if isinstance(value, Mapping):
        return [", ".join(f"{name} {one}" for name, one in value.items())]
    if isinstance(value, list):
        texts = [str(one).replace("\n", "\\n") for one in value[:ROWS_SHOWN]]
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
    settings = load_config(config, sets or (), named)
    use_unsigned(settings.store.unsigned)
    return settings


def submit(config: Config, words: list[str], flags: Mapping[str, str | list[str] | None]) -> Result | None:
    """Run the verb as a Ray job when `ray.address` is an http(s) URL; None when it runs here."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS", "")
    if not address.startswith(("http://", "https://")):
        return None
    from pipelines.cluster.access import is_loopback, require_ray_token
    from pipelines.cluster.jobs import submit_verb

    require_ray_token(address)
    same_disk = config.store.shared or is_loopback(address)
    arguments = list(words)
    for name, value in flags.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                arguments += [name, _seen_by_job(name, one, same_disk) if name in PATHS else one]
    for setting in changed_settings(_with_seen_files(config, same_disk)):
        arguments += ["--set", setting]
    return submit_verb(address, arguments, wait_s=config.ray.wait_s, labels=config.ray.driver_labels)


def _seen_by_job(name: str, value: str, same_disk: bool) -> str:
    """A path as a job has to be told it, since it runs in another folder; UsageError where it means nothing there."""
    path = os.path.expanduser(value)  # noqa: PTH111 (Path would make one slash of the two in s3://)
    if "://" in path or os.path.isabs(path):  # noqa: PTH117
        return path
    if not same_disk:
        raise UsageError(
            f"{name} {value} is relative to this folder, and the job runs in another one: give s3://..., or an "
            "absolute path that all nodes see; with store.shared=true it is taken from this folder"
        )
    return os.path.abspath(path)  # noqa: PTH100


def _with_seen_files(config: Config, same_disk: bool) -> Config:
    """The settings with the files of weights named as the job has to find them."""
    model, train = config.model, config.train
    if model.weights not in (None, "timm"):
        model = model.model_copy(update={"weights": _seen_by_job("model.weights", str(model.weights), same_disk)})
    if train.teacher_weights != "timm":
        seen = _seen_by_job("train.teacher_weights", train.teacher_weights, same_disk)
        train = train.model_copy(update={"teacher_weights": seen})
    return config.model_copy(update={"model": model, "train": train})


def changed_settings(config: Config) -> list[str]:
    """Every setting that is not a default or its recipe's, as section.key=value; `ray.address` points at the job's own
    cluster, and where its driver runs is decided."""
    changed = [] if config.train.recipe is None else [f"train.recipe={config.train.recipe}"]
    defaults = load_config(sets=changed).model_dump(mode="json")
    for section, settings in config.model_dump(mode="json").items():
        for key, value in settings.items():
            if value == defaults[section][key] or (section, key) in (("ray", "address"), ("ray", "driver_labels")):
                continue
            usual = defaults[section][key]
            if isinstance(value, dict) and usual:  # a group of settings
                changed += [
                    f"{section}.{key}.{name}={json.dumps(one)}" for name, one in value.items() if one != usual[name]
                ]
            else:
                changed.append(f"{section}.{key}={_toml(value)}")
    return [*changed, "ray.address=auto"]


def _toml(value: Any) -> str:
    """Write a value as TOML, which reads JSON's values but for its objects."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(one)}" for name, one in value.items()) + "}"
