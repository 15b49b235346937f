"""The command line: one function per verb, one place for errors, exit codes and output.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once. Verbs of other packages come through the entry-point group `hhnet.verbs`.
"""

import functools
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points, version
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from pipelines.config import Config, load_config
from pipelines.errors import HHNetError, UsageError

Result = dict[str, Any]

app = typer.Typer(
    name="hhnet",
    help="Learn compact binary codes for images, encode a corpus on Ray, and search it by Hamming distance.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
index_app = typer.Typer(help="Build Hamming indexes.", no_args_is_help=True)

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
        group.command(name)(command)
        return function

    return register


def _run(work: Callable[[], Result], json_output: bool, debug: bool) -> int:
    """Do a verb's work and report it; the exit code of the contract."""
    previous = signal.signal(signal.SIGTERM, _terminate)
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
    sys.stdout.write((json.dumps(result, ensure_ascii=False) if json_output else present(result)) + "\n")
    return 4 if result.get("status") == "degraded" else 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _complain(message: str) -> None:
    sys.stderr.write(f"hhnet: {message}\n")


def present(result: Mapping[str, Any]) -> str:
    """A result for people: what happened, then its facts, one per line."""
    if "results" in result:
        return "\n\n".join(_present_query(entry) for entry in result["results"])
    lines = [f"{result['verb']}: {result['status']}"]
    facts = {key: value for key, value in result.items() if key not in ("verb", "status")}
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, float):
            text = f"{value:.4g}"
        elif isinstance(value, int):
            text = f"{value:,}"
        elif isinstance(value, list | dict):
            text = json.dumps(value, ensure_ascii=False)
        else:
            text = str(value)
        lines.append(f"  {key:<{width}}  {text if len(text) <= 300 else text[:297] + '...'}")
    return "\n".join(lines)


def _present_query(entry: Mapping[str, Any]) -> str:
    lines = [f"query {entry['query']}", f"  {'rank':>4}  {'distance':>8}  {'labels':<24}  key"]
    for rank, found in enumerate(entry["neighbours"], start=1):
        labels = ", ".join(str(label) for label in found["labels"]) or "-"
        lines.append(f"  {rank:>4}  {found['distance']:>8}  {labels:<24}  {found['key']}")
    return "\n".join(lines)


def _configure(config: Path | None, sets: list[str] | None, **flags: Any) -> Config:
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
    for setting in _changed_settings(config):
        arguments += ["--set", setting]
    return submit_verb(address, arguments)


def _changed_settings(config: Config) -> list[str]:
    """Every setting that is not a default, as section.key=value; `ray.address` points at the job's own cluster."""
    changed = []
    defaults = Config().model_dump(mode="json")
    for section, settings in config.model_dump(mode="json").items():
        for key, value in settings.items():
            if value == defaults[section][key] or (section, key) == ("ray", "address"):
                continue
            nested = value.items() if isinstance(value, dict) else [(None, value)]
            changed += [f"{section}.{key}{'.' + name if name else ''}={json.dumps(one)}" for name, one in nested]
    return [*changed, "ray.address=auto"]


# --------------------------------------------------------------------------------------------------------- verbs


@verb(app, "ingest")
def ingest(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder, zip or tar of class folders; a CSV or Parquet table; with --adopt a folder or s3:// prefix "
            "of WebDataset tars."
        ),
    ],
    out: Out,
    split: Annotated[
        str | None,
        typer.Option(
            help="`train=.8,query=.1,database=.1` (stratified), `folder` (top folder), or `column:NAME`.",
            metavar="SPLIT",
        ),
    ] = None,
    path_column: Annotated[str, typer.Option(help="Column of a table that holds the paths.")] = "path",
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of a table that holds a label; repeatable; default label*. With --adopt a field of the JSON "
            "members; default the cls member, else labels or label of the JSON."
        ),
    ] = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="Take no label from a table or a tar.")] = False,
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Index the .tar files directly in SOURCE as they are: where they lie if --out is SOURCE, else as "
            "unchanged copies. Samples that cannot be taken are named with a reason.",
        ),
    ] = False,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="With --adopt: a file that names the classes, line n the class n from 0; default their numbers.",
            metavar="FILE",
        ),
    ] = None,
    keys_by_tar: Annotated[
        bool,
        typer.Option("--keys-by-tar", help="With --adopt: put a tar's name before its keys, if tars share keys."),
    ] = False,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Turn images into WebDataset shards, byte for byte, with their index; or index shards that others wrote.

    Example: hhnet ingest photos/ --out shards --split train=.8,query=.1,database=.1

    Example: hhnet ingest --adopt s3://bucket/wds --out s3://bucket/wds --classes names.txt
    """
    labels = [] if unlabelled else label
    settings = _configure(config, sets)
    if adopt:
        from pipelines.intake.adopt import Adoption, read_class_names
        from pipelines.intake.adopt import adopt as index_foreign

        if split is not None or path_column != "path":
            raise UsageError("--adopt takes tars as they are: it cannot be given with --split or --path-column")
        fields = None if labels is None else tuple(labels)
        how = Adoption(fields, read_class_names(classes) if classes else None, keys_by_tar)
        return index_foreign(source, out, how)
    if classes is not None or keys_by_tar:
        raise UsageError("--classes and --keys-by-tar belong to --adopt")
    from pipelines.ingest import ingest as work

    return work(source, out, settings, split=split, path_column=path_column, label_columns=labels)


@verb(app, "train")
def train(
    shards: Annotated[str, typer.Option("--shards", help="Shards to learn from.", metavar="URI")],
    out: Out,
    val: Annotated[str | None, typer.Option("--val", help="Shards to validate on.", metavar="URI")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", min=1)] = None,
    bits: Annotated[int | None, typer.Option(help="Length of the codes.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm name, or alexnet.")] = None,
    loss: Annotated[str | None, typer.Option(help="hyp2, csq, orthohash, dpsh or hashnet.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Train a hashing network on shards; the same command resumes after a kill.

    Example: hhnet train --shards shards/train --out model --workers 2 --epochs 20 --set data.image_size=32
    """
    settings = _configure(
        config,
        sets,
        train__workers=workers,
        train__epochs=epochs,
        train__loss=loss,
        model__bits=bits,
        model__backbone=backbone,
    )
    submitted = submit(settings, ["train"], {"--shards": shards, "--out": out, "--val": val})
    if submitted is not None:
        return submitted
    from pipelines.train import train as work

    return work(shards, out, settings, val=val)


@verb(app, "encode")
def encode(
    shards: Annotated[str, typer.Option("--shards", help="Shards to encode.", metavar="URI")],
    model: Annotated[str, typer.Option("--model", help="The model artifact.", metavar="URI")],
    out: Out,
    workers: Annotated[int | None, typer.Option(help="Encoding processes.", min=1)] = None,
    allow_degraded: Annotated[
        bool,
        typer.Option("--allow-degraded", help="Publish although too many samples were rejected (exit 4)."),
    ] = False,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Encode shards to packed codes in Parquet; a rerun does only what is missing.

    Example: hhnet encode --shards shards/database --model model --out codes/database
    """
    settings = _configure(config, sets, encode__workers=workers)
    words = ["encode", *(["--allow-degraded"] if allow_degraded else [])]
    submitted = submit(settings, words, {"--shards": shards, "--model": model, "--out": out})
    if submitted is not None:
        return submitted
    from pipelines.encode import encode as work

    return work(shards, model, out, settings, allow_degraded=allow_degraded)


@verb(app, "retry-rejects")
def retry_rejects(
    codes: Annotated[str, typer.Option("--codes", help="The codes artifact.", metavar="URI")],
    shards: Annotated[str | None, typer.Option("--shards", help="Where its shards lie now.", metavar="URI")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where its model lies now.", metavar="URI")] = None,
    workers: Annotated[int | None, typer.Option(help="Encoding processes.", min=1)] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Encode shards with rejects again after the cause is gone, and publish the next version of the codes.

    Example: hhnet retry-rejects --codes codes/database
    """
    settings = _configure(config, sets, encode__workers=workers)
    flags = {"--codes": codes, "--shards": shards, "--model": model}
    submitted = submit(settings, ["retry-rejects"], flags)
    if submitted is not None:
        return submitted
    from pipelines.retry import retry_rejects as work

    return work(codes, settings, shards=shards, model=model)


@verb(app, "gc")
def gc(
    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")],
    older_than: Annotated[
        str, typer.Option(help="Grace period; longer than any run that may be writing there.", metavar="24h")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, say what would be.")] = False,
) -> Result:
    """Delete what no version of an artifact refers to: parts of lost attempts, old checkpoints, temporary files.

    Example: hhnet gc codes/database --dry-run
    """
    from pipelines.gc import gc as work

    return work(uri, older_than=older_than, dry_run=dry_run)


@verb(app, "verify")
def verify(
    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")],
    shards: Annotated[str | None, typer.Option("--shards", help="Where its shards lie now.", metavar="URI")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where its model lies now.", metavar="URI")] = None,
) -> Result:
    """Prove an artifact from its bytes alone: digests, counts, schema, conservation.

    Example: hhnet verify codes/database
    """
    from pipelines.verify import verify as work

    return work(uri, shards=shards, model=model)


@verb(index_app, "build")
def index_build(
    codes: Codes,
    out: Out,
    kind: Annotated[str | None, typer.Option(help="flat or multihash (both exact), or ivf.")] = None,
    workers: Annotated[int | None, typer.Option(help="Parts built side by side.", min=1)] = None,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Make it version 1, through the gate.")
    ] = True,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Build a sharded index over codes and publish it as version 1.

    Example: hhnet index build --codes codes/train --codes codes/database --out index
    """
    settings = _configure(config, sets, index__kind=kind, index__workers=workers)
    words = ["index", "build", *([] if publish else ["--no-publish"])]
    submitted = submit(settings, words, {"--codes": list(codes), "--out": out})
    if submitted is not None:
        return submitted
    from pipelines.index import build_index as work

    return work(codes, out, settings, publish=publish)


@verb(app, "search")
def search(
    index: Annotated[str, typer.Option("--index", help="The index artifact.", metavar="URI")],
    image: Annotated[list[str] | None, typer.Option("--image", help="An image file; repeatable.", metavar="F")] = None,
    key: Annotated[list[str] | None, typer.Option("--key", help="The key of an indexed sample.", metavar="K")] = None,
    code: Annotated[list[str] | None, typer.Option("--code", help="A packed code in hex.", metavar="HEX")] = None,
    codes: Annotated[
        list[str] | None, typer.Option("--codes", help="Codes, all of them queries.", metavar="URI")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="Neighbours per query.", min=1)] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the model lies now.", metavar="URI")] = None,
    shards: Annotated[
        list[str] | None, typer.Option("--shards", help="Where the shards lie now.", metavar="URI")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write a page with the pictures.", metavar="FILE")] = None,
    version_: Annotated[int | None, typer.Option("--version", help="A published version; default the newest.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Find the nearest codes; equal distances are ordered by id.

    Example: hhnet search --index index --image cat.jpg -k 10 --html found.html
    """
    if not (image or key or code or codes):
        raise UsageError("nothing to search for: give --image, --key, --code or --codes")
    from pipelines.search import search as work

    return work(
        index,
        _configure(config, sets, search__k=k),
        images=image or (),
        keys=key or (),
        codes=codes or (),
        hex_codes=code or (),
        version=version_,
        model=model,
        shards=shards or (),
        html=html,
    )


@verb(app, "evaluate")
def evaluate(
    queries: Annotated[str, typer.Option("--queries", help="Codes of the queries.", metavar="URI")],
    database: Annotated[list[str], typer.Option("--database", help="Codes searched in; repeatable.", metavar="URI")],
    out: Out,
    at: Annotated[int | None, typer.Option(help="mAP@K; default the whole ranking.", min=1)] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Measure mAP and curves, and write a self-contained report with a gallery.

    Example: hhnet evaluate --queries codes/query --database codes/database --out report
    """
    from pipelines.evaluate import evaluate as work

    return work(queries, database, out, _configure(config, sets, evaluate__at=at))


@app.callback(invoke_without_command=True)
def _root(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show:
        sys.stdout.write(f"hhnet {version('hhnet')}\n")
        raise typer.Exit(0)


def build_app() -> typer.Typer:
    """The whole command tree, with the verbs that other packages contribute."""
    names = {command.name for command in app.registered_commands}
    for entry in sorted(entry_points(group="hhnet.verbs"), key=lambda entry: entry.name):
        if entry.name not in names:
            verb(app, entry.name)(entry.load())
    return app


app.add_typer(index_app, name="index")
