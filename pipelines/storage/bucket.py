"""Requests to a bucket: each is tried again until it is answered or its clock has run out."""

import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from botocore.exceptions import BotoCoreError, ClientError
from s3fs import S3FileSystem

from pipelines.errors import ConfigError
from pipelines.storage.clock import Clock, Transient
from pipelines.storage.digests import sha256_of
from pipelines.storage.limiter import MOST, limiter_of
from pipelines.storage.unsigned import is_unsigned

CHUNK_BYTES = 1 << 20
"""Bytes of a download that are taken over at a time; each chunk renews the clock."""
DIGEST_KEY = "sha256"
"""Metadata of every object that is put: the sha256 of its bytes."""

PAST_THE_END = 416
"""Status of an answer to a request for bytes beyond the end of an object."""

Answer = dict[str, Any]
_PAGES = {"ContinuationToken": "NextContinuationToken"}


@dataclass(frozen=True)
class BucketLimits:
    """Limits on single requests."""

    single_bytes: int = 32 << 20
    """Largest object that is put in one request, in bytes."""
    part_bytes: int = 16 << 20
    """Smallest size of a part of a multipart upload, in bytes; S3 refuses parts below 5 MiB."""
    connect_s: float = 5.0
    """Longest wait for a connection, in seconds."""
    silence_s: float = 20.0
    """Longest silence of a store before a request is given up and tried again, in seconds."""


LIMITS = BucketLimits()


class Bucket:
    """One bucket, reached through s3fs's session. Raises FileNotFoundError for a missing object or bucket."""

    def __init__(self, name: str, seconds: float, limits: BucketLimits = LIMITS) -> None:
        self.name, self.seconds, self.limits = name, seconds, limits
        self.fs = S3FileSystem(
            anon=is_unsigned(name),
            config_kwargs={
                # A third, so that one silent connection cannot use up a short deadline.
                "connect_timeout": min(limits.connect_s, seconds / 3),
                "read_timeout": min(limits.silence_s, seconds / 3),
                "retries": {"total_max_attempts": 1},  # the clock retries; both together would multiply
                "max_pool_connections": MOST,  # the limiter says how many are used
            },
        )

    async def connect(self) -> None:
        """Set up the client. This takes a second, so it is done before an operation's clock starts."""
        try:
            await self.fs.set_session()
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"s3://{self.name}: the S3 client cannot be set up: {error}: check AWS_ENDPOINT_URL and the AWS profile"
            ) from error

    def clock(self, operation: str, key: str) -> Clock:
        """Start the clock of one operation on one object."""
        return Clock(f"{operation} s3://{self.name}/{key}", self.seconds, limiter_of(f"s3://{self.name}"))

    async def request(self, method: str, **fields: Any) -> Answer:
        """Send one request, once."""
        client = await self.fs.set_session()
        return cast(Answer, await getattr(client, method)(Bucket=self.name, **fields))

    async def persist(self, operation: str, key: str, method: str, **fields: Any) -> Answer:
        """Send a request that may be repeated safely, until it is answered."""
        return await self.clock(operation, key).persist(lambda: self.request(method, **fields))

    async def size(self, key: str) -> int:
        """Return the bytes of an object."""
        return int((await self.persist("stat", key, "head_object", Key=key))["ContentLength"])

    async def sha256(self, key: str, clock: Clock) -> str | None:
        """Return the digest of an object's bytes, stated at its put or else computed; None if there is no object."""
        try:
            answer = await clock.persist(lambda: self.request("head_object", Key=key))
            stated = answer.get("Metadata", {}).get(DIGEST_KEY)
            return str(stated) if stated else sha256_of((await self.fetch(key))[0])
        except FileNotFoundError:
            return None

    async def fetch(self, key: str, limit: int | None = None) -> tuple[bytes, str | None]:
        """Fetch all bytes of an object and the digest stated at its put.

        Of an object with more than `limit` bytes only the first `limit` + 1 are received. A broken connection is taken
        up where it broke; the clock starts anew with every chunk that arrives.
        """
        download = await self._fetched(key, _Download(0, None, limit))
        return download.buffer.getvalue(), download.stated

    async def fetch_block(self, key: str, start: int, stop: int) -> tuple[bytes, int | None]:
        """Fetch the bytes [start, stop) of an object, as far as it reaches; return also where the object ends.

        The answer says that itself, so nobody has to ask for the size before. Of an object that ends at or before
        `start`, that is all that is known: `start` is returned.
        """
        download = await self._fetched(key, _Download(start, stop))
        return download.buffer.getvalue(), download.end

    async def _fetched(self, key: str, download: "_Download") -> "_Download":
        clock = self.clock("read", key)
        while not download.done:
            try:
                await clock.attempt(lambda: self._receive(key, download, clock))
            except Transient as problem:
                await clock.pause(problem)
        return download

    async def _receive(self, key: str, download: "_Download", clock: Clock) -> None:
        try:
            answer = await self.request("get_object", Key=key, **download.range)
        except ClientError as error:
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") != PAST_THE_END:
                raise
            download.end_at(download.offset)
            return
        async with answer["Body"] as body:
            if download.range:
                first, _, total = str(answer.get("ContentRange", "")).partition("/")
                if not first.startswith(f"bytes {download.offset}-"):
                    raise Transient("the store sent another range than it was asked for")
                if total.isdigit():
                    download.end_at(int(total))
            if download.stop is None:
                size = int(answer["ContentLength"])
                download.stop = size if download.limit is None else min(size, download.limit + 1)
            download.stated = answer.get("Metadata", {}).get(DIGEST_KEY)
            async for chunk in body.iter_chunks(CHUNK_BYTES):
                # Cut at `stop`: the store sends all of an object beyond `limit`, until the connection is dropped.
                download.buffer.write(chunk[: download.stop - download.offset])
                clock.renew()
                if download.done:
                    break
        if not download.done:
            raise Transient(f"the answer ended at byte {download.offset} of {download.stop}")

    async def entries(self, prefix: str) -> list[Answer]:
        """List Key, Size and LastModified of the objects whose keys begin with `prefix`."""
        return await self._list("list_objects_v2", "Contents", prefix, _PAGES)

    async def require(self) -> None:
        """Raise FileNotFoundError unless the bucket exists."""
        await self.persist("list", "", "list_objects_v2", MaxKeys=1)

    async def folders(self, prefix: str) -> list[Answer]:
        """List the Prefix of each group of keys that begin with `prefix` and go on to a slash."""
        return await self._list("list_objects_v2", "CommonPrefixes", prefix, _PAGES, Delimiter="/")

    async def uploads(self, prefix: str) -> list[Answer]:
        """List Key, UploadId and Initiated of the multipart uploads that were begun and not ended."""
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        return await self._list("list_multipart_uploads", "Uploads", prefix, markers)

    async def _list(
        self, method: str, held: str, prefix: str, markers: Mapping[str, str], **fields: str
    ) -> list[Answer]:
        """Fetch all pages of a listing, each tried until it is answered."""
        found: list[Answer] = []
        more: Answer = {}
        while True:
            page = await self.persist("list", prefix, method, Prefix=prefix, **fields, **more)
            found += page.get(held, [])
            if not page.get("IsTruncated"):
                return found
            more = {asked: page[given] for asked, given in markers.items()}

    async def abort(self, key: str, upload: str) -> None:
        """End a multipart upload and free its parts; an upload that has ended already is no error."""
        with suppress(FileNotFoundError):
            await self.persist("abort the upload of", key, "abort_multipart_upload", Key=key, UploadId=upload)

    async def abort_all(self, key: str) -> None:
        """End all multipart uploads of an object."""
        for upload in await self.uploads(key):
            if upload["Key"] == key:
                await self.abort(key, upload["UploadId"])


class _Download:
    """A range of an object, as far as it has arrived; `stop` is known from the first answer on."""

    def __init__(self, start: int, stop: int | None, limit: int | None = None) -> None:
        self.start, self.stop, self.limit = start, stop, limit
        self.end: int | None = None
        """Where the object ends, if an answer to a request for a range said it."""
        self.buffer = io.BytesIO()
        self.stated: str | None = None

    @property
    def offset(self) -> int:
        return self.start + self.buffer.tell()

    @property
    def done(self) -> bool:
        return self.stop is not None and self.offset >= self.stop

    def end_at(self, end: int) -> None:
        """Expect nothing from byte `end` on, where the object ends."""
        self.end = end
        self.stop = end if self.stop is None else min(self.stop, end)

    @property
    def range(self) -> dict[str, str]:
        return {} if self.stop is None else {"Range": f"bytes={self.offset}-{self.stop - 1}"}
