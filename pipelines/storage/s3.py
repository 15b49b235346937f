"""A prefix of a bucket as a store: the operations of `Store`, run on s3fs's event loop and waited for."""

import io
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar, cast

from fsspec.asyn import sync

from pipelines.errors import DamagedArtifact
from pipelines.storage import writes
from pipelines.storage.blocks import open_blocks
from pipelines.storage.bucket import Answer, Bucket
from pipelines.storage.clock import Transient, deadline_s
from pipelines.storage.digests import sha256_of
from pipelines.storage.failpoints import failpoint
from pipelines.storage.objects import ObjectInfo

_T = TypeVar("_T")


class S3Objects:
    """Objects below `bucket/prefix`. Raises FileNotFoundError for a missing one, StoreUnavailable for a failure."""

    def __init__(self, root: str, bucket: Bucket | None = None) -> None:
        name, _, prefix = root.partition("/")
        self._bucket = bucket or Bucket(name, deadline_s())
        self._prefix = f"{prefix}/" if prefix else ""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return all bytes of an object, checked against its stated sha256; or the first `limit` + 1, unchecked.

        The sha256 is stated by the put. Bytes that differ are read again, since they may have changed on the way. If
        they arrive the same twice, the store itself holds wrong bytes, which raises DamagedArtifact.
        """
        key = self._prefix + name
        clock = self._bucket.clock("read", key)
        wrong = None
        while True:
            data, stated = self._wait(lambda: self._bucket.fetch(key, limit=limit))
            if limit is not None and len(data) > limit:
                return data
            found = sha256_of(data)
            if stated in (None, found):
                return data
            if found == wrong and self.size(name) == len(data):
                raise DamagedArtifact(f"s3://{self._bucket.name}/{key} is not what was put: its sha256 differs")
            wrong = found
            self._wait(lambda: clock.pause(Transient("what arrives does not match its sha256")))

    def open(self, name: str, block: int | None = None, start: int = 0) -> io.BufferedReader:
        """Open a stream that holds one block at a time, of 8 MiB or less, and survives broken connections."""
        return open_blocks(lambda start, stop: self.block(name, start, stop), block, start)

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        return self._wait(lambda: self._bucket.size(self._prefix + name))

    def block(self, name: str, start: int, stop: int) -> tuple[bytes, int | None]:
        """Return the bytes [start, stop) of an object, as far as it reaches, and where it ends."""
        return self._wait(lambda: self._bucket.fetch_block(self._prefix + name, start, stop))

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        """List the objects below a prefix, by name; none if the bucket does not exist."""
        below = self._prefix + (f"{prefix}/" if prefix else "")
        found = self._listed(lambda: self._bucket.entries(below))
        cut = len(self._prefix)
        return {
            entry["Key"][cut:]: ObjectInfo(int(entry["Size"]), entry["LastModified"].timestamp())
            for entry in found
            if not entry["Key"].endswith("/")
        }

    def folders(self, prefix: str) -> list[str]:
        """List the folders directly below `prefix`; none if the bucket does not exist."""
        below = self._prefix + (f"{prefix}/" if prefix else "")
        return [entry["Prefix"][len(below) : -1] for entry in self._listed(lambda: self._bucket.folders(below))]

    def require(self) -> None:
        """Raise FileNotFoundError unless the bucket exists."""
        self._wait(self._bucket.require)

    def delete(self, name: str) -> None:
        """Delete an object."""
        key = self._prefix + name
        self._wait(lambda: self._bucket.persist("delete", key, "delete_object", Key=key))

    def delete_all(self, prefix: str) -> None:
        """Delete all objects below a prefix."""
        for name in self.entries(prefix):
            self.delete(name)

    def uploads(self) -> dict[str, ObjectInfo]:
        """List the multipart uploads below the root that were begun and not ended; of each name the youngest."""
        found: dict[str, ObjectInfo] = {}
        for upload in self._listed(lambda: self._bucket.uploads(self._prefix)):
            name, when = upload["Key"][len(self._prefix) :], upload["Initiated"].timestamp()
            found[name] = ObjectInfo(0, max(when, found[name].modified if name in found else when))
        return found

    def abort(self, name: str) -> None:
        """End every multipart upload of an object."""
        self._wait(lambda: self._bucket.abort_all(self._prefix + name))

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Put an object if absent."""
        body = writes.Body(data)
        return self._wait(lambda: writes.put(self._bucket, self._prefix + name, body, lambda: failpoint(point)))

    def _listed(self, work: Callable[[], Awaitable[list[Answer]]]) -> list[Answer]:
        """Return the answers of a listing; a bucket that does not exist holds nothing."""
        try:
            return self._wait(work)
        except FileNotFoundError:
            return []

    def _wait(self, work: Callable[[], Awaitable[_T]]) -> _T:
        async def connected() -> _T:
            await self._bucket.connect()
            return await work()

        return cast(_T, sync(self._bucket.fs.loop, connected))
