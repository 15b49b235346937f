"""One tar of an ingest, without Ray: its images read once, the tar written, read back and put, and its receipt."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import TarReceipt, UnreadFile
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.errors import DamagedArtifact, FingerprintMismatch
from pipelines.ingest.fetch import HEAD_BYTES, UrlReader, url_suffix
from pipelines.ingest.samples import PlannedSample, digest_stamps
from pipelines.ingest.sources import make_printable
from pipelines.shards.folders import Read, Unreadable
from pipelines.shards.shards import scan_tar, write_tar
from pipelines.storage import sha256_of

RECEIPTS = "receipts"
"""Folder of the receipts and of the rows of the index for each tar, both of which serve until the manifest is put."""


@dataclass(frozen=True)
class TarTask:
    """A tar to write for a part of the split; `read` reads its images, `remote` does so in another process.

    `before` is the sha256 of the tar that an earlier run wrote, "" if none of its images could be read: the tar has to
    be that one again. `again` says that its receipt is there and is to be replaced, `known` that the tar is published:
    it is only made to be compared.
    """

    part: str
    tar: str
    samples: tuple[PlannedSample, ...]
    read: Read
    remote: Callable[[Sequence[str]], Read] | None
    required: bool = False
    before: str | None = None
    again: bool = False
    known: bool = False

    @property
    def stem(self) -> str:
        """The tar's name without `.tar`, which names its receipt."""
        return self.tar.removesuffix(".tar")

    @property
    def stamps(self) -> str:
        """Digest of the stamps of its samples."""
        return digest_stamps(sample.stamp for sample in self.samples)

    def __reduce__(self) -> tuple[type["TarTask"], tuple[Any, ...]]:
        """Send the reader of these samples alone."""
        assert self.remote is not None, "a source in a scratch file is read where it lies"
        read = self.remote([sample.path for sample in self.samples])
        how = self.required, self.before, self.again, self.known
        return TarTask, (self.part, self.tar, self.samples, read, None, *how)


def ingest_tar(task: TarTask, writer: ArtifactWriter, folder: Path, advance: Callable[[], None]) -> TarReceipt:
    """Write a tar in `folder`, put it with its rows of the index, and claim it; return the receipt that won.

    An image that cannot be read is left out and named in the receipt, unless the task requires it. Raises WorkFailed
    for an image that changed since it was listed, FingerprintMismatch if an earlier run wrote another tar.
    """
    path, unread = folder / task.tar, list[UnreadFile]()
    try:
        table = build_tar(path, task, unread, advance)
        if task.before is not None and task.before != (sha256_of(path) if table.num_rows else ""):
            raise _differs(task, writer)
        part = rows = None
        if table.num_rows and not task.known:
            part = writer.put_part(task.tar, path, table.num_rows)
            rows = writer.put_part(f"{task.stem}.parquet", parquet_bytes(table), table.num_rows, folder=RECEIPTS)
    finally:
        path.unlink(missing_ok=True)
        shutil.rmtree(path.with_suffix(".images"), ignore_errors=True)
    receipt = TarReceipt(part=part, rows=rows, stamps=task.stamps, unread=tuple(unread))
    if task.known:
        return receipt
    if task.again:
        writer.store.delete(f"{RECEIPTS}/{task.stem}.json")
    try:
        winner = writer.put_receipt(task.stem, receipt)
    except FileNotFoundError:  # another run put it, published everything, and has deleted it again
        winner = receipt
    if winner.part != receipt.part and not (winner.unread or unread):
        raise _differs(task, writer)
    return winner


def _differs(task: TarTask, writer: ArtifactWriter) -> FingerprintMismatch:
    return FingerprintMismatch(
        f"{writer.store.uri} holds shards of other images: those for {task.tar} have other bytes now than when it was "
        "written: choose another --out, or the source that it was begun with"
    )


def build_tar(path: Path, task: TarTask, unread: list[UnreadFile], advance: Callable[[], None]) -> pa.Table:
    """Write the samples of a task as a tar at `path`, read it back, and return its rows of the shard index.

    The tar's bytes depend on the samples alone. Samples whose image cannot be read go to `unread`. Raises
    DamagedArtifact if the tar does not hold what was read.
    """
    read: dict[str, tuple[PlannedSample, str, bytes]] = {}
    read_image, fetched = task.read, isinstance(task.read, UrlReader)
    if isinstance(task.read, UrlReader):  # it advances as it fetches
        urls = [sample.path for sample in task.samples]
        read_image = task.read.fetch(urls, path.with_suffix(".images"), advance)

    def members() -> Iterator[dict[str, Any]]:
        for sample in task.samples:
            if not fetched:
                advance()
            try:
                image = read_image(sample.path, sample.stamp)
            except Unreadable as error:
                if task.required:
                    raise
                unread.append(_unread(sample, error))
                continue
            suffix = (url_suffix(image[:HEAD_BYTES]) or "") if fetched else sample.suffix
            read[sample.key] = sample, f"{sample.key}.{suffix}", hashlib.sha256(image).digest()
            yield _members(sample, suffix, image)

    write_tar(path, members())
    labels = {key: sample.labels for key, (sample, _, _) in read.items()}
    images = {key: image for key, (_, image, _) in read.items()}
    paths = {key: make_printable(sample.path) for key, (sample, _, _) in read.items()}
    table = scan_tar(path, task.tar, labels, images, paths)
    written = [members[0]["sha256"] for members in table["members"].to_pylist()]
    if written != [digest for _, _, digest in read.values()]:
        raise DamagedArtifact(f"{path}: what was written is not what was read")
    return table


def _unread(sample: PlannedSample, error: Unreadable) -> UnreadFile:
    return UnreadFile(path=make_printable(sample.path), reason=error.reason, detail=make_printable(error.detail))


def _members(sample: PlannedSample, suffix: str, image: bytes) -> dict[str, Any]:
    members: dict[str, Any] = {"__key__": sample.key, suffix: image}
    if len(sample.labels) == 1 and sample.metadata is None:
        members["cls"] = b"%d" % sample.labels[0]
    else:
        facts = {**(sample.metadata or {}), "labels": sample.labels}
        members["json"] = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return members
