"""Flags of the verbs with many flags, or with flags that stand for settings; those of `hhnet index` are in `index`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.cli.help import Flag
from pipelines.cli.verb import CodesOption, Flags, Main, OutOption
from pipelines.config.recipes import recipe_names


@dataclass(frozen=True, kw_only=True)
class IngestFlags(Flags):
    """Flags of `hhnet ingest`."""

    out: OutOption
    source: Annotated[
        str | None,
        typer.Argument(
            help="Images to ingest: a folder, zip or tar of class folders, or a CSV or Parquet table of "
            "paths or URLs. With --adopt: a "
            "folder or s3:// prefix of WebDataset tars, one tar, or t-{000..012}.tar. Leave out with --protocol.",
            metavar="SOURCE",
        ),
    ] = None
    split: Annotated[
        str | None,
        Flag(
            "Write several artifacts below --out: `train=.8,query=.1,database=.1` = random shares of each class; "
            "`folder` = one per top folder; `column:NAME` = one per value of a table's column.",
            "SPLIT",
        ),
    ] = None
    path_column: Annotated[str, Flag("Table column that holds the image paths or URLs.")] = "path"
    label: Annotated[
        list[str] | None,
        Flag(
            "Table column that holds a label; repeatable; default: label*. With --adopt: field of the JSON "
            "members; default: the cls member, else the JSON's labels or label."
        ),
    ] = None
    label_separator: Annotated[
        str | None, Flag("Text between the labels in one cell of a table, such as a bar.", "TEXT")
    ] = None
    multi_hot: Annotated[bool, Flag("Take each --label column as a class, with 1 or 0 in its cells.")] = False
    unlabelled: Annotated[bool, Flag("Ignore all labels; take images outside class folders too.")] = False
    class_from: Annotated[
        str | None,
        Flag(
            "Folder that names an image's class: `first` = the first below SOURCE, or below the split's folder "
            "(default); `parent` = the one that holds the image.",
            "first|parent",
        ),
    ] = None
    allow_degraded: Annotated[bool, Flag("Publish even if too many images cannot be used (exit 4).")] = False
    adopt: Annotated[
        bool,
        Flag(
            "Index the .tar files that lie directly in SOURCE without changing them: in place if --out is SOURCE, "
            "else as copies. Samples that cannot be used are listed with a reason."
        ),
    ] = False
    classes: Annotated[
        Path | None,
        Flag("With --adopt: text file of class names, one per line, class 0 first; default: the numbers.", "FILE"),
    ] = None
    keys_by_tar: Annotated[bool, Flag("With --adopt: prefix keys with their tar's name, for tars that share keys.")] = (
        False
    )
    image_member: Annotated[
        str | None,
        Flag(
            "With --adopt: suffix of the image's member after the key, such as input.jpg; "
            "default: the only member with an image's suffix.",
            "SUFFIX",
        ),
    ] = None
    protocol: Annotated[
        str | None, Flag("Known data set and its split, such as cifar10: docs/protocols.md.", "NAME")
    ] = None
    root: Annotated[
        str | None,
        Flag(
            "Folder that a table's paths start from; default: the table's own folder. With "
            "--protocol: the folder with the data set's files.",
            "DIR",
        ),
    ] = None
    encoding: Annotated[str | None, Flag("Text encoding of a CSV, such as cp1252; default: UTF-8.", "NAME")] = None


@dataclass(frozen=True, kw_only=True)
class TrainFlags(Flags):
    """Flags of `hhnet train`."""

    out: OutOption
    shards: Annotated[
        str | None, Flag("Shards to train on. With --rotate: where they lie now, if moved.", "URI"), Main("SHARDS")
    ] = None
    val: Annotated[str | None, Flag("Shards to validate on; default: a seeded share of --shards.", "URI")] = None
    workers: Annotated[int | None, Flag("Training processes.", setting="train.workers", min=1)] = None
    epochs: Annotated[int | None, Flag("Passes over the samples.", setting="train.epochs", min=1)] = None
    bits: Annotated[int | None, Flag("Code length, a multiple of 8.", setting="model.bits")] = None
    backbone: Annotated[str | None, Flag("A timm name, or alexnet.", "NAME", setting="model.backbone")] = None
    loss: Annotated[str | None, Flag("A loss of docs/losses.md.", "NAME", setting="train.loss")] = None
    recipe: Annotated[
        str | None,
        Flag(
            f"Preset to start from, see docs/recipes.md: {', '.join(recipe_names())}.", "NAME", setting="train.recipe"
        ),
    ] = None
    rotate: Annotated[
        str | None,
        Flag(
            "Train nothing: replace a trained model's hash layer, by h2q, itq, lsh, pca, pca-itq or classes.",
            "METHOD",
            setting="train.rotate",
        ),
    ] = None
    model: Annotated[str | None, Flag("With --rotate: the trained model.", "URI")] = None


@dataclass(frozen=True, kw_only=True)
class EncodeFlags(Flags):
    """Flags of `hhnet encode`."""

    shards: Annotated[str, Flag("Shards to encode.", "URI"), Main("SHARDS")]
    model: Annotated[str, Flag("Model to encode with.", "URI")]
    out: OutOption
    workers: Annotated[
        int | None, Flag("Encoding processes; default: one per GPU, else per CPU.", setting="encode.workers", min=1)
    ] = None
    allow_degraded: Annotated[bool, Flag("Publish even if too many samples were rejected (exit 4).")] = False
    dry_run: Annotated[bool, Flag("Try two shards, write nothing; estimate the time and name the bottleneck.")] = False
    price: Annotated[
        float | None, Flag("With --dry-run: price of a worker per hour, to estimate the total.", min=0)
    ] = None


@dataclass(frozen=True, kw_only=True)
class RetryFlags(Flags):
    """Flags of `hhnet retry-rejects`."""

    codes: Annotated[str, Flag("Codes with rejects.", "URI"), Main("CODES")]
    shards: Annotated[str | None, Flag("Where its shards lie now, if moved.", "URI")] = None
    model: Annotated[str | None, Flag("Where its model lies now, if moved.", "URI")] = None
    workers: Annotated[
        int | None, Flag("Encoding processes; default: one per GPU, else per CPU.", setting="encode.workers", min=1)
    ] = None


@dataclass(frozen=True, kw_only=True)
class VerifyFlags(Flags):
    """Flags of `hhnet verify`."""

    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")]
    shards: Annotated[str | None, Flag("Where its shards lie now, if moved.", "URI")] = None
    model: Annotated[str | None, Flag("Where its model lies now, if moved.", "URI")] = None
    full: Annotated[bool, Flag("Read everything again, also what earlier verifications proved.")] = False
    sample: Annotated[
        float, Flag("Share of what was proven before to read again, longest ago first.", "SHARE", min=0, max=1)
    ] = 0.0
    for_run: Annotated[
        str | None,
        Flag(
            "Verify shards as `hhnet run` does, for the run with this --out: on Ray, only tars not verified before, at "
            "most a share of run.verify; damage is listed and does not fail.",
            "URI",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SearchFlags(Flags):
    """Flags of `hhnet search`."""

    index: Annotated[str, Flag("Index to search, or an alias of it.", "URI"), Main("INDEX")]
    image: Annotated[
        list[str] | None,
        Flag(
            "Queries: an image file, a folder, a quoted pattern such as 'photos/**/*.jpg', a URL or an "
            "s3:// object; repeatable.",
            "F",
        ),
    ] = None
    key: Annotated[list[str] | None, Flag("Query: an indexed sample, by key or path; repeatable.", "K")] = None
    code: Annotated[list[str] | None, Flag("Query: a packed code in hex; repeatable.", "HEX")] = None
    codes: Annotated[list[str] | None, Flag("Queries: all codes of this artifact; repeatable.", "URI")] = None
    k: Annotated[int | None, Flag("Neighbours per query.", names=("-k",), setting="search.k", min=1)] = None
    rerank: Annotated[
        int | None, Flag("Re-rank the nearest N by their real codes.", "N", setting="search.rerank", min=1)
    ] = None
    model: Annotated[str | None, Flag("Where the model lies now, if moved.", "URI")] = None
    shards: Annotated[
        list[str] | None, Flag("Shards with pictures for --html, beside those that are known; repeatable.", "URI")
    ] = None
    html: Annotated[str | None, Flag("Write the answer as a page with pictures.", "FILE")] = None
    version_: Annotated[int | None, Flag("Published version to search; default: the newest.")] = None
    workers: Annotated[
        int | None, Flag("Ray actors that share the parts; default: none.", setting="search.workers", min=1)
    ] = None
    gpu: Annotated[bool, Flag("Search a flat index on the GPU; pays off for many queries.")] = False

    def settings(self) -> dict[str, Any]:
        """Return the settings that flags stand for; --gpu names the device."""
        return {**super().settings(), "search.device": "cuda" if self.gpu else None}


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(Flags):
    """Flags of `hhnet evaluate`."""

    queries: Annotated[str, Flag("Codes of the queries.", "URI"), Main("QUERIES")]
    database: Annotated[list[str], Flag("Codes to search in; repeatable.", "URI")]
    out: OutOption
    at: Annotated[int | None, Flag("K of mAP@K; default: the whole ranking.", setting="evaluate.at", min=1)] = None
    convention: Annotated[
        str | None, Flag("Compute mAP as this code base of the field does: docs/how-to-compare.md.", "NAME")
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
        int | None, Flag("Largest number of bits in which a pair differs.", setting="dedupe.radius", min=0)
    ] = None
    against: Annotated[str | None, Flag("Index whose samples are compared with the codes too.", "URI")] = None
    shards: Annotated[
        list[str] | None, Flag("Shards that the codes came from, if they were moved; repeatable.", "URI")
    ] = None
    same_code: Annotated[
        bool | None, Flag("Drop also samples that only their codes say are duplicates.", setting="dedupe.same_code")
    ] = None
    memory: Annotated[str | None, Flag("Largest memory of the search.", "4GiB", setting="dedupe.memory")] = None


@dataclass(frozen=True, kw_only=True)
class PlanFlags(Flags):
    """Flags of `hhnet plan`."""

    shards: Annotated[list[str] | None, Flag("Shards; repeatable.", "URI")] = None
    codes: Annotated[list[str] | None, Flag("Codes of these shards, where they exist; repeatable.", "URI")] = None
    index: Annotated[str | None, Flag("Index over these codes.", "URI")] = None
    cost: Annotated[bool, Flag("Compare nothing: predict what a corpus will take and cost.")] = False
    images: Annotated[float | None, Flag("With --cost: number of images, such as 1e9.", min=1, max=1e12)] = None
    per_shard: Annotated[
        int | None, Flag("With --cost: images of a tar.", setting="ingest.samples_per_shard", min=1)
    ] = None
    image_bytes: Annotated[
        float | None,
        Flag("With --cost: mean bytes of an image file; default: as --from says, else 1e5.", min=1, max=1e12),
    ] = None
    night: Annotated[
        float | None, Flag("With --cost: images that come each night; default: a thousandth.", min=0, max=1e12)
    ] = None
    nodes: Annotated[int | None, Flag("With --cost: machines; default: 1.", min=1)] = None
    gpus_per_node: Annotated[int | None, Flag("With --cost: GPUs of a machine; default: 0.", min=0)] = None
    cpus_per_node: Annotated[int | None, Flag("With --cost: CPUs of a machine; default: 16.", min=1)] = None
    from_: Annotated[
        list[str] | None,
        Flag(
            "With --cost: shards, model, codes or index whose run records and sizes give the constants; repeatable.",
            "URI",
        ),
    ] = None
