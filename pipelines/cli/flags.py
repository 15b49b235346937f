"""Flags of verbs that have many, or some that stand for settings; those of `hhnet index` are in `index`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.verb import CodesOption, Flags, OutOption, Setting
from pipelines.config.recipes import recipe_names


@dataclass(frozen=True, kw_only=True)
class IngestFlags(Flags):
    """Flags of `hhnet ingest`."""

    out: OutOption
    source: Annotated[
        str | None,
        typer.Argument(
            help="Folder, zip or tar of class folders; a CSV or Parquet table; with --adopt a folder or s3:// prefix "
            "of WebDataset tars, one tar or t-{000..012}.tar; none with --protocol."
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(
            help="`train=.8,query=.1,database=.1` (stratified), `folder` (top folder), or `column:NAME`.",
            metavar="SPLIT",
        ),
    ] = None
    path_column: Annotated[str, typer.Option(help="Column of a table that holds the paths.")] = "path"
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Column of a table that holds a label; repeatable; default label*. With --adopt a field of the JSON "
            "members; default the cls member, else labels or label of the JSON."
        ),
    ] = None
    label_separator: Annotated[
        str | None, typer.Option(help="Of several labels in one cell of a table, such as a bar.", metavar="TEXT")
    ] = None
    multi_hot: Annotated[
        bool, typer.Option("--multi-hot", help="Each --label column of a table is a class, with 1 and 0 in its cells.")
    ] = False
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Take no label, of whatever source; stray pictures are taken too.")
    ] = False
    class_from: Annotated[
        str | None,
        typer.Option(
            help="`first`: the class is the first folder below SOURCE, or below that of a split (default); `parent`: "
            "the folder that holds the picture.",
            metavar="first|parent",
        ),
    ] = None
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Publish although too many pictures cannot be taken (exit 4).")
    ] = False
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Index the .tar files directly in SOURCE as they are: where they lie if --out is SOURCE, else as "
            "unchanged copies. Samples that cannot be taken are named with a reason.",
        ),
    ] = False
    classes: Annotated[
        Path | None,
        typer.Option(
            help="With --adopt: a file that names the classes, line n the class n from 0; default their numbers.",
            metavar="FILE",
        ),
    ] = None
    keys_by_tar: Annotated[
        bool, typer.Option("--keys-by-tar", help="With --adopt: put a tar's name before its keys, if tars share keys.")
    ] = False
    image_member: Annotated[
        str | None,
        typer.Option(
            help="With --adopt: what follows the key in the name of the image, such as input.jpg; default the one "
            "member with the suffix of an image.",
            metavar="SUFFIX",
        ),
    ] = None
    protocol: Annotated[
        str | None, typer.Option(help="A split of the field in docs/protocols.md, such as cifar10.", metavar="NAME")
    ] = None
    root: Annotated[
        str | None,
        typer.Option(
            help="Folder below which the paths of a table lie, default the table's own; with --protocol the folder of "
            "its data set's files.",
            metavar="DIR",
        ),
    ] = None
    encoding: Annotated[str | None, typer.Option(help="Of a CSV, such as cp1252; default UTF-8.", metavar="NAME")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Flags):
    """Flags of `hhnet train`."""

    out: OutOption
    shards: Annotated[
        str | None, typer.Option(help="Shards to learn from; with --rotate where those lie now.", metavar="URI")
    ] = None
    val: Annotated[str | None, typer.Option(help="Shards to validate on.", metavar="URI")] = None
    workers: Annotated[int | None, typer.Option(help="Training processes.", min=1), Setting("train.workers")] = None
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", min=1), Setting("train.epochs")] = None
    bits: Annotated[int | None, typer.Option(help="Length of the codes."), Setting("model.bits")] = None
    backbone: Annotated[str | None, typer.Option(help="A timm name, or alexnet."), Setting("model.backbone")] = None
    loss: Annotated[
        str | None, typer.Option(help="A name in docs/losses.md, such as orthohash."), Setting("train.loss")
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Settings to start from, see docs/recipes.md: {', '.join(recipe_names())}.", metavar="NAME"),
        Setting("train.recipe"),
    ] = None
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Train nothing: give a trained model another hash layer, by h2q, itq, lsh, pca, pca-itq or classes.",
            metavar="METHOD",
        ),
        Setting("train.rotate"),
    ] = None
    model: Annotated[str | None, typer.Option(help="With --rotate: the trained model.", metavar="URI")] = None


@dataclass(frozen=True, kw_only=True)
class EncodeFlags(Flags):
    """Flags of `hhnet encode`."""

    shards: Annotated[str, typer.Option(help="Shards to encode.", metavar="URI")]
    model: Annotated[str, typer.Option(help="The model artifact.", metavar="URI")]
    out: OutOption
    workers: Annotated[int | None, typer.Option(help="Encoding processes.", min=1), Setting("encode.workers")] = None
    allow_degraded: Annotated[
        bool, typer.Option("--allow-degraded", help="Publish although too many samples were rejected (exit 4).")
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Try two shards, put nothing, and say how long it would take and what binds."),
    ] = False
    price: Annotated[
        float | None, typer.Option(help="With --dry-run: what a worker costs an hour, to say what it all costs.", min=0)
    ] = None


@dataclass(frozen=True, kw_only=True)
class RetryFlags(Flags):
    """Flags of `hhnet retry-rejects`."""

    codes: Annotated[str, typer.Option(help="The codes artifact.", metavar="URI")]
    shards: Annotated[str | None, typer.Option(help="Where its shards lie now.", metavar="URI")] = None
    model: Annotated[str | None, typer.Option(help="Where its model lies now.", metavar="URI")] = None
    workers: Annotated[int | None, typer.Option(help="Encoding processes.", min=1), Setting("encode.workers")] = None


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(Flags):
    """Flags of `hhnet verify`."""

    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")]
    shards: Annotated[str | None, typer.Option(help="Where its shards lie now.", metavar="URI")] = None
    model: Annotated[str | None, typer.Option(help="Where its model lies now.", metavar="URI")] = None
    for_run: Annotated[
        str | None,
        typer.Option(
            help="The --out of a run: as the run does, read on Ray only the tars of these shards that were not proven "
            "before, at most run.verify of all, and name damage instead of failing.",
            metavar="URI",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SearchFlags(Flags):
    """Flags of `hhnet search`."""

    index: Annotated[str, typer.Option(help="The index, or an alias of it.", metavar="URI")]
    image: Annotated[list[str] | None, typer.Option(help="An image file; repeatable.", metavar="F")] = None
    key: Annotated[list[str] | None, typer.Option(help="A sample, by key or path.", metavar="K")] = None
    code: Annotated[list[str] | None, typer.Option(help="A packed code in hex.", metavar="HEX")] = None
    codes: Annotated[list[str] | None, typer.Option(help="Codes, all of them queries.", metavar="URI")] = None
    k: Annotated[int | None, typer.Option("-k", help="Neighbours per query.", min=1), Setting("search.k")] = None
    rerank: Annotated[
        int | None,
        typer.Option(help="Order the nearest N by their logits.", min=1, metavar="N"),
        Setting("search.rerank"),
    ] = None
    model: Annotated[str | None, typer.Option(help="Where the model lies now.", metavar="URI")] = None
    shards: Annotated[list[str] | None, typer.Option(help="Where the shards lie now.", metavar="URI")] = None
    html: Annotated[str | None, typer.Option(help="Write a page with the pictures.", metavar="FILE")] = None
    version_: Annotated[int | None, typer.Option("--version", help="A published version; default the newest.")] = None
    workers: Annotated[
        int | None, typer.Option(help="Spread the parts over Ray actors.", min=1), Setting("search.workers")
    ] = None
    gpu: Annotated[bool, typer.Option("--gpu", help="Search on the GPU (kind flat), for many queries.")] = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for; --gpu names the device."""
        return {**super().settings(), "search.device": "cuda" if self.gpu else None}


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(Flags):
    """Flags of `hhnet evaluate`."""

    queries: Annotated[str, typer.Option(help="Codes of the queries.", metavar="URI")]
    database: Annotated[list[str], typer.Option(help="Codes searched in; repeatable.", metavar="URI")]
    out: OutOption
    at: Annotated[int | None, typer.Option(help="mAP@K; default the whole ranking.", min=1), Setting("evaluate.at")] = (
        None
    )
    convention: Annotated[
        str | None, typer.Option(help="Compute mAP as this code base does: docs/how-to-compare.md.", metavar="NAME")
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for; a convention fixes several of them."""
        from pipelines.evaluate.conventions import convention_settings

        return {**super().settings(), **(convention_settings(self.convention) if self.convention else {})}


@dataclass(frozen=True, kw_only=True)
class DedupeFlags(Flags):
    """Flags of `hhnet dedupe`."""

    codes: CodesOption
    out: OutOption
    radius: Annotated[
        int | None,
        typer.Option(help="Bits in which the codes of a pair may differ; default 0.", min=0),
        Setting("dedupe.radius"),
    ] = None
    against: Annotated[
        str | None, typer.Option(help="An index: find also what is near its samples.", metavar="URI")
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="Most memory of the search; default 1GiB.", metavar="4GiB"),
        Setting("dedupe.memory"),
    ] = None
