"""The verb ingest: turns images into WebDataset shards with an index, reproducible to the byte.

    source -> listing -> keys, class ids, sha256 -> split -> seeded permutation -> tars -> shard index -> manifest

The source is read twice: first for its digest, by which a rerun finds that everything is done, then to write it. Bytes
that changed in between end the run. Only names and digests are held in memory.
"""

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ProtocolCard, ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part, fingerprint
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import find_finished
from pipelines.cluster.progress import say_resumed, stage
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.errors import InputError, WorkFailed
from pipelines.ingest.bounds import LIMITS, SourceLimits
from pipelines.ingest.classes import sort_class_names
from pipelines.ingest.layout import ClassFrom, Layout
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.result import IngestResult
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, Source, make_printable, open_source
from pipelines.ingest.split import SplitPlan, parse_split
from pipelines.ingest.tables import TableColumns, find_tables, open_table
from pipelines.shards.folders import Unreadable
from pipelines.shards.shards import INDEX_NAME, index_bytes, scan_tar, write_tar
from pipelines.storage import Store, canonical_json, scratch_folder, sha256_of

_log = logging.getLogger(__name__)

INGEST_VERSION = 3
"""Version of keys, classes and samples, part of the fingerprint. Bump it when the same source would give others."""
MAX_SHARDS = 1_000_000
"""Largest number of shards of one artifact; their names have six digits."""
SHARDS_AT_ONCE = 2
"""Number of shards that are written side by side."""

_ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".xz", ".txz", ".bz2", ".tbz2", ".zst", ".7z", ".rar"})

# `.` ends a key and `%` begins an escape. A tar, a Parquet string or the stock webdataset reader cannot hold the rest.
_ENCODED = re.compile(r"[.%\x00-\x1f\x7f\ud800-\udfff]")
_HIDDEN = re.compile(r"__[^/]*__(/|$)")


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """A sample to be written: its key, the path of its image in the source, label ids, metadata, image digest."""

    key: str
    path: str
    labels: tuple[int, ...]
    metadata: Mapping[str, Any] | None
    sha256: bytes

    @property
    def suffix(self) -> str:
        """Suffix of the image's path, without the dot."""
        return self.path.rpartition(".")[2]


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
    with _opened(source, root, plan, columns, table_root, encoding, class_from, limits) as opened:
        listing = opened.listing
        digests = _read_all(opened, required=protocol is not None)
        keys = _in_key_order(listing)
        groups = plan.assign(listing.entries, keys, config.ingest.seed, listing.where)
        classes = sort_class_names(label for entry in listing.entries for label in entry.labels)
        samples = _samples(listing, keys, classes, digests)
        digest = _source_digest(samples, classes, groups, opened)
        card = _protocol_card(protocol, opened, samples, groups) if protocol else None
        degraded = protocol is None and listing.require_budget(len(samples), config.ingest.skip_budget, allow_degraded)
        names = plan.names(groups)
        stores = {name: root.child(name) if plan.by else root for name in names}
        marks = {name: _fingerprint(config, digest, plan, name, class_from) for name in names}
        there = {name: find_finished(stores[name], "shards", marks[name]) for name in names}
        said = {"source": source, "split": split, "class_from": class_from or "first"}
        missing, settings = [name for name in names if not there[name]], result_settings(config, "shards") | said
        # All writers before any work: a root may hold something else, and then nothing must have been written.
        writers = {n: ArtifactWriter(stores[n], "shards", marks[n], (), {}, settings) for n in missing}
        parts = {name: artifact for name, artifact in there.items() if artifact}
        say_resumed("ingest", len(parts) if writers else 0, len(names), "splits")
        for name, writer in writers.items():
            chosen = [sample for sample, group in zip(samples, groups, strict=True) if group == name]
            meta = ShardsMeta(
                classes=tuple(classes),
                source=digest,
                split=plan.card(name),
                protocol=card,
                columns=dict(opened.columns),
            )
            noted = {"fingerprint": marks[name], **said}
            with RunLog(writer.store, "ingest", config, total=len(chosen), unit="images", **noted) as log:
                parts[name] = _publish_shards(writer, chosen, opened, config, name, meta, log)
                log.record_figures(samples=len(chosen), **_skips(listing))
    status = "degraded" if degraded else "done" if writers else "unchanged"
    facts = {"protocol": card.as_json()} if card else {}
    return _result(root, plan, {name: parts[name] for name in names}, status, listing, classes, facts)


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


# --------------------------------------------------------------------------------------------------------- planning


def sample_key(path: str, whole: bool = False) -> str:
    """Return the key of a file: its path without the suffix, or the `whole` path, percent-encoded where necessary."""
    key = _ENCODED.sub(_percent, path if whole else os.path.splitext(path)[0])  # noqa: PTH122 - a Path per file is slow
    # The stock webdataset reader skips names that begin with a folder like __NAME__.
    return "%5F" + key[1:] if _HIDDEN.match(key) else key


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match.group().encode("utf-8", "surrogateescape"))


def _in_key_order(listing: Listing) -> list[str]:
    """Sort the listing by key and return the keys. Raises InputError for no images, or for a path that comes twice."""
    if not listing.entries:
        skipped = f" ({listing.skipped} skipped: {listing.why_skipped()})" if listing.skipped else ""
        raise InputError(f"{listing.where} holds no images{skipped}{_what_helps(listing)}")
    keys = make_unique_keys([entry.path for entry in listing.entries], listing.where)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    listing.entries[:] = [listing.entries[place] for place in order]
    return [keys[place] for place in order]


def make_unique_keys(paths: Sequence[str], where: str) -> list[str]:
    """Return the key of each path; paths that would share a key keep their suffixes. InputError for equal paths."""
    keys = [sample_key(path) for path in paths]
    while twice := {one for one, other in pairwise(sorted(keys)) if one == other}:
        # Again until all differ: a kept suffix can equal the key of a third file, as a.png beside a.jpg and a.png.jpg.
        longer = [sample_key(path, whole=True) if key in twice else key for path, key in zip(paths, keys, strict=True)]
        if longer == keys:
            path = next(path for path, key in zip(paths, keys, strict=True) if key in twice)
            raise InputError(f"{where} lists {make_printable(path)} twice: list it once")
        keys = longer
    return keys


def _skips(listing: Listing) -> dict[str, Any]:
    """Return the facts on skipped files for a result and a run record."""
    return {
        "skipped": listing.skipped,
        "found": len(listing.entries) + listing.skipped,
        "skipped_reasons": listing.skipped_reasons,
        "skipped_suffixes": listing.skipped_suffixes,
        "skipped_files": listing.named,
        "notes": listing.notes,
    }


def _what_helps(listing: Listing) -> str:
    """Return advice for a source whose files are all skipped, or ""."""
    if SkipReason.MISSING in listing.reasons:
        return ": --root DIR says where the files of a table lie"
    if ".tar" in listing.suffixes:
        return ": --adopt takes tars of WebDataset; others are to be unpacked, or each given as SOURCE"
    if not listing.suffixes.keys().isdisjoint(_ARCHIVES):
        return ": unpack the archives, or give one as SOURCE"
    return ""


def _read_all(source: Source, required: bool) -> dict[str, bytes]:
    """Read every image once and return its sha256 by path. One that cannot be read is skipped, unless `required`."""
    digests: dict[str, bytes] = {}
    listing = source.listing
    taken = []
    with stage("ingest: reading", len(listing.entries), unit="images") as advance:
        for place, entry in enumerate(listing.entries, 1):
            try:
                digests[entry.path] = hashlib.sha256(source.read(entry.path)).digest()
                taken.append(entry)
            except Unreadable as error:
                if required:
                    raise
                listing.skip(entry.path, SkipReason.UNREADABLE, error.detail)
            if place % 256 == 0 or place == len(listing.entries):
                advance((place - 1) % 256 + 1)
    listing.entries[:] = taken
    return digests


def _samples(
    listing: Listing, keys: Sequence[str], classes: Sequence[str], digests: Mapping[str, bytes]
) -> list[PlannedSample]:
    ids = {name: number for number, name in enumerate(classes)}
    tuples: dict[tuple[str, ...], tuple[int, ...]] = {}
    samples = []
    for key, entry in zip(keys, listing.entries, strict=True):
        labels = tuples.setdefault(entry.labels, tuple(ids[name] for name in entry.labels))
        samples.append(PlannedSample(key, entry.path, labels, entry.metadata, digests[entry.path]))
    return samples


def _source_digest(
    samples: Sequence[PlannedSample], classes: Sequence[str], groups: Sequence[str], source: Source
) -> str:
    """Return the digest of a source's content, whatever holds it: a folder and its zip have the same digest."""
    digest = hashlib.sha256(canonical_json(list(classes)))
    for said in filter(None, (source.files, source.columns)):
        digest.update(canonical_json(said))
    for sample, group in zip(samples, groups, strict=True):
        facts = [sample.key, make_printable(sample.path), sample.sha256.hex(), sample.labels, sample.metadata, group]
        digest.update(json.dumps(facts, sort_keys=True, allow_nan=False).encode() + b"\n")
    return digest.hexdigest()


def _protocol_card(
    protocol: Protocol, source: Source, samples: Sequence[PlannedSample], groups: Sequence[str]
) -> ProtocolCard:
    """Return the facts on a protocol's split for the manifests, and print the protocol's warnings to stderr."""
    parts: dict[str, list[tuple[str, bytes]]] = {name: [] for name in protocol.parts}
    for sample, group in zip(samples, groups, strict=True):
        parts[group].append((sample.key, sample.sha256))
    card = protocol.card(parts, source)
    for warning in protocol.warnings(card):
        _log.warning("warning: %s", warning)
    return card


def _fingerprint(config: Config, digest: str, plan: SplitPlan, name: str, class_from: ClassFrom | None) -> str:
    rules = {"ingest": INGEST_VERSION, "class_from": class_from or "first"}
    settings = {**result_settings(config, "shards"), **rules, "split": plan.card(name)}
    return fingerprint("shards", {"source": digest}, settings)


# ----------------------------------------------------------------------------------------------------------- writing


def build_shard(path: Path, name: str, samples: Sequence[PlannedSample], read: Callable[[str], bytes]) -> pa.Table:
    """Write one tar of `samples` at `path`, read it back, and return its rows of the shard index.

    The tar's bytes depend on the samples alone. Raises WorkFailed if an image changed since it was digested.
    """
    write_tar(path, (_members(sample, read(sample.path)) for sample in samples))
    labels = {sample.key: sample.labels for sample in samples}
    images = {sample.key: f"{sample.key}.{sample.suffix}" for sample in samples}
    table = scan_tar(path, name, labels, images, {sample.key: make_printable(sample.path) for sample in samples})
    written = [members[0]["sha256"] for members in table["members"].to_pylist()]
    for sample, digest in zip(samples, written, strict=True):
        if digest != sample.sha256:
            raise WorkFailed(f"{make_printable(sample.path)} changed while it was ingested: run again")
    return table


def _members(sample: PlannedSample, image: bytes) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": sample.key, sample.suffix: image}
    if len(sample.labels) == 1 and sample.metadata is None:
        members["cls"] = b"%d" % sample.labels[0]
    else:
        facts = {**(sample.metadata or {}), "labels": sample.labels}
        members["json"] = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return members


def _publish_shards(
    writer: ArtifactWriter,
    samples: list[PlannedSample],
    source: Source,
    config: Config,
    part: str,
    meta: ShardsMeta,
    log: RunLog,
) -> Artifact:
    """Write and commit one artifact, or only its missing parts."""
    size, name = config.ingest.samples_per_shard, part or config.ingest.name
    # Philox by name, so that another default generator of numpy would not change the order. The 0 keeps this stream
    # apart from that of `split_by_shares`, which has a 1.
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.ingest.seed, 0])))
    order = random.permutation(len(samples))
    chunks = [[samples[place] for place in order[start : start + size]] for start in range(0, len(samples), size)]
    if len(chunks) > MAX_SHARDS:
        raise InputError(f"{len(chunks)} shards are too many: raise ingest.samples_per_shard")
    parts: list[Part] = []
    moving = threading.Lock()
    with (
        scratch_folder() as scratch,
        ThreadPoolExecutor(SHARDS_AT_ONCE, "ingest") as pool,
        stage(f"ingest: writing {part}".rstrip(), len(samples), unit="images") as advance,
    ):

        def read(path: str) -> bytes:
            with moving:
                advance()
            return source.read(path)

        def make(number: int) -> tuple[pa.Table, Part]:
            tar = f"{name}-{number:06d}.tar"
            table = build_shard(scratch / tar, tar, chunks[number], read)
            put = writer.put_part(tar, scratch / tar, table.num_rows)
            (scratch / tar).unlink()
            return table, put

        def tables() -> Iterator[pa.Table]:
            for table, put in pool.map(make, range(len(chunks))):
                parts.append(put)
                log.advance(table.num_rows)
                yield table

        try:
            index = index_bytes(tables())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # without this, the `with` would still write waiting shards
            raise
    parts.append(writer.put_part(INDEX_NAME, index, len(samples)))
    listing = source.listing
    found = len(listing.entries) + listing.skipped
    totals = {"samples": len(samples), "skipped": listing.skipped, "found": found}
    return writer.commit(parts, totals, meta)


# ----------------------------------------------------------------------------------------------------------- reporting


def _result(
    root: Store,
    plan: SplitPlan,
    artifacts: Mapping[str, Artifact],
    status: str,
    listing: Listing,
    classes: Sequence[str],
    facts: Mapping[str, Any],
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
        samples=len(listing.entries),
        **_skips(listing),
        classes=list(classes),
        splits=splits if plan.by else None,
        **facts,
    )
