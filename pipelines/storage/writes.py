"""Put-if-absent on S3, in one request or as a multipart upload.

Either way a single request with `If-None-Match: *` makes the object appear whole. When its answer is lost, the store
is asked for the object's digest: with our bytes the request landed; with others another writer was first; if there is
no object, the request is made again.

A multipart upload that was cut off keeps its parts in the store, unseen. A failed upload is aborted. The upload of a
killed process is cleared when the same object is put again: once an object is there, no upload of it can complete.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipelines.errors import CommitUnknown, StoreRefused, StoreUnavailable
from pipelines.storage.bucket import DIGEST_KEY, Answer, Bucket
from pipelines.storage.clock import Clock, Conflict, Exists, Transient
from pipelines.storage.digests import sha256_of

MAX_PARTS = 10_000
"""Largest number of parts per upload that S3 takes; larger objects get larger parts."""
PARTS_SENT_AT_ONCE = 4
"""Parts of one upload that are sent at a time."""


class Body:
    """The bytes to put, from memory or a file, with their size and digest."""

    def __init__(self, data: bytes | Path) -> None:
        self._data = data
        self.size = len(data) if isinstance(data, bytes) else data.stat().st_size
        self.sha256 = sha256_of(data)

    def stretch(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop), cut at the end."""
        if isinstance(self._data, bytes):
            return self._data[start:stop]
        with self._data.open("rb") as stream:
            stream.seek(start)
            return stream.read(stop - start)


async def put(bucket: Bucket, key: str, body: Body, during: Callable[[], None]) -> bool:
    """Put an object if there is none; True if this call made it. `during` is called before the object appears.

    Raises StoreUnavailable when it could not be put, CommitUnknown when the outcome could not be found out.
    """
    try:
        if body.size > bucket.limits.single_bytes:
            return await _put_parts(bucket, key, body, during)
        during()
        data = body.stretch(0, body.size)
        # The digest travels as metadata, so that one HEAD tells whether a put whose answer was lost has landed.
        fields: dict[str, Any] = {"Body": data, "Metadata": {DIGEST_KEY: body.sha256}}
        return await _make_appear(bucket, "put_object", key, body.sha256, **fields)
    except FileNotFoundError:
        raise StoreRefused(
            f"cannot write s3://{bucket.name}/{key}: there is no such bucket: check its name and AWS_ENDPOINT_URL"
        ) from None


async def _make_appear(bucket: Bucket, method: str, key: str, sha256: str, again: bool = True, **fields: Any) -> bool:
    """Send the request that makes an object appear; raise Conflict unless the request may be made `again`."""
    clock = bucket.clock("write", key)
    lost = False
    while True:
        try:
            await clock.attempt(lambda: bucket.request(method, Key=key, IfNoneMatch="*", **fields))
            return True
        except Exists:
            problem = Transient("an object was there, and is gone", landed=False)
        except Transient as cut:
            problem = cut
            lost = lost or cut.landed
        with outcome_unknown(lost):
            found = await bucket.sha256(key, clock)
            if found is not None:
                return lost and found == sha256
            if isinstance(problem, Conflict) and not again:
                raise problem
            await clock.pause(problem)


@contextmanager
def outcome_unknown(lost: bool) -> Iterator[None]:
    """Turn StoreUnavailable into CommitUnknown where an answer to a write was `lost`."""
    try:
        yield
    except StoreUnavailable as error:
        if not lost:
            raise
        landed = "the object may have been written all the same, and nothing was deleted"
        raise CommitUnknown(f"{error}; {landed}") from error


# -------------------------------------------------------------------------------------------------------- multipart


async def _put_parts(bucket: Bucket, key: str, body: Body, during: Callable[[], None]) -> bool:
    restarts: Clock | None = None
    while True:
        try:
            made = await _upload(bucket, key, body, during)
        except Conflict as problem:
            restarts = restarts or bucket.clock("write", key)
            await restarts.pause(problem)
            continue
        with suppress(StoreUnavailable):  # the object is there; left-over parts only cost space
            await bucket.abort_all(key)
        return made


async def _upload(bucket: Bucket, key: str, body: Body, during: Callable[[], None]) -> bool:
    """Run one multipart upload from beginning to end; raise Conflict when it has to begin anew."""
    metadata = {DIGEST_KEY: body.sha256}
    begun = await bucket.persist("write", key, "create_multipart_upload", Key=key, Metadata=metadata)
    upload = str(begun["UploadId"])
    try:
        parts = await _send(bucket, key, upload, body)
        during()
        fields = {"UploadId": upload, "MultipartUpload": {"Parts": parts}}
        # After a conflict (409) S3 wants the whole upload anew; only a single put may be sent again as it is.
        return await _make_appear(bucket, "complete_multipart_upload", key, body.sha256, again=False, **fields)
    except FileNotFoundError:  # another writer has put the object and cleared this upload
        if await bucket.sha256(key, bucket.clock("stat", key)) is None:
            raise Conflict("the upload is gone, and there is no object") from None
        return False
    except CommitUnknown:  # the completion may yet land: aborting the upload could take its object away
        raise
    except BaseException:
        await _abort_once(bucket, key, upload)
        raise


async def _send(bucket: Bucket, key: str, upload: str, body: Body) -> list[Answer]:
    """Send all parts, a few at a time; return the list of parts that the completing request has to name."""
    step = max(bucket.limits.part_bytes, -(-body.size // MAX_PARTS))
    turns = asyncio.Semaphore(PARTS_SENT_AT_ONCE)

    async def send(number: int) -> Answer:
        async with turns:
            data = body.stretch(number * step, (number + 1) * step)
            fields: dict[str, Any] = {"UploadId": upload, "PartNumber": number + 1, "Body": data}
            answer = await bucket.persist("write", key, "upload_part", Key=key, **fields)
        # The completing request has to repeat what the store said about each part.
        checks = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
        return {"PartNumber": number + 1, **checks}

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(number)) for number in range(-(-body.size // step))]
    except BaseExceptionGroup as failures:  # callers tell failures apart by type, which a group would hide
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _abort_once(bucket: Bucket, key: str, upload: str) -> None:
    """Free the sent parts if the store answers at once; the caller reports the failure that led here."""
    with suppress(Exception):
        async with asyncio.timeout(bucket.seconds / 20):
            await bucket.request("abort_multipart_upload", Key=key, UploadId=upload)
