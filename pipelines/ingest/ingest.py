"""The verb ingest: turns images into WebDataset shards with an index, reproducible to the byte.

    source -> listing -> keys, class ids -> split -> seeded permutation -> tars and receipts -> shard index -> manifest

The fingerprint is of the listing (keys, paths, labels, metadata, parts) and the settings, since the bytes are read only
once, as they are written: the digests of the parts prove them. Stamps (size, times, CRC) kept outside every digest tell
later runs that the bytes are the same; where they differ, the images are read again and have to give the same tars.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ProtocolCard, ShardsMeta, UnreadFile
from pipelines.artifacts.manifest import Artifact, fingerprint
from pipelines.artifacts.runs import RunLog
from pipelines.cluster.progress import say_resumed, stage
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.ingest.bounds import LIMITS, SourceLimits
from pipelines.ingest.layout import ClassFrom, Layout
from pipelines.ingest.parts import PartWork
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.result import IngestResult
from pipelines.ingest.samples import SamplePlan, deal_tars, plan_samples, require_images
from pipelines.ingest.shard import TarTask
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import SKIPPED_NAMED, Listing, Source, open_source
from pipelines.ingest.split import SplitPlan, parse_split
from pipelines.ingest.tables import TableColumns, find_tables, open_table
from pipelines.ingest.workers import ingest_tars
from pipelines.storage import Store, canonical_json, sha256_of

_log = logging.getLogger(__name__)

INGEST_VERSION = 4
"""Version of keys, classes and samples, part of the fingerprint. Bump it when the same source would give others."""


def ingest(
    source: str,
    out: str,
    config: Config,
    split: str | None = None,
    path_column: str = "path",
    label_columns: Sequence[str] | None = None,
    protocol: Protocol | None = None,
    class_from: ClassFrom | None = None,
    allow_degraded: bool = False,
    table_root: str | None = None,
    encoding: str | None = None,
    label_separator: str | None = None,
    multi_hot: bool = False,
    limits: SourceLimits = LIMITS,
    pool: Pool = ray_pool,
) -> IngestResult:
    """Write the images of `source` as shards at `out`, or at `out`/<part> for each part of a `split`.

    `split` is `train=.8,query=.1,database=.1`, `folder`, or `column:NAME`. `class_from` selects the folder that names
    the class, see `Layout`. Empty `label_columns` leave any source unlabelled.

    For tables, unset `label_columns` means those called label, label2, ...; paths are below `table_root`, by default
    the table's folder; `encoding` is that of a CSV; `label_separator` separates the labels in one cell; `multi_hot`
    means a column of 1 and 0 for each label.

    A `protocol` reads the files of its data set in the folder `source`, and splits them itself. `limits` bounds other
    sources.

    Raises InputError for a source that cannot be used, and Degraded if more than `ingest.skip_budget` of its images
    cannot be taken and `allow_degraded` is not set.
    """
    plan = SplitPlan("protocol", protocol=protocol) if protocol else parse_split(split)
    root = Store(out)
    columns = TableColumns(path_column, label_columns, plan.column, label_separator, multi_hot)
    said = {"source": source, "split": split, "class_from": class_from or "first"}
    with _opened(source, root, plan, columns, table_root, encoding, class_from, limits) as opened:
        planned = plan_samples(opened, plan, config.ingest.seed)
        if protocol is None:  # once before any work, and again when it is known what could not be read
            opened.listing.require_budget(len(planned.samples), config.ingest.skip_budget, allow_degraded)
        work = _plan_parts(planned, opened, plan, root, config, class_from)
        return _ingest_parts(work, planned, opened, plan, root, config, said, allow_degraded, pool)


def _ingest_parts(
    work: Sequence[PartWork],
    planned: SamplePlan,
    opened: Source,
    plan: SplitPlan,
    root: Store,
    config: Config,
    said: dict[str, Any],
    allow_degraded: bool,
    pool: Pool,
) -> IngestResult:
    """Write what is missing of the parts, and publish them when the tars of all are done."""
    listing, settings = opened.listing, result_settings(config, "shards") | said
    missing = [part for part in work if part.record is None]
    status = "unchanged" if all(part.whole for part in work) else "done"
    # All writers before any work: a root may hold something else, and then nothing must have been written.
    writers = {part.name: ArtifactWriter(part.store, "shards", part.mark, (), {}, settings) for part in missing}
    tasks = _missing_tars(missing, writers, listing, 1.0 if allow_degraded else config.ingest.skip_budget)
    with ExitStack() as running:
        logs = _open_logs(missing, tasks, config, said, running)
        if missing:
            known = sum(part.samples for part in work if part.record is not None)
            _write_missing(missing, tasks, writers, logs, opened, config, pool, known)
        before = listing.skipped
        _skip_unread(work, listing)
        samples = len(planned.samples) - (listing.skipped - before)
        require_images(listing, samples)
        budget, protocol = config.ingest.skip_budget, plan.protocol
        degraded = protocol is None and listing.require_budget(samples, budget, allow_degraded)
        card = _protocol_card(protocol, opened, work) if protocol else None
        facts = _skips(listing, samples)
        totals = {name: facts[name] for name in ("skipped", "found")}
        artifacts = {part.name: part.published for part in work if part.published and part.record}
        for part in missing:
            meta = ShardsMeta(
                classes=tuple(planned.classes),
                source=planned.digest(opened),
                split=plan.card(part.name),
                protocol=card,
                columns=dict(opened.columns),
            )
            artifacts[part.name] = part.commit(writers[part.name], totals, meta)
            logs[part.name].record_figures(
                stamps=part.stamps,
                unread=[one.as_json() for one in part.unread[:SKIPPED_NAMED]],
                unread_reasons=Counter(one.reason for one in part.unread),
                samples=artifacts[part.name].manifest.totals["samples"],
                **facts,
            )
    for part in work:
        part.tidy()
    status = "degraded" if degraded else status
    named = {part.name: artifacts[part.name] for part in work}
    return _result(root, plan, named, status, samples, listing, planned.classes, card)


def _opened(
    source: str,
    root: Store,
    plan: SplitPlan,
    columns: TableColumns,
    table_root: str | None,
    encoding: str | None,
    class_from: ClassFrom | None,
    limits: SourceLimits,
) -> AbstractContextManager[Source]:
    if "://" in source:
        raise InputError(f"{source}: images are read from a local path: copy it here, or mount it")
    path = Path(source).expanduser()
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if is_folder and root.is_local and Path(root.root).is_relative_to(path.resolve()):
        raise InputError(f"--out {root.uri} is inside the source {path}: choose a folder outside it")
    if plan.protocol is not None:
        return plan.protocol.open(path)
    if tables := find_tables(path, is_folder):
        if class_from is not None:
            raise InputError(f"{path} is a table, whose labels are columns: --class-from is for folders and archives")
        base = Path(table_root).expanduser() if table_root else None
        if base is not None and not base.is_dir():
            raise InputError(f"--root {base} is no folder: give the one below which the paths of {path} lie")
        return open_table(path, tables, columns, base, encoding, plan.by == "folder", limits)
    if plan.column is not None or columns.labels:
        raise InputError(f"{path} is not a CSV or Parquet table: it has no columns to label or to split by")
    if table_root is not None or encoding is not None or columns.separator is not None or columns.multi_hot:
        raise InputError(f"{path} is not a table: --root, --encoding, --label-separator and --multi-hot are for tables")
    return open_source(path, Layout(class_from, plan.by == "folder", columns.labels is None), limits)


# ------------------------------------------------------------------------------------------------------------- work


def _plan_parts(
    planned: SamplePlan, opened: Source, plan: SplitPlan, root: Store, config: Config, class_from: ClassFrom | None
) -> list[PartWork]:
    """Return the work on each artifact: its root, fingerprint and tars."""
    digest, work = planned.digest(opened), []
    for name in plan.names(planned.groups):
        size, seed = config.ingest.samples_per_shard, config.ingest.seed
        tars = [
            TarTask(name, tar, samples, opened.read, opened.remote, required=plan.protocol is not None)
            for tar, samples in deal_tars(planned.part(name), name or config.ingest.name, size, seed)
        ]
        store = root.child(name) if plan.by else root
        work.append(PartWork(name, store, _fingerprint(config, digest, plan, name, class_from), tars))
    return work


def _fingerprint(config: Config, digest: str, plan: SplitPlan, name: str, class_from: ClassFrom | None) -> str:
    rules = {"ingest": INGEST_VERSION, "class_from": class_from or "first"}
    settings = {**result_settings(config, "shards"), **rules, "split": plan.card(name)}
    return fingerprint("shards", {"source": digest}, settings)


def _missing_tars(
    work: Sequence[PartWork], writers: Mapping[str, ArtifactWriter], listing: Listing, budget: float
) -> list[TarTask]:
    """Return the tars of these parts to write, and take the receipts of the others."""
    tasks = [task for part in work for task in part.missing(writers[part.name])]
    return tasks or _second_try(work, listing, budget)


def _open_logs(
    work: Sequence[PartWork], tasks: Sequence[TarTask], config: Config, said: Mapping[str, Any], running: ExitStack
) -> dict[str, RunLog]:
    """Begin the run record of each part; each has its share of the CPU seconds, by the images that it has to write."""
    logs, left = {}, Counter[str]()
    for task in tasks:
        left[task.part] += len(task.samples)
    for part in work:
        noted = {"fingerprint": part.mark, "done": part.samples - left[part.name], **said}
        log = RunLog(part.store, "ingest", config, total=part.samples, unit="images", **noted)
        log.cpu_share = left[part.name] / left.total() if tasks else 1 / len(work)
        logs[part.name] = running.enter_context(log)
    return logs


def _write_missing(
    work: Sequence[PartWork],
    tasks: Sequence[TarTask],
    writers: Mapping[str, ArtifactWriter],
    logs: Mapping[str, RunLog],
    opened: Source,
    config: Config,
    pool: Pool,
    before: int,
) -> None:
    """Write these tars, all side by side, and take their receipts. `before` images are known."""
    total = sum(part.samples for part in work)
    left = sum(len(task.samples) for task in tasks)
    say_resumed("ingest", before + total - left, before + total, "images")
    with stage("ingest: writing", total, unit="images", done=total - left) as advance:
        parts = {part.name: (part, writers[part.name], logs[part.name]) for part in work}
        for task, receipt in ingest_tars(tasks, parts, opened.listing.where, config, advance, pool):
            parts[task.part][0].receipts[task.stem] = receipt
            logs[task.part].advance(len(task.samples))


def _second_try(work: Sequence[PartWork], listing: Listing, budget: float) -> list[TarTask]:
    """Return the tars with images that may be readable now, if the run before ended as too many or all were lost."""
    lost, images = sum(len(part.unread) for part in work), sum(part.samples for part in work)
    if lost < images and not listing.exceeds_budget(images - lost, budget, lost):
        return []
    return [task for part in work if not part.whole for task in part.retryable()]


def _skip_unread(work: Sequence[PartWork], listing: Listing) -> None:
    """Skip the images that could not be read, as the receipts or the record of an earlier run name them."""
    for part in work:
        if part.record is not None:
            unread = [UnreadFile.from_json(one) for one in part.record["unread"]]
            more = Counter[str](part.record["unread_reasons"])
            more.subtract(one.reason for one in unread)
        else:
            unread, more = part.unread, Counter[str]()
        for one in unread:
            listing.skip(one.path, SkipReason(one.reason), one.detail)
        for reason, number in more.items():
            listing.skip_unnamed(SkipReason(reason), number)


def _protocol_card(protocol: Protocol, source: Source, work: Sequence[PartWork]) -> ProtocolCard:
    """Return the facts on a protocol's split for the manifests, and print the protocol's warnings to stderr."""
    proofs = {name: list[tuple[str, bytes]]() for name in protocol.parts}
    card = protocol.card(proofs | {part.name: list(part.proofs()) for part in work}, source)
    for warning in protocol.warnings(card):
        _log.warning("warning: %s", warning)
    return card


# ----------------------------------------------------------------------------------------------------------- reporting


def _skips(listing: Listing, samples: int) -> dict[str, Any]:
    """Return the facts on skipped files for a result and a run record."""
    return {
        "skipped": listing.skipped,
        "found": samples + listing.skipped,
        "skipped_reasons": listing.skipped_reasons,
        "skipped_suffixes": listing.skipped_suffixes,
        "skipped_files": listing.named,
        "notes": listing.notes,
    }


def _result(
    root: Store,
    plan: SplitPlan,
    artifacts: Mapping[str, Artifact],
    status: str,
    samples: int,
    listing: Listing,
    classes: Sequence[str],
    card: ProtocolCard | None,
) -> IngestResult:
    digests = {name: artifact.digest for name, artifact in artifacts.items()}
    splits = {
        name: {"uri": artifact.uri, "digest": artifact.digest, "samples": artifact.manifest.totals["samples"]}
        for name, artifact in artifacts.items()
    }
    return IngestResult(
        status=status,
        uri=root.uri,
        digest=sha256_of(canonical_json(digests)) if plan.by else digests[""],
        samples=samples,
        **_skips(listing, samples),
        classes=list(classes),
        splits=splits if plan.by else None,
        protocol=card.as_json() if card else None,
    )
