"""Turns foreign WebDataset tars into a shards artifact, without writing their samples anew.

    tars of a folder or prefix -> scan each once -> keys made unique -> class ids -> shard index -> manifest

If --out is the place of the tars, they stay untouched and become parts under their own names; otherwise they are copied
there byte for byte. In both cases the shard index holds the place of each sample's members, so every other verb works
on the result as on shards that `ingest` wrote.
"""

import re
import shutil
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part, fingerprint
from pipelines.artifacts.parquet import table_digest
from pipelines.artifacts.runs import write_run_record
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.artifacts.versions import list_lost
from pipelines.cluster.progress import stage
from pipelines.config.settings import Config
from pipelines.errors import Degraded, InputError, WorkFailed
from pipelines.ingest.foreign import ForeignTar, Loss, scan_foreign_tar
from pipelines.ingest.growth import Grown, extend_classes, find_adopted_shards
from pipelines.ingest.result import IngestResult
from pipelines.ingest.sources import Listing
from pipelines.ingest.tarlists import list_tars
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.images import decode_ahead
from pipelines.shards.index import put_index
from pipelines.shards.shards import Record, index_table
from pipelines.shards.tar import TarBeyondLimits, TarLimits, TarReason
from pipelines.storage import Store, canonical_json, scratch_folder, sha256_of

ADOPT_VERSION = 3
"""Version of the index's content, part of the fingerprint. Bump it when the same tars would give another index."""
TARS_AT_ONCE = 2
"""Number of tars that are scanned side by side."""

_WHOLE = re.compile(r"0|[1-9][0-9]{0,4}")
"""A whole number below 100,000 without a sign or leading zeros."""


@dataclass(frozen=True)
class Adoption:
    """Options for reading foreign samples.

    `fields` are the JSON fields that hold labels (unset: `cls`, else `labels` or `label`; empty: no labels). `classes`
    are the names of the class numbers. `keys_by_tar` puts the tar's name before each key. `image_member` is the suffix
    of the image's name behind the key, such as `input.jpg` (unset: the one member with the suffix of an image).
    """

    fields: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    keys_by_tar: bool = False
    image_member: str | None = None
    limits: TarLimits = field(default_factory=TarLimits)
    """Limits on the reading of each tar; they change no result."""

    @property
    def images(self) -> tuple[str, ...]:
        """Suffixes of images: the part of a name behind the key, with its dot, in lower case."""
        return SUFFIXES if self.image_member is None else (f".{self.image_member.lower().removeprefix('.')}",)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that belong to the fingerprint besides the tars and their classes."""
        chosen = {} if self.image_member is None else {"image_member": self.images[0]}
        return {"adopt": ADOPT_VERSION, "fields": self.fields, "keys_by_tar": self.keys_by_tar, **chosen}


_HINTS = {
    TarReason.NO_IMAGE: "--image-member SUFFIX names the image of a sample; its key ends at the first dot of the name",
    TarReason.SEVERAL_IMAGES: "--image-member SUFFIX chooses among several images",
    TarReason.DUPLICATE_KEY: "--keys-by-tar tells equal keys of several tars apart; write a tar anew that has a member "
    "twice",
    TarReason.INTERLEAVED: "write the tar anew with its members in order, as tar --sort=name does",
}
"""Advice for the most frequent reason of a loss."""


@dataclass
class _Indexed:
    """One indexed tar: its digest, its rows (without class ids yet), and the class names of each row."""

    name: str
    bytes: int
    sha256: str
    table: pa.Table
    labels: list[tuple[str, ...]]


def adopt(
    source: str, out: str, how: Adoption | None = None, config: Config | None = None, allow_degraded: bool = False
) -> IngestResult:
    """Index the tars of `source`, a folder, s3:// prefix, tar or pattern, as a shards artifact at `out`.

    In the result, found = samples + skipped. Skips are counted by reason, and the first ones are named. Raises
    InputError if there is no tar or no sample, or if a label is not among the given classes; Degraded if more was lost
    than `ingest.skip_budget` and `allow_degraded` is not set.
    """
    began = time.time()
    how, budget = how or Adoption(), (config or Config()).ingest.skip_budget
    (origin, names), root = list_tars(source), Store(out)
    if root.uri == Store(source).uri != origin.uri:
        raise InputError(f"--out {out} is a tar: give the folder that holds it, {origin.uri}, or another one")
    listing, base = Listing(origin.uri), find_adopted_shards(root, how.settings)
    if base is not None:
        names = base.names(names, origin)
    tars = [tar for tar in _index(origin, names, how, listing, base) if tar.table.num_rows]
    if not tars:
        why = f"{listing.skipped} skipped: {listing.why_skipped()}" if listing.skipped else "its tars are empty"
        raise InputError(f"{listing.where} holds no sample that can be taken ({why}){_hint(listing)}")
    samples = sum(tar.table.num_rows for tar in tars)
    totals = {"samples": samples, "skipped": listing.skipped, "found": samples + listing.skipped}
    try:
        degraded = listing.require_budget(samples, budget, allow_degraded)
    except Degraded as error:
        raise Degraded(f"{error}{_hint(listing)}") from None
    labels = {name for tar in tars for own in set(tar.labels) for name in own}
    classes, ids = _class_ids(labels, how, origin.uri, base)
    for tar in tars:
        tar.table = _numbered(tar, ids, base)
    result, written = _publish_adopted(origin, root, tars, classes, how, totals, base)
    facts = {"skipped_reasons": listing.skipped_reasons, "skipped_files": listing.named}
    if written:
        seconds = round(time.time() - began, 3)
        figures = {"source": origin.uri, "began": began, "seconds": seconds, **totals, **facts}
        write_run_record(root, "ingest", figures)
    return IngestResult.of(
        result,
        "degraded" if degraded else "done" if written else "unchanged",
        **totals,
        **facts,
        tars=len(tars),
        classes=list(classes),
        version=version if (version := result.facts(ShardsMeta).version) > 1 else None,
    )


def read_class_names(path: Path) -> tuple[str, ...]:
    """Read class names from a file: line n names class n, from 0. Raises InputError if one is missing or repeated."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from None
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise InputError(f"{path}: give one class name per line, in the order of the class numbers")
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(f"{path} names the class {name!r} {times} times")
    return tuple(names)


def _hint(listing: Listing) -> str:
    """Return advice for the most frequent reason, or ""."""
    reason = max(listing.reasons, key=lambda name: listing.reasons[name], default="")
    return f": {_HINTS[TarReason(reason)]}" if reason in _HINTS else ""


# --------------------------------------------------------------------------------------------------------- indexing


def _index(
    origin: Store, names: Sequence[str], how: Adoption, listing: Listing, base: Grown | None
) -> Iterator[_Indexed]:
    """Scan the tars, several side by side, and index them in order.

    Of equal keys the first is taken; keys of tars that were adopted before come first of all.
    """

    def scan(name: str) -> ForeignTar:
        try:
            with origin.open(name) as stream:
                return scan_foreign_tar(stream, how.images, how.fields, how.limits)
        except FileNotFoundError:
            raise WorkFailed(f"{origin.uri}/{name} went away while it was adopted: run again") from None
        except TarBeyondLimits as error:
            raise InputError(f"{origin.uri}/{name}: {error}: move it away, or cut it into several tars") from None

    before = base.keys if base else {}
    seen = {key for keys in before.values() for key in keys}
    with stage("ingest: indexing", len(names), unit="tars") as advance:
        for name, tar in zip(names, decode_ahead(names, scan, TARS_AT_ONCE, TARS_AT_ONCE), strict=True):
            if base is not None:
                base.require_same_bytes(name, tar.sha256, origin)
            yield _index_tar(name, tar, how, seen, before.get(name, frozenset()), listing)
            advance(1)


def _index_tar(
    name: str, tar: ForeignTar, how: Adoption, seen: set[str], own: Container[str], listing: Listing
) -> _Indexed:
    """Index one tar, and add its keys to `seen`. A key already `seen` is a loss, unless it is among the tar's `own`.

    `own` are the keys that the tar had when it was adopted before.
    """
    prefix = f"{name.removesuffix('.tar')}/" if how.keys_by_tar else ""
    records: list[Record] = []
    labels = []
    lost = list(tar.losses)
    for sample in tar.samples:
        key = prefix + sample.key
        if key in seen and key not in own:
            lost.append(Loss(sample.key, TarReason.DUPLICATE_KEY))
            continue
        seen.add(key)
        if len(seen) > listing.limits.files:
            raise InputError(f"{listing.where} holds more than {listing.limits.files} samples: adopt it in pieces")
        records.append(Record(key, name, len(records), sample.members[0].name, (), sample.members))
        labels.append(sample.labels)
    for loss in lost:
        listing.skip(f"{name}: {loss.name}" if loss.name else name, loss.reason, loss.detail, loss.sample)
    return _Indexed(name, tar.bytes, tar.sha256, index_table(records), labels)


def _class_ids(
    found: set[str], how: Adoption, where: str, base: Grown | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the classes and the id of each label. A number is its own id, unless there are names besides numbers."""
    if how.classes is not None:
        ids = {name: int(name) for name in found if name.isascii() and name.isdigit()}
        ids = {name: number for name, number in ids.items() if number < len(how.classes)}
        ids = {name: number for number, name in enumerate(how.classes)} | ids
        for name in sorted(found - ids.keys()):
            raise InputError(f"{where}: the label {name!r} is not among the {len(how.classes)} classes given")
        if base is not None and how.classes[: len(base.classes)] != base.classes:
            raise InputError(f"{base.artifact.uri} has other classes than those given: put new names behind its own")
        return how.classes, ids
    numbers = {name: int(name) for name in found if _WHOLE.fullmatch(name)}
    if base is not None:
        return extend_classes(found, base.classes, numbers)
    if len(numbers) == len(found):
        return tuple(str(number) for number in range(1 + max(numbers.values(), default=-1))), numbers
    names = tuple(sorted(found))
    return names, {name: number for number, name in enumerate(names)}


def _numbered(tar: _Indexed, ids: Mapping[str, int], base: Grown | None) -> pa.Table:
    """Return the rows of a tar with class ids. Raises InputError if they changed since it was adopted."""
    place = SHARD_INDEX.get_field_index("labels")
    field = SHARD_INDEX.field(place)
    labels = pa.array([[ids[name] for name in own] for own in tar.labels], field.type)
    rows = tar.table.set_column(place, field, labels)
    if base is not None:
        base.require_same_rows(tar.name, rows)
    return rows


# -------------------------------------------------------------------------------------------------------- publishing


def _publish_adopted(
    origin: Store,
    root: Store,
    tars: Sequence[_Indexed],
    classes: tuple[str, ...],
    how: Adoption,
    totals: Mapping[str, int],
    base: Grown | None,
) -> tuple[Artifact, bool]:
    """Commit the artifact, its missing parts, or its next version.

    The flag is False if it was complete before.
    """
    rows = [[tar.name, tar.sha256, table_digest(tar.table)] for tar in tars]
    digest = sha256_of(canonical_json([rows, classes, totals]))
    new = [tar for tar in tars if base is None or tar.name not in base.shards]
    if base is not None and not new and not list_lost(base.artifact):
        return base.artifact, False
    mark = base.artifact.manifest.fingerprint if base else fingerprint("shards", {"source": digest}, how.settings)
    writer, put = ArtifactWriter(root, "shards", mark, (), {}), new or tars
    if origin.uri == root.uri:
        parts = [Part(path=tar.name, bytes=tar.bytes, sha256=tar.sha256, rows=tar.table.num_rows) for tar in put]
    else:
        parts = list(_copied(origin, writer, put))
    if base is not None and not new:  # only missing parts were put again
        return base.artifact, True
    index = put_index(writer, (tar.table for tar in put), base.index if base else None)
    if base is None:
        meta = ShardsMeta(classes=classes, source=digest, split=None, adopted=True)
        return writer.commit([*parts, *index], totals, meta), True
    return base.publish(parts, index, dict(totals), classes=classes, source=digest), True


def _copied(origin: Store, writer: ArtifactWriter, tars: Sequence[_Indexed]) -> Iterator[Part]:
    """Put each tar as a part, byte for byte. Raises WorkFailed if one changed since it was scanned."""
    with scratch_folder() as scratch, stage("ingest: copying", len(tars), unit="tars") as advance:
        for tar in tars:
            path = Path(origin.path(tar.name)) if origin.is_local else scratch / tar.name
            if not origin.is_local:
                with origin.open(tar.name) as stream, path.open("wb") as sink:
                    shutil.copyfileobj(stream, sink, 1 << 20)
            part = writer.put_part(tar.name, path, tar.table.num_rows)
            if part.sha256 != tar.sha256:
                raise WorkFailed(f"{origin.uri}/{tar.name} changed while it was adopted: run again")
            if not origin.is_local:
                path.unlink()
            yield part
            advance(1)
