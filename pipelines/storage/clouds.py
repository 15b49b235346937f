"""Stores of Google (`gs://`), Azure (`az://`) and Hugging Face (`hf://`), reached through fsspec.

Each takes its keys and its address from the environment, as its own tools do. A put is one request that the store
refuses where the name is taken. Where no such request has been proven against a server of the kind, the store is for
reading. `tests/integration/test_clouds.py` holds the proofs.
"""

import asyncio
import hashlib
import io
import logging
import math
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import aiohttp
from fsspec import AbstractFileSystem
from fsspec.asyn import get_loop, sync

from pipelines.errors import ConfigError, ReadOnlyStore, StoreRefused
from pipelines.storage.blocks import BLOCK_BYTES, open_blocks
from pipelines.storage.clock import (
    BUSY,
    NOT_IMPLEMENTED,
    THROTTLING,
    Clock,
    Conflict,
    Exists,
    Throttled,
    Transient,
    deadline_s,
    one_line,
)
from pipelines.storage.digests import sha256_of
from pipelines.storage.failpoints import failpoint
from pipelines.storage.limiter import limiter_of
from pipelines.storage.objects import ObjectInfo
from pipelines.storage.unsigned import is_unsigned
from pipelines.storage.writes import outcome_unknown

WRITER_KEY = "hhnet-writer"
"""Metadata of an object that is put, where the store takes some: a random name of the call that put it."""
SLOWEST_BYTES_S = 1 << 20
"""Rate of an upload below which it is given up, beyond the deadline, in bytes a second."""
PAST_THE_END = 416
"""Status of an answer to a request for bytes beyond the end of an object."""
_LIBRARIES = ("azure", "gcsfs", "google", "httpx", "httpx2", "huggingface_hub", "requests")
"""Packages whose own exceptions tell of the store or of the way to it."""

_NEVER_SENT = {"ClientConnectorError", "ServiceRequestError", "ConnectError", "ConnectTimeout"}
"""Exceptions of those packages that mean that there was not even a connection."""
_OF_KEYS = ("Auth", "Credential", "Signing")
"""Words in the names of exceptions that mean that the keys are wrong or missing."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cloud:
    """A kind of store: how it is opened, written and asked."""

    extra: str
    """Extra of hhnet that installs its library."""
    open: Callable[[str], AbstractFileSystem]
    """Return the file system of a bucket, from the cache of its library; ImportError without the library."""
    create: Callable[[AbstractFileSystem, str, bytes | Path, str], None] | None = None
    """Put an object with the name of the writer, or raise FileExistsError; None where that cannot be had."""
    most_bytes: int | None = None
    """Largest object that can be put."""
    reading: Mapping[str, str] = field(default_factory=dict)
    """What a read has to say besides the range."""
    bucket_parts: int = 1
    """Parts of a path that name the bucket."""


def _silence(library: str) -> None:
    """Keep a library from logging what it raises as well, with tracebacks, and each of its own retries."""
    logging.getLogger(library).setLevel(logging.CRITICAL)


def _open_gcs(bucket: str) -> AbstractFileSystem:
    # gcsfs.GCSFileSystem would ask another API, over gRPC, for the kind of each bucket.
    from gcsfs.core import GCSFileSystem

    _silence("gcsfs")
    token = "anon" if is_unsigned(bucket) else None
    return GCSFileSystem(token=token, consistency="md5", use_listings_cache=False)


def _create_on_gcs(fs: AbstractFileSystem, path: str, data: bytes | Path, writer: str) -> None:
    whole = data if isinstance(data, bytes) else data.read_bytes()
    # In one request, whatever the size: of an upload in parts, the condition was not kept by the server of the tests.
    fs.pipe_file(path, whole, metadata={WRITER_KEY: writer}, chunksize=len(whole) + 1, mode="create")


def _open_azure(bucket: str) -> AbstractFileSystem:
    from adlfs import AzureBlobFileSystem

    return AzureBlobFileSystem(anon=True if is_unsigned(bucket) else None, use_listings_cache=False)


def _create_on_azure(fs: AbstractFileSystem, path: str, data: bytes | Path, writer: str) -> None:
    # No retries of the library: it would take the object of its own lost try for another writer's.
    if isinstance(data, bytes):
        fs.pipe_file(path, data, mode="create", retry_total=0)
    else:
        fs.put_file(str(data), path, mode="create", retry_total=0)


def _open_hub(repository: str) -> AbstractFileSystem:
    from huggingface_hub import HfFileSystem

    _silence("huggingface_hub")
    return HfFileSystem()


CLOUDS = {
    "gs": Cloud("gs", _open_gcs, _create_on_gcs, most_bytes=1 << 30),
    "az": Cloud("az", _open_azure, _create_on_azure),
    "hf": Cloud("hf", _open_hub, reading={"cache_type": "none"}, bucket_parts=2),
}
"""The kinds by their schemes."""


class CloudObjects:
    """Objects below a prefix of a bucket; each call may raise FileNotFoundError or StoreUnavailable."""

    def __init__(self, scheme: str, root: str) -> None:
        self._cloud, self._root, self._uri = CLOUDS[scheme], root, f"{scheme}://{root}"
        parts = root.split("/")
        typed = scheme == "hf" and parts[0] in ("datasets", "spaces")
        self._bucket = "/".join(parts[: self._cloud.bucket_parts + typed])
        self._limited = f"{scheme}://{self._bucket}"
        self._seconds = deadline_s()
        try:
            self._cloud.open(self._bucket)
        except ImportError as error:
            raise ConfigError(
                f"{scheme}://... needs a library that is not installed ({error.name}): "
                f"pip install 'hhnet[{self._cloud.extra}]'"
            ) from None
        except Exception as error:  # each library has its own for keys and addresses that make no sense
            raise ConfigError(f"{self._limited} cannot be opened: {one_line(error)}: check its variables") from error

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return all bytes of an object, or the first `limit` + 1, fetched block by block."""
        data = bytearray()
        while limit is None or len(data) <= limit:
            size = BLOCK_BYTES if limit is None else min(BLOCK_BYTES, limit + 1 - len(data))
            block, end = self._block(name, len(data), len(data) + size)
            data += block
            if end is not None:
                break
        return bytes(data)

    def open(self, name: str, block: int | None = None, start: int = 0) -> io.BufferedReader:
        """Open a stream that holds one block at a time, of 8 MiB or less."""
        return open_blocks(lambda start, stop: self._block(name, start, stop), block, start)

    def size(self, name: str) -> int:
        """Return the bytes of an object."""
        return int(cast(int, self._info(name)["size"]))

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        """List the objects below a prefix, by name; none if the bucket does not exist."""
        below, cut = self._path(prefix), len(self._root) + 1
        try:
            found = self._persist("list", prefix, lambda fs: fs.find(below, detail=True))
        except FileNotFoundError:
            return {}
        return {
            path[cut:]: ObjectInfo(int(facts["size"]), _modified(facts))
            for path, facts in found.items()
            if path.startswith(f"{below}/") and not path.endswith("/")
        }

    def folders(self, prefix: str) -> list[str]:
        """List the folders directly below `prefix`; none if the bucket does not exist."""
        below = self._path(prefix)
        try:
            found = self._persist("list", prefix, lambda fs: fs.ls(below, detail=True))
        except FileNotFoundError:
            return []
        folders = [str(facts["name"]).rstrip("/") for facts in found if facts["type"] == "directory"]
        return [path[len(below) + 1 :] for path in folders if path.startswith(f"{below}/")]

    def require(self) -> None:
        """Raise FileNotFoundError unless the bucket exists."""
        self._persist("list", "", lambda fs: fs.info(self._bucket))

    def delete(self, name: str) -> None:
        """Delete an object."""
        self._require_writable()
        self._persist("delete", name, lambda fs: fs.rm_file(self._path(name)))

    def delete_all(self, prefix: str) -> None:
        """Delete all objects below a prefix."""
        for name in self.entries(prefix):
            self.delete(name)

    def uploads(self) -> dict[str, ObjectInfo]:
        """Return {}: what was not committed is in no list, and the store drops it after a week."""
        return {}

    def abort(self, name: str) -> None:
        """Do nothing: the store drops what was not committed."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Put an object if absent. Raises ReadOnlyStore where that cannot be promised."""
        self._require_writable()
        size, most = len(data) if isinstance(data, bytes) else data.stat().st_size, self._cloud.most_bytes
        if most is not None and size > most:
            raise StoreRefused(
                f"cannot write {self._uri}/{name}: {size:,} bytes are more than the {most:,} that one request puts "
                "there: make smaller tars or parts"
            )
        failpoint(point)
        try:
            return cast(bool, sync(get_loop(), self._put, name, data, size))
        except FileNotFoundError:
            raise StoreRefused(f"cannot write {self._uri}/{name}: there is no such bucket: check its name") from None

    async def _put(self, name: str, data: bytes | Path, size: int) -> bool:
        create, path, writer = self._cloud.create, self._path(name), uuid.uuid4().hex
        assert create is not None
        clock = self._clock("write", name, self._seconds + size / SLOWEST_BYTES_S)
        lost = False
        while True:
            try:
                await clock.attempt(lambda: self._call(clock.what, lambda fs: create(fs, path, data, writer)))
                return True
            except Exists:
                problem = Transient("an object was there, and is gone", landed=False)
            except Transient as cut:
                problem = cut
                lost = lost or cut.landed
            with outcome_unknown(lost):
                try:
                    there = await clock.persist(lambda: self._call(clock.what, lambda fs: _written(fs, path)))
                    return there == writer if there else lost and await self._holds(path, data, clock)
                except FileNotFoundError:
                    await clock.pause(problem)

    async def _holds(self, path: str, data: bytes | Path, clock: Clock) -> bool:
        """Tell whether the object has these bytes; of a large one a block at a time is in memory."""
        digest, place, block = hashlib.sha256(), 0, b""
        while place == 0 or block:
            fetch = partial(self._fetch, path=path, start=place, stop=place + BLOCK_BYTES)
            block = await clock.persist(lambda fetch=fetch: self._call(clock.what, fetch))  # type: ignore[misc]
            digest.update(block)
            place += len(block) or 1
        return digest.hexdigest() == sha256_of(data)

    def _fetch(self, fs: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
        try:
            return cast(bytes, fs.cat_file(path, start=start, end=stop, **self._cloud.reading))
        except Exception as error:
            if _status(error) != PAST_THE_END:
                raise
            return b""

    def _block(self, name: str, start: int, stop: int) -> tuple[bytes, int | None]:
        """Return the bytes [start, stop) of an object, as far as it reaches, and its end if it ends within them."""
        data = self._persist("read", name, partial(self._fetch, path=self._path(name), start=start, stop=stop))
        if len(data) > stop - start:
            raise StoreRefused(f"cannot read {self._uri}/{name}: the store sends more than it is asked for")
        return data, start + len(data) if len(data) < stop - start else None

    def _info(self, name: str) -> dict[str, object]:
        path = self._path(name)
        facts = self._persist("stat", name, lambda fs: cast(dict[str, object], fs.info(path)))
        if facts["type"] != "file":
            raise FileNotFoundError(f"{self._uri}/{name}")
        return facts

    def _require_writable(self) -> None:
        if self._cloud.create is None:
            raise ReadOnlyStore(
                f"{self._uri} is for reading: its store cannot put a file only if there is none: write to a local "
                "folder, s3://, gs:// or az://"
            )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _clock(self, operation: str, name: str, seconds: float) -> Clock:
        return Clock(f"{operation} {self._uri}/{name}", seconds, limiter_of(self._limited))

    def _persist(self, operation: str, name: str, work: Callable[[AbstractFileSystem], _T]) -> _T:
        clock = self._clock(operation, name, self._seconds)
        return cast(_T, sync(get_loop(), clock.persist, lambda: self._call(clock.what, work)))

    async def _call(self, what: str, work: Callable[[AbstractFileSystem], _T]) -> _T:
        """Do work on the file system, in a thread, since not each library is asynchronous; judge its failure."""
        try:
            return await _in_thread(lambda: work(self._cloud.open(self._bucket)))
        except Exception as error:
            judged = _judged(error, what)
            if judged is error:
                raise
            raise judged from error


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Do work in a thread of its own, which does not hold up the end of the process when its call was given up.

    The threads of the event loop would not do: the libraries wait in them, and look up the names of hosts there.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def tell(result: _T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(cast(_T, result))
        else:
            done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, failure)

    threading.Thread(target=run, name="cloud", daemon=True).start()
    return await done


def _written(fs: AbstractFileSystem, path: str) -> str:
    """Return who put an object, or "" where that is not known. Raises FileNotFoundError for a missing one."""
    facts = fs.info(path)
    if facts["type"] != "file":
        raise FileNotFoundError(path)
    return str((facts.get("metadata") or {}).get(WRITER_KEY, ""))


def _modified(facts: Mapping[str, object]) -> float:
    """Return the time of the last change; one that is not known is later than all, so nothing counts as old."""
    when = facts.get("mtime") or facts.get("last_modified")
    return float(when.timestamp()) if when else math.inf  # type: ignore[attr-defined]


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an exception of any of the libraries carries."""
    response = getattr(error, "response", None)
    places = ((error, "status_code"), (error, "code"), (response, "status_code"))
    found = (getattr(place, name, None) for place, name in places)
    return next((status for status in found if isinstance(status, int)), None)


def _judged(error: Exception, what: str) -> Exception:
    """Return the failure in the words of the clock; one that is a fault of this program is returned as it is."""
    status, problem = _status(error), one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, FileExistsError) or status == 412:
        return Exists(what)
    if isinstance(error, FileNotFoundError) or status == 404:
        return FileNotFoundError(what)
    if status == 409:
        return Conflict(problem)
    if status in THROTTLING:
        return Throttled(problem, landed=status not in BUSY)
    if (
        status in BUSY
        or ((status or 0) >= 500 and status != NOT_IMPLEMENTED)
        or (status is None and _is_on_the_way(error))
    ):
        return Transient(problem, landed=status not in BUSY and type(error).__name__ not in _NEVER_SENT)
    if status is None and not isinstance(error, OSError | ValueError) and not _is_of_a_library(error):
        return error
    hint = "check the keys, what they may do, and the address"
    return StoreRefused(f"cannot {what}: {problem}: the store refuses this request for good; {hint}")


def _is_on_the_way(error: Exception) -> bool:
    if isinstance(error, aiohttp.ClientError | ConnectionError | TimeoutError):
        return True
    return _is_of_a_library(error) and not any(word in type(error).__name__ for word in _OF_KEYS)


def _is_of_a_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in _LIBRARIES
