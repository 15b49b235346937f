"""Flags of the verbs with many flags, or with flags that stand for settings; those of `hhnet index` are in `index`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.verb import CodesOption, Flags, Main, OutOption, Setting
from pipelines.config.recipes import recipe_names


@dataclass(frozen=True, kw_only=True)
class IngestFlags(Flags):
    """Flags of `hhnet ingest`."""

    out: OutOption
    source: Annotated[
        str | None,
        typer.Argument(
            help="Images to ingest: a folder, zip or tar of class folders, or a CSV or Parquet table. With --adopt: a "
            "folder or s3:// prefix of WebDataset tars, one tar, or t-{000..012}.tar. Leave out with --protocol.",
            metavar="SOURCE",
        ),
    ] = None
    split: Annotated[
        str | None,
        typer.Option(
            help="Write several artifacts below --out: `train=.8,query=.1,database=.1` = random shares of each class; "
            "`folder` = one per top folder; `column:NAME` = one per value of a table's column.",
            metavar="SPLIT",
        ),
    ] = None
    path_column: Annotated[str, typer.Option(help="Table column that holds the image paths.")] = "path"
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="Table column that holds a label; repeatable; default: label*. With --adopt: field of the JSON "
            "members; default: the cls member, else the JSON's labels or label."
        ),
    ] = None
    label_separator: Annotated[
        str | None, typer.Option(help="Text between the labels in one cell of a table, such as a bar.", metavar="TEXT")
    ] = None
    multi_hot: Annotated[
        bool, typer.Option("--multi-hot", help="Take each --label column as a class, with 1 or 0 in its cells.")
    ] = False
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore all labels; take images outside class folders too.")
    ] = False
    class_from: Annotated[
        str | None,
        typer.Option(
            help="Folder that names an image's class: `first` = the first below SOURCE, or below the split's folder "
            "(default); `parent` = the one that holds the image.",
            metavar="first|parent",
        ),
    ] = None
    allow_degraded: Annotated[
        bool,
        typer.Option("--allow-degraded", help="Publish even if too many images cannot be used (exit 4)."),
    ] = False
    adopt: Annotated[
        bool,
        typer.Option(
            "--adopt",
            help="Index the .tar files that lie directly in SOURCE without changing them: in place if --out is SOURCE, "
            "else as copies. Samples that cannot be used are listed with a reason.",
        ),
    ] = False
    classes: Annotated[
        Path | None,
        typer.Option(
            help="With --adopt: text file of class names, one per line, class 0 first; default: the numbers.",
            metavar="FILE",
        ),
    ] = None
    keys_by_tar: Annotated[
        bool,
        typer.Option(
            "--keys-by-tar", help="With --adopt: prefix keys with their tar's name, for tars that share keys."
        ),
    ] = False
    image_member: Annotated[
        str | None,
        typer.Option(
            help="With --adopt: suffix of the image's member after the key, such as input.jpg; "
            "default: the only member with an image's suffix.",
            metavar="SUFFIX",
        ),
    ] = None
    protocol: Annotated[
        str | None,
        typer.Option(help="Known data set and its split, such as cifar10: docs/protocols.md.", metavar="NAME"),
    ] = None
    root: Annotated[
        str | None,
        typer.Option(
            help="Folder that a table's paths start from; default: the table's own folder. With "
            "--protocol: the folder with the data set's files.",
            metavar="DIR",
        ),
    ] = None
    encoding: Annotated[
        str | None, typer.Option(help="Text encoding of a CSV, such as cp1252; default: UTF-8.", metavar="NAME")
    ] = None


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Flags):
    """Flags of `hhnet train`."""

    out: OutOption
    shards: Annotated[
        str | None,
        typer.Option(help="Shards to train on. With --rotate: where they lie now, if moved.", metavar="URI"),
        Main("SHARDS"),
    ] = None
    val: Annotated[
        str | None, typer.Option(help="Shards to validate on; default: a seeded share of --shards.", metavar="URI")
    ] = None
    workers: Annotated[int | None, typer.Option(help="Training processes.", min=1), Setting("train.workers")] = None
    epochs: Annotated[int | None, typer.Option(help="Passes over the samples.", min=1), Setting("train.epochs")] = None
    bits: Annotated[int | None, typer.Option(help="Code length, a multiple of 8."), Setting("model.bits")] = None
    backbone: Annotated[
        str | None, typer.Option(help="A timm name, or alexnet.", metavar="NAME"), Setting("model.backbone")
    ] = None
    loss: Annotated[
        str | None, typer.Option(help="A loss of docs/losses.md.", metavar="NAME"), Setting("train.loss")
    ] = None
    recipe: Annotated[
        str | None,
        typer.Option(help=f"Preset to start from, see docs/recipes.md: {', '.join(recipe_names())}.", metavar="NAME"),
        Setting("train.recipe"),
    ] = None
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Train nothing: replace a trained model's hash layer, by h2q, itq, lsh, pca, pca-itq or classes.",
            metavar="METHOD",
        ),
        Setting("train.rotate"),
    ] = None
    model: Annotated[str | None, typer.Option(help="With --rotate: the trained model.", metavar="URI")] = None


@dataclass(frozen=True, kw_only=True)
class EncodeFlags(Flags):
    """Flags of `hhnet encode`."""

    shards: Annotated[str, typer.Option(help="Shards to encode.", metavar="URI"), Main("SHARDS")]
    model: Annotated[str, typer.Option(help="Model to encode with.", metavar="URI")]
    out: OutOption
    workers: Annotated[
        int | None,
        typer.Option(help="Encoding processes; default: one per GPU, else per CPU.", min=1),
        Setting("encode.workers"),
    ] = None
    allow_degraded: Annotated[
        bool,
        typer.Option("--allow-degraded", help="Publish even if too many samples were rejected (exit 4)."),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Try two shards, write nothing; estimate the time and name the bottleneck."),
    ] = False
    price: Annotated[
        float | None,
        typer.Option(help="With --dry-run: price of a worker per hour, to estimate the total.", min=0),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RetryFlags(Flags):
    """Flags of `hhnet retry-rejects`."""

    codes: Annotated[str, typer.Option(help="Codes with rejects.", metavar="URI"), Main("CODES")]
    shards: Annotated[str | None, typer.Option(help="Where its shards lie now, if moved.", metavar="URI")] = None
    model: Annotated[str | None, typer.Option(help="Where its model lies now, if moved.", metavar="URI")] = None
    workers: Annotated[
        int | None,
        typer.Option(help="Encoding processes; default: one per GPU, else per CPU.", min=1),
        Setting("encode.workers"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(Flags):
    """Flags of `hhnet verify`."""

    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")]
    shards: Annotated[str | None, typer.Option(help="Where its shards lie now, if moved.", metavar="URI")] = None
    model: Annotated[str | None, typer.Option(help="Where its model lies now, if moved.", metavar="URI")] = None
    for_run: Annotated[
        str | None,
        typer.Option(
            help="Verify shards as `hhnet run` does, for the run with this --out: on Ray, only tars "
            "not verified before, at most a share of run.verify; damage is listed and does not "
            "fail.",
            metavar="URI",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SearchFlags(Flags):
    """Flags of `hhnet search`."""

    index: Annotated[str, typer.Option(help="Index to search, or an alias of it.", metavar="URI"), Main("INDEX")]
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="Queries: an image file, a folder, a quoted pattern such as 'photos/**/*.jpg', a URL or an "
            "s3:// object; repeatable.",
            metavar="F",
        ),
    ] = None
    key: Annotated[
        list[str] | None, typer.Option(help="Query: an indexed sample, by key or path; repeatable.", metavar="K")
    ] = None
    code: Annotated[list[str] | None, typer.Option(help="Query: a packed code in hex; repeatable.", metavar="HEX")] = (
        None
    )
    codes: Annotated[
        list[str] | None, typer.Option(help="Queries: all codes of this artifact; repeatable.", metavar="URI")
    ] = None
    k: Annotated[int | None, typer.Option("-k", help="Neighbours per query.", min=1), Setting("search.k")] = None
    rerank: Annotated[
        int | None,
        typer.Option(help="Re-rank the nearest N by their real codes.", min=1, metavar="N"),
        Setting("search.rerank"),
    ] = None
    model: Annotated[str | None, typer.Option(help="Where the model lies now, if moved.", metavar="URI")] = None
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Shards with pictures for --html, beside those that are known; repeatable.", metavar="URI"),
    ] = None
    html: Annotated[str | None, typer.Option(help="Write the answer as a page with pictures.", metavar="FILE")] = None
    version_: Annotated[
        int | None, typer.Option("--version", help="Published version to search; default: the newest.")
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(help="Ray actors that share the parts; default: none.", min=1),
        Setting("search.workers"),
    ] = None
    gpu: Annotated[bool, typer.Option("--gpu", help="Search a flat index on the GPU; pays off for many queries.")] = (
        False
    )

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for; --gpu names the device."""
        return {**super().settings(), "search.device": "cuda" if self.gpu else None}


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(Flags):
    """Flags of `hhnet evaluate`."""

    queries: Annotated[str, typer.Option(help="Codes of the queries.", metavar="URI"), Main("QUERIES")]
    database: Annotated[list[str], typer.Option(help="Codes to search in; repeatable.", metavar="URI")]
    out: OutOption
    at: Annotated[
        int | None, typer.Option(help="K of mAP@K; default: the whole ranking.", min=1), Setting("evaluate.at")
    ] = None
    convention: Annotated[
        str | None,
        typer.Option(help="Compute mAP as this code base of the field does: docs/how-to-compare.md.", metavar="NAME"),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for; --convention stands for several."""
        from pipelines.evaluate.conventions import convention_settings

        return {**super().settings(), **(convention_settings(self.convention) if self.convention else {})}


@dataclass(frozen=True, kw_only=True)
class DedupeFlags(Flags):
    """Flags of `hhnet dedupe`."""

    codes: Annotated[CodesOption, Main("CODES")]
    out: OutOption
    radius: Annotated[
        int | None,
        typer.Option(help="Largest number of bits in which a pair differs.", min=0),
        Setting("dedupe.radius"),
    ] = None
    against: Annotated[
        str | None, typer.Option(help="Index whose samples are compared with the codes too.", metavar="URI")
    ] = None
    shards: Annotated[
        list[str] | None,
        typer.Option(help="Shards that the codes came from, if they were moved; repeatable.", metavar="URI"),
    ] = None
    same_code: Annotated[
        bool | None,
        typer.Option("--same-code", help="Drop also samples that only their codes say are duplicates."),
        Setting("dedupe.same_code"),
    ] = None
    memory: Annotated[
        str | None,
        typer.Option(help="Largest memory of the search.", metavar="4GiB"),
        Setting("dedupe.memory"),
    ] = None
