"""One artifact of an ingest, a part of the split or the whole: what of it is done, what is missing, and its commit."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ShardsMeta, TarReceipt, UnreadFile
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.runs import Record, closed_records
from pipelines.artifacts.tables import SHARD_INDEX, read_table
from pipelines.artifacts.versions import find_finished, list_lost, missing_paths
from pipelines.errors import DamagedArtifact, InputError
from pipelines.ingest.samples import digest_stamps
from pipelines.ingest.shard import RECEIPTS, TarTask
from pipelines.ingest.skips import RETRYABLE
from pipelines.shards.index import put_index
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, map_in_order


@dataclass(eq=False)
class PartWork:
    """The tars of one artifact, and the receipts of those that are done."""

    name: str
    store: Store
    mark: str
    """Its fingerprint."""
    tars: list[TarTask]
    receipts: dict[str, TarReceipt] = field(default_factory=dict)

    @property
    def samples(self) -> int:
        """Number of images that are to become samples."""
        return sum(len(task.samples) for task in self.tars)

    @property
    def written(self) -> int:
        """Number of samples in the tars that are done."""
        return sum(receipt.part.rows for receipt in self.receipts.values() if receipt.part)

    @property
    def unread(self) -> list[UnreadFile]:
        """Images that could not be read, in the order of the tars."""
        return [one for task in self.tars for one in self.receipts[task.stem].unread]

    @cached_property
    def stamps(self) -> str:
        """Digest of the stamps of all its images, "" if one has none."""
        return digest_stamps(task.stamps for task in self.tars)

    @cached_property
    def published(self) -> Artifact | None:
        """The artifact at the root, if it was published with this fingerprint; objects of it may be lost since."""
        if self.store.size("manifest.json") is None:
            return None
        try:
            found = open_artifact(self.store, "shards")
        except InputError:
            return None
        return found if found.manifest.fingerprint == self.mark else None

    @cached_property
    def whole(self) -> bool:
        """Whether the artifact is published and no object of it is lost."""
        return self.published is not None and not list_lost(self.published)

    @cached_property
    def record(self) -> Record | None:
        """The record of a run that left the whole artifact as it is, with images of the same stamps."""
        if not (self.whole and self.stamps):
            return None
        wanted = {"verb": "ingest", "end": "done", "fingerprint": self.mark, "stamps": self.stamps}
        found = [one for one in closed_records(self.store) if wanted.items() <= one.items()]
        return found[-1] if found else None

    def missing(self, writer: ArtifactWriter) -> list[TarTask]:
        """Return the tars to write, or to read again because stamps do not tell that their images are the same."""
        there, held = self.store.entries(), dict[str, TarReceipt]()
        with suppress(FileNotFoundError):  # another run publishes, and deletes them
            held = writer.receipts(TarReceipt)
        tars = {part.name: part.sha256 for part in self.published.manifest.parts} if self.published else None
        tasks = []
        for task in self.tars:
            receipt = held.get(task.stem)
            done = receipt is not None and receipt.stamps == task.stamps != ""
            if receipt is not None and done and (self.whole or not missing_paths(there, receipt.parts)):
                self.receipts[task.stem] = receipt
                continue
            before = None
            if tars is not None:
                before = tars.get(task.tar, "")
            elif receipt is not None and not receipt.unread:
                before = receipt.part.sha256 if receipt.part else ""
            tasks.append(replace(task, before=before, again=receipt is not None, known=self.whole))
        return tasks

    def retryable(self) -> list[TarTask]:
        """Return the tars that are done but for images that may be readable now."""
        tasks = [task for task in self.tars if any(one.reason in RETRYABLE for one in self.receipts[task.stem].unread)]
        return [replace(task, again=True) for task in tasks]

    def proofs(self) -> Iterator[tuple[str, bytes]]:
        """Yield the key and the image's sha256 of each sample."""
        for table in self._tables():
            images = (members[0]["sha256"] for members in table["members"].to_pylist())
            yield from zip(table["key"].to_pylist(), images, strict=True)

    def _tables(self) -> Iterator[pa.Table]:
        """Yield the rows of the shard index for each tar, in order."""
        if self.whole and self.published is not None:
            yield from (shard.table() for shard in open_shards(self.published).shards)
            return
        rows = [receipt.rows for task in self.tars if (receipt := self.receipts[task.stem]).rows]
        found = map_in_order(lambda part: read_table(self.store, part, SHARD_INDEX) if part else None, rows)
        yield from (table.cast(SHARD_INDEX) for table in found if table is not None)

    def commit(self, writer: ArtifactWriter, totals: Mapping[str, int], meta: ShardsMeta) -> Artifact:
        """Publish the artifact, unless it is."""
        if self.whole and self.published is not None:
            return self.published
        parts = [receipt.part for receipt in self.receipts.values() if receipt.part]
        try:
            parts += put_index(writer, self._tables())
        except DamagedArtifact:  # another run may have published it meanwhile, and deleted what serves until then
            if (finished := find_finished(self.store, "shards", self.mark)) is None:
                raise
            return finished
        return writer.commit(parts, {"samples": self.written, **totals}, meta)

    def tidy(self) -> None:
        """Delete the receipts and rows, which nothing refers to once the manifest is put."""
        if self.store.names(RECEIPTS):
            self.store.discard(RECEIPTS)
