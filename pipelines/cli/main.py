"""The command line: one function per verb.

Nothing here imports torch, ray, faiss or prefect before a verb's own work begins, so help and usage errors answer
at once. Verbs of other packages come through the entry-point group `hhnet.verbs`.
"""

import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.artifacts.nearby import is_root, list_roots
from pipelines.artifacts.result import Result
from pipelines.cli.config import PrintedConfig, config_command
from pipelines.cli.flags import (
    DedupeFlags,
    EncodeFlags,
    EvaluateFlags,
    IngestFlags,
    PlanFlags,
    RetryFlags,
    SearchFlags,
    TrainFlags,
    VerifyFlags,
)
from pipelines.cli.help import Flag, VerbGroup, panel_of
from pipelines.cli.index import index_app
from pipelines.cli.study import study_command
from pipelines.cli.verb import Main, OutOption, PrintConfigOption, verb
from pipelines.config.settings import Config
from pipelines.errors import UsageError
from pipelines.storage import Store

LEVELS_BELOW = 5
"""Folders below a given one in which `verify` and `rejects` look for artifacts."""

app = typer.Typer(
    name="hhnet",
    help="Learn compact binary codes for images, encode a corpus on Ray, and search it by Hamming distance.",
    no_args_is_help=True,
    cls=VerbGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@verb(app, "ingest")
def ingest_command(flags: IngestFlags, settings: Config) -> Result:
    """Turn images into WebDataset shards with an index, each file byte for byte; or index shards that others wrote.

    Example: hhnet ingest photos/ --out shards --split train=.8,query=.1,database=.1

    Example: hhnet ingest --adopt s3://bucket/wds --out s3://bucket/wds --classes names.txt

    Example: hhnet ingest list.parquet --path-column url --label class --out s3://bucket/shards

    Example: hhnet ingest photos.zip --out s3://bucket/shards --set ingest.workers=16

    Example: hhnet ingest --protocol cifar10 --root cifar-10-batches-bin --out shards
    """
    if flags.protocol is not None or (flags.root is not None and flags.source is None):
        return _ingest_protocol(flags, settings)
    if flags.source is None:
        raise UsageError("nothing to ingest: give SOURCE, or --protocol and --root")
    return _adopt(flags, flags.source, settings) if flags.adopt else _ingest_source(flags, flags.source, settings)


def _ingest_protocol(flags: IngestFlags, settings: Config) -> Result:
    protocol, root, rule = flags.protocol, flags.root, _class_rule(flags)
    if protocol is None or root is None:
        raise UsageError("--protocol NAME and --root DIR go together: give both, or SOURCE if --root is for a table")
    of_tables = flags.encoding or flags.label_separator or flags.multi_hot or flags.path_column != "path"
    of_labels = flags.label is not None or flags.unlabelled or rule
    of_tars = flags.adopt or flags.classes or flags.keys_by_tar or flags.image_member
    if flags.source or flags.split or of_tables or of_labels or of_tars:
        raise UsageError("--protocol fixes the images, labels and split: give only --root and --out with it")
    from pipelines.ingest.ingest import ingest
    from pipelines.ingest.protocols import find_protocol

    return ingest(root, flags.out, settings, protocol=find_protocol(protocol))


def _adopt(flags: IngestFlags, source: str, settings: Config) -> Result:
    from pipelines.ingest.adopt import Adoption, adopt, read_class_names

    if flags.split is not None or flags.path_column != "path" or _class_rule(flags):
        raise UsageError("--adopt does not change tars: leave out --split, --path-column and --class-from")
    if flags.root is not None or flags.encoding is not None or flags.label_separator is not None or flags.multi_hot:
        raise UsageError(
            "--root, --encoding, --label-separator and --multi-hot are for tables: leave them out with --adopt"
        )
    labels, classes = _labels(flags), read_class_names(flags.classes) if flags.classes else None
    fields = None if labels is None else tuple(labels)
    how = Adoption(fields, classes, flags.keys_by_tar, flags.image_member)
    return adopt(source, flags.out, how, settings, flags.allow_degraded)


def _ingest_source(flags: IngestFlags, source: str, settings: Config) -> Result:
    if flags.classes is not None or flags.keys_by_tar or flags.image_member is not None:
        raise UsageError("--classes, --keys-by-tar and --image-member belong to --adopt: add it, or leave them out")
    from pipelines.ingest.ingest import ingest

    separator = flags.label_separator
    if separator == "" or (separator and flags.multi_hot):
        raise UsageError("--label-separator needs a text and excludes --multi-hot: give one of the two")
    return ingest(
        source,
        flags.out,
        settings,
        split=flags.split,
        path_column=flags.path_column,
        label_columns=_labels(flags),
        class_from=_class_rule(flags),
        allow_degraded=flags.allow_degraded,
        table_root=flags.root,
        encoding=flags.encoding,
        label_separator=separator,
        multi_hot=flags.multi_hot,
    )


def _labels(flags: IngestFlags) -> list[str] | None:
    return [] if flags.unlabelled else flags.label


def _class_rule(flags: IngestFlags) -> Literal["first", "parent"] | None:
    text = flags.class_from
    if text is not None and flags.unlabelled:
        raise UsageError("--class-from says which folder is the class, and --unlabelled takes none: give one of them")
    if text is None:
        return None
    if text == "first":
        return "first"
    if text == "parent":
        return "parent"
    raise UsageError(f"--class-from {text!r} is not known: give first or parent")


@verb(app, "train")
def train_command(flags: TrainFlags, settings: Config, print_config: PrintConfigOption = False) -> Result:
    """Train a hashing network on shards; the same command resumes after a kill.

    Without a GPU it takes --recipe auto, unless you set more of the model than image size, batch size and epochs.

    Example: hhnet train shards/train --out model

    Example: hhnet train shards/train --out model --workers 2 --epochs 20 --set data.image_size=32

    Example: hhnet train shards/train --recipe scratch32 --out model --epochs 50

    Example: hhnet train --rotate h2q --model model --out model-h2q
    """
    if flags.model is not None or flags.rotate is not None:
        if flags.model is None or flags.rotate is None:
            raise UsageError("--rotate METHOD and --model URI go together: give both or neither")
        if flags.val is not None:
            raise UsageError("--rotate validates on the same samples as the training did: leave out --val")
        if print_config:
            return PrintedConfig.of_config(settings)
        from pipelines.train.rehead import rotate

        return rotate(flags.model, flags.out, settings, shards=flags.shards)
    if flags.shards is None:
        raise UsageError("nothing to train on: give --shards")
    from pipelines.train.fit import auto_if_unsaid
    from pipelines.train.preconditions import check_training

    check_training(settings)
    settings = auto_if_unsaid(settings, flags.out)
    if print_config:
        return PrintedConfig.of_config(settings)
    from pipelines.train.train import train

    return train(flags.shards, flags.out, settings, val=flags.val)


@verb(app, "encode")
def encode_command(flags: EncodeFlags, settings: Config) -> Result:
    """Encode shards to packed codes in Parquet; a rerun does only what is missing.

    Example: hhnet encode shards/database --model model --out codes/database

    Example: hhnet encode shards/database --model model --out codes/database --dry-run --price 2.50
    """
    if flags.price is not None and not flags.dry_run:
        raise UsageError("--price has a meaning only with --dry-run: add that, or leave --price out")
    if flags.allow_degraded and flags.dry_run:
        raise UsageError("--dry-run publishes nothing: leave out --allow-degraded")
    if flags.dry_run:
        from pipelines.encode.preflight import preflight

        return preflight(flags.shards, flags.model, flags.out, settings, price=flags.price)
    from pipelines.encode.encode import encode

    return encode(flags.shards, flags.model, flags.out, settings, allow_degraded=flags.allow_degraded)


@verb(app, "retry-rejects")
def retry_rejects_command(flags: RetryFlags, settings: Config) -> Result:
    """Encode again the shards that have rejects, after you mended the cause; publish the next version of the codes.

    Example: hhnet retry-rejects codes/database
    """
    from pipelines.encode.retry_rejects import retry_rejects

    return retry_rejects(flags.codes, settings, shards=flags.shards, model=flags.model)


@verb(app, "rejects")
def rejects_command(uri: Annotated[str, typer.Argument(help="Codes or shards.", metavar="URI")]) -> Result:
    """List the samples that codes lack, or the files that an ingest skipped, each with its reason.

    For a folder of artifacts, such as the --out of a run, it lists those of all of them.

    Example: hhnet rejects codes/database

    Example: hhnet rejects shards/train --json
    """
    from pipelines.verify.rejects import list_rejects, list_rejects_below

    store = Store(uri)
    below = [] if is_root(store) else list_roots(store, levels=LEVELS_BELOW)
    return list_rejects_below(uri, below) if below else list_rejects(uri)


@verb(app, "gc")
def gc_command(
    uri: Annotated[str, typer.Argument(help="Root of any artifact.", metavar="URI")],
    older_than: Annotated[
        str, Flag("Grace period: keep younger objects. Longer than any run that may be writing.", "24h")
    ] = "24h",
    keep: Annotated[int | None, Flag("Keep only the last N versions; default: all.", "N", min=1)] = None,
    dry_run: Annotated[bool, Flag("Delete nothing; list what would be deleted.")] = False,
) -> Result:
    """Delete what no version of an artifact refers to: parts of lost attempts, old checkpoints, unfinished uploads.

    Example: hhnet gc codes/database --dry-run

    Example: hhnet gc index --keep 7
    """
    from pipelines.verify.gc import gc

    return gc(uri, older_than=older_than, dry_run=dry_run, keep=keep)


@verb(app, "verify")
def verify_command(flags: VerifyFlags, settings: Config) -> Result:
    """Verify an artifact from its stored bytes alone: digests, counts, schemas, and that no sample is lost.

    For a folder of artifacts, such as the --out of a run, it verifies all of them. What an earlier verify proved and
    nobody has changed since is not read again, unless --full or --sample asks for it.

    Example: hhnet verify codes/database

    Example: hhnet verify s3://bucket/shards --sample 0.1

    Example: hhnet verify hhnet-demo
    """
    from pipelines.verify.verify import verify, verify_folder, verify_tars

    if flags.for_run is None:
        store = Store(flags.uri)
        if not (is_root(store) or flags.shards or flags.model) and (below := list_roots(store, levels=LEVELS_BELOW)):
            return verify_folder(flags.uri, below, settings, flags.full, flags.sample)
        return verify(flags.uri, settings, flags.shards, flags.model, flags.full, flags.sample)
    if flags.shards or flags.model or flags.full or flags.sample:
        raise UsageError("--for-run reads new tars of shards: leave out --shards, --model, --full and --sample")
    return verify_tars(flags.uri, flags.for_run, settings)


@verb(app, "status")
def status_command(
    uri: Annotated[str, typer.Argument(help="The --out of a verb, study or run.", metavar="URI")],
    watch: Annotated[bool, Flag("Look again every few seconds until it is done.")] = False,
) -> Result:
    """Show how far the work at a root is, read from the store alone: done, rate, time left, slow shards, rejects.

    Example: hhnet status codes/database --watch

    Example: hhnet status s3://bucket/run --json
    """
    from pipelines.verify.status import status

    return status(uri, watch=watch)


@verb(app, "plan")
def plan_command(flags: PlanFlags, settings: Config) -> Result:
    """Compare shards, their codes and an index: show what is new, changed or gone, and the commands to update it.

    With --cost, predict instead what a corpus will take: hours of GPUs and CPUs, requests to a store, bytes, a price.

    Example: hhnet plan --shards shards/photos --shards shards/tonight --codes codes/photos --index index

    Example: hhnet plan --cost --images 1e9 --nodes 16 --gpus-per-node 8 --from codes/photos --from index
    """
    if flags.cost:
        return _estimate_cost(flags, settings)
    of_machines = flags.nodes, flags.gpus_per_node, flags.cpus_per_node
    of_images = flags.images, flags.per_shard, flags.image_bytes, flags.night
    if flags.from_ or any(value is not None for value in (*of_machines, *of_images)):
        raise UsageError("what describes images and machines goes with --cost: add that, or leave it out")
    if not (flags.shards or flags.codes):
        raise UsageError("nothing to compare: give --shards or --codes")
    from pipelines.index.diff import plan_changes

    return plan_changes(flags.shards or (), flags.codes or (), flags.index)


def _estimate_cost(flags: PlanFlags, settings: Config) -> Result:
    if flags.shards or flags.codes or flags.index:
        raise UsageError("--cost compares nothing: leave out --shards, --codes and --index, or name them with --from")
    if flags.images is None:
        raise UsageError("--cost needs a number of images: give --images N")
    from pipelines.cost.estimate import estimate
    from pipelines.cost.model import Planned

    images = round(flags.images)
    planned = Planned(
        images=images,
        per_shard=settings.ingest.samples_per_shard,
        part_codes=settings.index.part_codes,
        night=-(-images // 1000) if flags.night is None else round(flags.night),
        nodes=flags.nodes or 1,
        gpus=flags.gpus_per_node or 0,
        cpus=flags.cpus_per_node or Planned.cpus,
    )
    return estimate(planned, settings, flags.from_ or (), flags.image_bytes)


@verb(app, "search")
def search_command(flags: SearchFlags, settings: Config) -> Result:
    """Find the nearest codes of each query; equal distances are ordered by id.

    Example: hhnet search index --image cat.jpg -k 10 --html found.html

    Example: hhnet search index --image holiday/ --image https://example.org/cat.jpg --html found.html

    Example: hhnet search index --image cat.jpg -k 10 --rerank 200

    Example: hhnet search index --codes codes/query --gpu --json
    """
    if not (flags.image or flags.key or flags.code or flags.codes):
        raise UsageError("nothing to search for: give --image, --key, --code or --codes")
    from pipelines.search.search import search

    return search(
        flags.index,
        settings,
        images=flags.image or (),
        keys=flags.key or (),
        codes=flags.codes or (),
        hex_codes=flags.code or (),
        version=flags.version_,
        model=flags.model,
        shards=flags.shards or (),
        html=flags.html,
    )


@verb(app, "evaluate")
def evaluate_command(flags: EvaluateFlags, settings: Config) -> Result:
    """Measure mAP and curves, and write a self-contained report with a gallery.

    Example: hhnet evaluate codes/query --database codes/database --out report

    Example: hhnet evaluate codes/query --database codes/database --out report --convention hashnet --at 1000
    """
    from pipelines.evaluate.evaluate import evaluate

    return evaluate(flags.queries, flags.database, flags.out, settings)


@verb(app, "dedupe")
def dedupe_command(flags: DedupeFlags, settings: Config) -> Result:
    """Find near-duplicates: all pairs within a radius, the groups they form, and those that their pictures confirm.

    Example: hhnet dedupe codes/train codes/database --radius 3 --out duplicates

    Example: hhnet dedupe codes/tonight --against index --radius 3 --out duplicates
    """
    from pipelines.dedupe.dedupe import dedupe

    return dedupe(flags.codes, flags.out, settings, against=flags.against, shards=flags.shards or ())


@verb(app, "agreement")
def agreement_command(
    old: Annotated[str, Flag("Codes of the old model.", "URI")],
    new: Annotated[str, Flag("Codes of the same shards by the new model.", "URI")],
    out: OutOption,
    settings: Config,
) -> Result:
    """Report how well the codes of two models agree on the neighbours of the same samples.

    Example: hhnet agreement --old codes/v1 --new codes/v2 --out reports/v1-v2
    """
    from pipelines.evaluate.agreement import report_agreement

    return report_agreement(old, new, out, settings)


@verb(app, "alias")
def alias_command(
    alias_: Annotated[str, Flag("Root of the alias.", "URI"), Main("ALIAS")],
    to: Annotated[str | None, Flag("Published index that the alias shall name.", "URI")] = None,
    rollback: Annotated[bool, Flag("Name the previous index again.")] = False,
) -> Result:
    """Give an index a lasting name that `search --index` follows, switch it in one step, or show its history.

    Example: hhnet alias photos --to index/v2

    Example: hhnet alias photos --rollback
    """
    if to is not None and rollback:
        raise UsageError("--to and --rollback exclude each other: give one of them")
    from pipelines.index.alias import alias_history, rollback_alias, set_alias

    if rollback:
        return rollback_alias(alias_)
    return set_alias(alias_, to) if to is not None else alias_history(alias_)


@verb(app, "export")
def export_command(
    model: Annotated[str, Flag("Model to export.", "URI"), Main("MODEL")],
    out: Annotated[str, Flag("Local file to write.", "FILE.onnx")],
    onnx: Annotated[bool, Flag("Write ONNX, the only format and so the default.", show_default=False)] = True,
    batch: Annotated[int | None, Flag("Images per batch; default: any number.", min=1)] = None,
    check_images: Annotated[
        Path | None, Flag("Folder of images to compare on; default: the model's training images.", "DIR")
    ] = None,
) -> Result:
    """Export a model as one ONNX file, from uint8 images to packed codes; it is first compared with torch on images.

    Example: hhnet export model --out model.onnx
    """
    from pipelines.export.onnx import export_onnx

    return export_onnx(model, out, batch=batch, images=check_images)


@app.callback(invoke_without_command=True)
def _root(show: Annotated[bool, Flag("Print the version.", names=("--version",))] = False) -> None:
    if show:
        sys.stdout.write(f"hhnet {version('hhnet')}\n")
        raise typer.Exit(0)


def build_app() -> typer.Typer:
    """Return the whole command tree, with the verbs that other packages contribute."""
    names = {command.name for command in app.registered_commands}
    for entry in sorted(entry_points(group="hhnet.verbs"), key=lambda entry: entry.name):
        if entry.name not in names:
            verb(app, entry.name)(entry.load())
    return app


verb(app, "study")(study_command)
verb(app, "config")(config_command)
app.add_typer(index_app, name="index", rich_help_panel=panel_of("index"))
