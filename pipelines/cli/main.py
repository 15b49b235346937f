"""The command line: one function per verb.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once. Verbs of other packages come through the entry-point group `hhnet.verbs`.
"""

import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.index import index_app
from pipelines.cli.study import study
from pipelines.cli.verb import Codes, ConfigFile, Out, Result, Sets, configure, verb
from pipelines.cluster.submit import submit
from pipelines.config.recipes import recipe_names
from pipelines.errors import UsageError

app = typer.Typer(
    name="hhnet",
    help="Learn compact binary codes for images, encode a corpus on Ray, and search it by Hamming distance.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@verb(app, "ingest")
def ingest(
    out: Out,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder, zip or tar of class folders; a CSV or Parquet table; with --adopt a folder or s3:// prefix "
            "of WebDataset tars, one tar or t-{000..012}.tar; none with --protocol."
        ),
    ] = None,
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
    label_separator: Annotated[
        str | None,
        typer.Option(
            "--label-separator", help="Of several labels in one cell of a table, such as a bar.", metavar="TEXT"
        ),
    ] = None,
    multi_hot: Annotated[
        bool, typer.Option("--multi-hot", help="Each --label column of a table is a class, with 1 and 0 in its cells.")
    ] = False,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Take no label, of whatever source; stray pictures are taken too.")
    ] = False,
    class_from: Annotated[
        str | None,
        typer.Option(
            help="`first`: the class is the first folder below SOURCE, or below that of a split (default); `parent`: "
            "the folder that holds the picture.",
            metavar="first|parent",
        ),
    ] = None,
    allow_degraded: Annotated[
        bool,
        typer.Option("--allow-degraded", help="Publish although too many pictures cannot be taken (exit 4)."),
    ] = False,
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
    image_member: Annotated[
        str | None,
        typer.Option(
            "--image-member",
            help="With --adopt: what follows the key in the name of the image, such as input.jpg; default the one "
            "member with the suffix of an image.",
            metavar="SUFFIX",
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option("--protocol", help="A split of the field in docs/protocols.md, such as cifar10.", metavar="NAME"),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            "--root",
            help="Folder below which the paths of a table lie, default the table's own; with --protocol the folder of "
            "its data set's files.",
            metavar="DIR",
        ),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Of a CSV, such as cp1252; default UTF-8.", metavar="NAME")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Turn images into WebDataset shards, byte for byte, with their index; or index shards that others wrote.

    Example: hhnet ingest photos/ --out shards --split train=.8,query=.1,database=.1

    Example: hhnet ingest --adopt s3://bucket/wds --out s3://bucket/wds --classes names.txt

    Example: hhnet ingest --protocol cifar10 --root cifar-10-batches-bin --out shards
    """
    labels = [] if unlabelled else label
    rule = _class_rule(class_from, unlabelled)
    settings = configure(config, sets)
    if protocol is not None or (root is not None and source is None):
        if protocol is None or root is None:
            raise UsageError("--protocol NAME and --root DIR go together; with a table give SOURCE")
        of_tables = encoding or label_separator or multi_hot or labels is not None or path_column != "path"
        if source or split or adopt or of_tables or classes or keys_by_tar or image_member or rule:
            raise UsageError("--protocol says what is read and how it is split: give it with --root and --out alone")
        from pipelines.ingest.ingest import ingest as work
        from pipelines.ingest.protocols import find_protocol

        return work(root, out, settings, protocol=find_protocol(protocol))
    if source is None:
        raise UsageError("nothing to ingest: give SOURCE, or --protocol and --root")
    if adopt:
        from pipelines.ingest.adopt import Adoption, read_class_names
        from pipelines.ingest.adopt import adopt as index_foreign

        if split is not None or path_column != "path" or rule:
            raise UsageError(
                "--adopt takes tars as they are: it cannot be given with --split, --path-column or --class-from"
            )
        if root is not None or encoding is not None or label_separator is not None or multi_hot:
            raise UsageError("--root, --encoding, --label-separator and --multi-hot are for tables, not for --adopt")
        fields = None if labels is None else tuple(labels)
        how = Adoption(fields, read_class_names(classes) if classes else None, keys_by_tar, image_member)
        return index_foreign(source, out, how, settings, allow_degraded)
    if classes is not None or keys_by_tar or image_member is not None:
        raise UsageError("--classes, --keys-by-tar and --image-member belong to --adopt")
    from pipelines.ingest.ingest import ingest as work

    if label_separator == "" or (label_separator and multi_hot):
        raise UsageError("--label-separator is the text between two labels in a cell; --multi-hot goes without it")
    return work(
        source,
        out,
        settings,
        split=split,
        path_column=path_column,
        label_columns=labels,
        class_from=rule,
        allow_degraded=allow_degraded,
        table_root=root,
        encoding=encoding,
        label_separator=label_separator,
        multi_hot=multi_hot,
    )


def _class_rule(text: str | None, unlabelled: bool) -> Literal["first", "parent"] | None:
    if text is not None and unlabelled:
        raise UsageError("--class-from says which folder is the class, and --unlabelled takes none: give one of them")
    if text is None:
        return None
    if text == "first":
        return "first"
    if text == "parent":
        return "parent"
    raise UsageError(f"--class-from {text!r} is not known: give first or parent")


@verb(app, "train")
def train(
    out: Out,
    shards: Annotated[
        str | None,
        typer.Option("--shards", help="Shards to learn from; with --rotate where those lie now.", metavar="URI"),
    ] = None,
    val: Annotated[str | None, typer.Option("--val", help="Shards to validate on.", metavar="URI")] = None,
    workers: Annotated[int | None, typer.Option(help="Training processes.", min=1)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", min=1)] = None,
    bits: Annotated[int | None, typer.Option(help="Length of the codes.")] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm name, or alexnet.")] = None,
    loss: Annotated[str | None, typer.Option(help="A name in docs/losses.md, such as orthohash.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Settings to start from, see docs/recipes.md: {', '.join(recipe_names())}.", metavar="NAME"),
    ] = None,
    rotate: Annotated[
        str | None,
        typer.Option(
            "--rotate",
            help="Train nothing: give a trained model another hash layer, by h2q, itq, lsh, pca, pca-itq or classes.",
            metavar="METHOD",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="With --rotate: the trained model.", metavar="URI")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Train a hashing network on shards; the same command resumes after a kill.

    Example: hhnet train --shards shards/train --out model --workers 2 --epochs 20 --set data.image_size=32

    Example: hhnet train --recipe scratch32 --shards shards/train --out model --epochs 50

    Example: hhnet train --rotate h2q --model model --out model-h2q
    """
    settings = configure(
        config,
        sets,
        train__recipe=recipe,
        train__workers=workers,
        train__epochs=epochs,
        train__loss=loss,
        train__rotate=rotate,
        model__bits=bits,
        model__backbone=backbone,
    )
    if model is not None or rotate is not None:
        if model is None or rotate is None:
            raise UsageError("--rotate METHOD and --model URI go together")
        if val is not None:
            raise UsageError("--val has no part in --rotate: the model is validated on what it was validated on before")
        flags = {"--rotate": rotate, "--model": model, "--shards": shards, "--out": out}
        submitted = submit(settings, ["train"], flags)
        if submitted is not None:
            return submitted
        from pipelines.train.rehead import rotate as turn

        return turn(model, out, settings, shards=shards)
    if shards is None:
        raise UsageError("nothing to learn from: give --shards")
    submitted = submit(settings, ["train"], {"--shards": shards, "--out": out, "--val": val})
    if submitted is not None:
        return submitted
    from pipelines.train.train import train as work

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
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Try two shards, put nothing, and say how long it would take and what binds."),
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(help="With --dry-run: what a worker costs an hour, to say what it all costs.", min=0),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Encode shards to packed codes in Parquet; a rerun does only what is missing.

    Example: hhnet encode --shards shards/database --model model --out codes/database

    Example: hhnet encode --shards shards/database --model model --out codes/database --dry-run --price 2.50
    """
    if price is not None and not dry_run:
        raise UsageError("--price has a meaning only with --dry-run")
    if allow_degraded and dry_run:
        raise UsageError("--allow-degraded has no meaning with --dry-run, which publishes nothing")
    settings = configure(config, sets, encode__workers=workers)
    words = ["encode", *(["--allow-degraded"] if allow_degraded else []), *(["--dry-run"] if dry_run else [])]
    flags = {"--shards": shards, "--model": model, "--out": out, "--price": None if price is None else str(price)}
    submitted = submit(settings, words, flags)
    if submitted is not None:
        return submitted
    if dry_run:
        from pipelines.encode.preflight import preflight

        return preflight(shards, model, out, settings, price=price)
    from pipelines.encode.encode import encode as work

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
    settings = configure(config, sets, encode__workers=workers)
    flags = {"--codes": codes, "--shards": shards, "--model": model}
    submitted = submit(settings, ["retry-rejects"], flags)
    if submitted is not None:
        return submitted
    from pipelines.encode.retry_rejects import retry_rejects as work

    return work(codes, settings, shards=shards, model=model)


@verb(app, "gc")
def gc(
    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")],
    older_than: Annotated[
        str, typer.Option(help="Grace period; longer than any run that may be writing there.", metavar="24h")
    ] = "24h",
    keep: Annotated[
        int | None, typer.Option(help="Keep only the last N versions; default all of them.", min=1, metavar="N")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Delete nothing, say what would be.")] = False,
) -> Result:
    """Delete what no version of an artifact refers to: parts of lost attempts, old checkpoints, unfinished uploads.

    Example: hhnet gc codes/database --dry-run

    Example: hhnet gc index --keep 7
    """
    from pipelines.verify.gc import gc as work

    return work(uri, older_than=older_than, dry_run=dry_run, keep=keep)


@verb(app, "verify")
def verify(
    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")],
    shards: Annotated[str | None, typer.Option("--shards", help="Where its shards lie now.", metavar="URI")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where its model lies now.", metavar="URI")] = None,
    for_run: Annotated[
        str | None,
        typer.Option(
            "--for-run",
            help="The --out of a run: as the run does, read on Ray only the tars of these shards that were not proven "
            "before, at most run.verify of all, and name damage instead of failing.",
            metavar="URI",
        ),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Prove an artifact from its bytes alone: digests, counts, schema, conservation.

    Example: hhnet verify codes/database
    """
    settings = configure(config, sets)
    if for_run is not None:
        if shards or model:
            raise UsageError("--for-run proves shards, which have no inputs: it cannot be given with --shards, --model")
        from pipelines.verify.verify import verify_tars

        sent = submit(settings, ["verify", uri], {"--for-run": for_run})
        return sent or verify_tars(uri, for_run, settings)
    from pipelines.verify.verify import verify as work

    return work(uri, shards=shards, model=model)


def _in_words(result: Result) -> str:
    from pipelines.verify.status.words import describe

    return describe(result)


@verb(app, "status", shown=_in_words)
def status(
    uri: Annotated[str, typer.Argument(help="The --out of a verb or study, or run.out.", metavar="URI")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again every few seconds until it is done.")] = False,
) -> Result:
    """Say how far the work at a root is, from the store alone: done, rate, time left, slow shards, rejects, the run.

    Example: hhnet status codes/database --watch

    Example: hhnet status s3://bucket/run --json
    """
    from pipelines.verify.status import status as work

    return work(uri, watch=watch)


@verb(app, "plan")
def plan(
    shards: Annotated[list[str] | None, typer.Option("--shards", help="Shards; repeatable.", metavar="URI")] = None,
    codes: Annotated[
        list[str] | None,
        typer.Option("--codes", help="Their codes, as far as there are any; repeatable.", metavar="URI"),
    ] = None,
    index: Annotated[str | None, typer.Option("--index", help="The index over them.", metavar="URI")] = None,
) -> Result:
    """Say what is new, changed or gone between shards, their codes and an index, and which commands mend it.

    Example: hhnet plan --shards shards/photos --shards shards/tonight --codes codes/photos --index index
    """
    if not (shards or codes):
        raise UsageError("nothing to compare: give --shards or --codes")
    from pipelines.index.diff import plan as work

    return work(shards or (), codes or (), index)


@verb(app, "search")
def search(
    index: Annotated[str, typer.Option("--index", help="The index, or an alias of it.", metavar="URI")],
    image: Annotated[list[str] | None, typer.Option("--image", help="An image file; repeatable.", metavar="F")] = None,
    key: Annotated[list[str] | None, typer.Option("--key", help="A sample, by key or path.", metavar="K")] = None,
    code: Annotated[list[str] | None, typer.Option("--code", help="A packed code in hex.", metavar="HEX")] = None,
    codes: Annotated[
        list[str] | None, typer.Option("--codes", help="Codes, all of them queries.", metavar="URI")
    ] = None,
    k: Annotated[int | None, typer.Option("-k", help="Neighbours per query.", min=1)] = None,
    rerank: Annotated[
        int | None, typer.Option("--rerank", help="Order the nearest N by their logits.", min=1, metavar="N")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Where the model lies now.", metavar="URI")] = None,
    shards: Annotated[
        list[str] | None, typer.Option("--shards", help="Where the shards lie now.", metavar="URI")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write a page with the pictures.", metavar="FILE")] = None,
    version_: Annotated[int | None, typer.Option("--version", help="A published version; default the newest.")] = None,
    workers: Annotated[int | None, typer.Option(help="Spread the parts over Ray actors.", min=1)] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Search on the GPU (kind flat), for many queries.")] = False,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Find the nearest codes; equal distances are ordered by id.

    Example: hhnet search --index index --image cat.jpg -k 10 --html found.html

    Example: hhnet search --index index --image cat.jpg -k 10 --rerank 200

    Example: hhnet search --index index --codes codes/query --gpu --json
    """
    if not (image or key or code or codes):
        raise UsageError("nothing to search for: give --image, --key, --code or --codes")
    from pipelines.search.search import search as work

    return work(
        index,
        configure(
            *(config, sets),
            search__k=k,
            search__workers=workers,
            search__device="cuda" if gpu else None,
            search__rerank=rerank,
        ),
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
    convention: Annotated[
        str | None, typer.Option(help="Compute mAP as this code base does: docs/how-to-compare.md.", metavar="NAME")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Measure mAP and curves, and write a self-contained report with a gallery.

    Example: hhnet evaluate --queries codes/query --database codes/database --out report

    Example: hhnet evaluate --queries codes/query --database codes/database --out report --convention hashnet --at 1000
    """
    from pipelines.evaluate.conventions import convention_settings
    from pipelines.evaluate.evaluate import evaluate as work

    named = convention_settings(convention) if convention else {}
    return work(queries, database, out, configure(config, sets, **{"evaluate.at": at, **named}))


@verb(app, "dedupe")
def dedupe(
    codes: Codes,
    out: Out,
    radius: Annotated[
        int | None, typer.Option(help="Bits in which the codes of a pair may differ; default 0.", min=0)
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="An index: find also what is near its samples.", metavar="URI")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Most memory of the search; default 1GiB.", metavar="4GiB")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Find near-duplicates: all pairs within a radius, and the components that they join, of which one can be kept.

    Example: hhnet dedupe --codes codes/train --codes codes/database --radius 3 --out duplicates

    Example: hhnet dedupe --codes codes/tonight --against index --radius 3 --out duplicates
    """
    from pipelines.dedupe.dedupe import dedupe as work

    return work(codes, out, configure(config, sets, dedupe__radius=radius, dedupe__memory=memory), against=against)


@verb(app, "agreement")
def agreement(
    old: Annotated[str, typer.Option("--old", help="Codes of the old model.", metavar="URI")],
    new: Annotated[str, typer.Option("--new", help="Codes of the new model, of the same shards.", metavar="URI")],
    out: Out,
    config: ConfigFile = None,
    sets: Sets = None,
) -> Result:
    """Report how far two codes of the same samples agree on their neighbours.

    Example: hhnet agreement --old codes/v1 --new codes/v2 --out reports/v1-v2
    """
    from pipelines.evaluate.agreement import agreement as work

    return work(old, new, out, configure(config, sets))


@verb(app, "alias")
def alias(
    alias_: Annotated[str, typer.Option("--alias", help="Root of the alias.", metavar="URI")],
    to: Annotated[str | None, typer.Option("--to", help="The published index to stand for.", metavar="URI")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Stand for the index before again.")] = False,
) -> Result:
    """Name an index that `search --index` follows, switch it in one step, or show what it stood for.

    Example: hhnet alias --alias photos --to index/v2

    Example: hhnet alias --alias photos --rollback
    """
    if to is not None and rollback:
        raise UsageError("--to and --rollback exclude each other")
    from pipelines.index.alias import alias_history, rollback_alias, set_alias

    if rollback:
        return rollback_alias(alias_)
    return set_alias(alias_, to) if to is not None else alias_history(alias_)


@verb(app, "export")
def export(
    model: Annotated[str, typer.Option("--model", help="The model artifact.", metavar="URI")],
    out: Annotated[str, typer.Option("--out", help="The local file to write.", metavar="FILE.onnx")],
    onnx: Annotated[bool, typer.Option("--onnx", help="As ONNX, the only format and so the default.")] = True,
    batch: Annotated[int | None, typer.Option(help="Images in a batch; default any number.", min=1)] = None,
    check_images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to check on; default the model's training images.", metavar="DIR"),
    ] = None,
) -> Result:
    """Write a model as one ONNX file, from uint8 images to packed codes, after it agreed with torch on real images.

    Example: hhnet export --onnx --model model --out model.onnx
    """
    from pipelines.export.onnx import export as work

    return work(model, out, batch=batch, images=check_images)


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


verb(app, "study")(study)
app.add_typer(index_app, name="index")
