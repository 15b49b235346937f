"""Fetches the images of a list of URLs into a folder: http(s):// and s3://, within limits, and politely.

Servers, redirects and all that they send are untrusted. An address is checked where it is used: hosts are resolved by a
resolver that gives public addresses only, for redirects too, so no name can lead into a private network.
"""

import asyncio
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from pipelines.errors import HHNetError, StoreRefused, StoreUnavailable
from pipelines.ingest.image_rows import suffix_by_magic
from pipelines.ingest.skips import RETRYABLE, SkipReason
from pipelines.shards.folders import Unreadable
from pipelines.storage import Store

AT_ONCE = 64
"""Requests that one process makes at once, to all hosts together."""
REDIRECTS = 5
"""Redirects that are followed for one image."""
CONNECT_S = 10.0
"""Longest wait for a connection, in seconds."""
BACKOFF_S = 0.5
"""Wait before the second attempt at a URL, in seconds; it doubles with each further one."""
MAX_RETRY_AFTER_S = 60.0
"""Longest Retry-After that is waited for, in seconds; beyond it the image is left to a later run."""
CHUNK_BYTES = 1 << 16
HEAD_BYTES = 16
"""Bytes that tell the format of an image."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_GONE = frozenset({404, 410})
_TYPES = ("image/", "application/octet-stream", "binary/octet-stream")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class UrlReader:
    """The reader of a list of URLs: `fetch` has to bring the images of a tar before they are read.

    `per_host` is the number of requests at once to one host, of this process alone.
    """

    file_bytes: int
    per_host: int = 1
    attempts: int = 3
    timeout_s: float = 30.0
    private: bool = False

    def __call__(self, path: str, _stamp: str = "", /) -> bytes:
        """Refuse: a single image is never fetched by itself."""
        raise AssertionError(f"{path} was not fetched")

    def fetch(self, urls: Sequence[str], folder: Path, advance: Callable[[], None]) -> "Fetched":
        """Fetch these images into a new `folder`, many at once, and call `advance` for each.

        Raises StoreUnavailable if S3 is out of reach.
        """
        folder.mkdir()
        return Fetched(asyncio.run(_Fetch(self, folder, advance).run(urls)))


@dataclass(frozen=True)
class Fetched:
    """Reads fetched images; raises Unreadable for one that could not be fetched."""

    found: "Mapping[str, Path | FetchFailed]"

    def __call__(self, path: str, _stamp: str = "", /) -> bytes:
        """Return all bytes of an image, and delete its file."""
        file = self.found[path]
        if isinstance(file, FetchFailed):
            raise Unreadable(f"{path}: {file.detail}", file.detail, file.reason.value)
        data = file.read_bytes()
        file.unlink()
        return data


class FetchFailed(Exception):
    """An attempt failed, for this reason; `after` are the seconds that the server asks to wait."""

    def __init__(self, reason: SkipReason, detail: str, after: float | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.after = reason, detail, after


class _PrivateAddress(OSError):
    """A name leads to private addresses only."""


def is_url(text: str) -> bool:
    """Tell whether a cell holds a URL that can be fetched."""
    return text.startswith(("http://", "https://", "s3://"))


def find_url_fault(url: str) -> str:
    """Return why a URL cannot be fetched, whatever its server says, or "" if it may be."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "not a valid URL"
    if "@" in parts.netloc:
        return "a URL with credentials"
    if not host or port == 0 or not url.isprintable() or " " in url:
        return "not a valid URL"
    return "" if parts.scheme != "s3" or parts.path.strip("/") else "an S3 URL without a key"


def url_suffix(head: bytes) -> str | None:
    """Return the suffix of an image by its first bytes, without the dot, or None if it is of no known format."""
    if head[4:8] == b"ftyp":
        return "avif" if head[8:11] == b"avi" else "heic"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "ppm"
    found = suffix_by_magic(head)
    return found and found.removeprefix(".")


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the public Internet, also where it stands for another address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses alone."""

    def __init__(self) -> None:
        self._usual = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._usual.resolve(host, port, family)
        public = [one for one in found if is_public(one["host"])]
        if not public:
            raise _PrivateAddress(f"{host} is a private address")
        return public

    async def close(self) -> None:
        await self._usual.close()


@dataclass
class _Fetch:
    """The fetching of the images of one tar."""

    how: UrlReader
    folder: Path
    advance: Callable[[], None]
    found: dict[str, Path | FetchFailed] = field(default_factory=dict)
    resting: dict[str, float] = field(default_factory=dict)
    """Monotonic time before which a host is not asked again."""

    async def run(self, urls: Sequence[str]) -> dict[str, Path | FetchFailed]:
        """Fetch the images; of each host, and of all together, so many at once."""
        hosts: dict[str, list[tuple[Path, str]]] = {}
        for number, url in enumerate(urls):
            hosts.setdefault(urlsplit(url).netloc, []).append((self.folder / f"{number:06d}.image", url))
        self.gate = asyncio.Semaphore(AT_ONCE)
        async with self._session() as self.session:
            await asyncio.gather(
                *(
                    self._work(host, waiting)
                    for host, listed in hosts.items()
                    for waiting in [iter(listed)]
                    for _ in range(min(self.how.per_host, len(listed)))
                )
            )
        return self.found

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        resolver = aiohttp.ThreadedResolver() if self.how.private else _PublicResolver()
        connector = aiohttp.TCPConnector(limit=AT_ONCE, limit_per_host=self.how.per_host, resolver=resolver)
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            # Nothing is unpacked: a small answer could unfold to any size.
            headers={"User-Agent": "hhnet", "Accept": "image/*", "Accept-Encoding": "identity"},
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            yield session

    async def _work(self, host: str, waiting: Iterator[tuple[Path, str]]) -> None:
        """Fetch one image of a host after another."""
        for file, url in waiting:
            try:
                await self._fetch(host, url, file)
                self.found[url] = file
            except FetchFailed as error:
                file.unlink(missing_ok=True)
                self.found[url] = error
            self.advance()

    async def _fetch(self, host: str, url: str, file: Path) -> None:
        """Fetch an image, again after failures that may go away. Raises FetchFailed."""
        for attempt in range(self.how.attempts):
            while (rest := self.resting.get(host, 0.0) - time.monotonic()) > 0:
                await asyncio.sleep(rest)
            try:
                async with self.gate:
                    await (self._from_s3(url, file) if url.startswith("s3://") else self._from_web(url, file))
                return
            except FetchFailed as error:
                after = error.after or 0.0
                last = attempt + 1 == self.how.attempts
                if error.reason not in RETRYABLE or last or after > MAX_RETRY_AFTER_S:
                    raise
                if after:  # what it asks of one request it means for all
                    self.resting[host] = max(self.resting.get(host, 0.0), time.monotonic() + after)
                await asyncio.sleep(BACKOFF_S * 2**attempt)

    async def _from_s3(self, url: str, file: Path) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")

        def read() -> bytes:
            return Store(f"s3://{bucket}").read(key, self.how.file_bytes)

        try:
            data = await asyncio.to_thread(read)
        except FileNotFoundError:
            raise FetchFailed(SkipReason.MISSING, "no such object") from None
        except StoreRefused as error:
            raise FetchFailed(SkipReason.REFUSED, str(error)) from None
        except StoreUnavailable:  # not this image's fault: the run ends, and goes on when it is given again
            raise
        except HHNetError as error:
            raise FetchFailed(SkipReason.UNREADABLE, str(error)) from None
        self._check_size(len(data))
        self._check_head(data[:HEAD_BYTES])
        file.write_bytes(data)

    async def _from_web(self, url: str, file: Path) -> None:
        try:
            async with asyncio.timeout(self.how.timeout_s):
                await self._follow(url, file)
        except TimeoutError:
            raise FetchFailed(SkipReason.UNREACHABLE, f"not there within {self.how.timeout_s:g} s") from None
        except aiohttp.ClientConnectorError as error:
            private = isinstance(error.os_error, _PrivateAddress)
            said = str(error.os_error) if private else f"no connection: {error.strerror or error}"
            raise FetchFailed(SkipReason.PRIVATE if private else SkipReason.UNREACHABLE, said) from None
        except aiohttp.ClientPayloadError:
            raise FetchFailed(SkipReason.UNREACHABLE, "the answer was cut short") from None
        except ValueError as error:  # InvalidURL too
            raise FetchFailed(SkipReason.UNSAFE_NAME, f"not a valid URL: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise FetchFailed(SkipReason.UNREACHABLE, str(error) or type(error).__name__) from None

    async def _follow(self, url: str, file: Path) -> None:
        """Ask for an image, follow redirects to it, and save it."""
        for _ in range(REDIRECTS + 1):
            self._require_public(url)
            async with self.session.get(url, allow_redirects=False) as response:
                to = response.headers.get("Location")
                if response.status not in _REDIRECTS or to is None:
                    _check_answer(response)
                    self._check_size(response.content_length or 1)
                    await self._save(response, file)
                    return
                url = urljoin(url, to)
            if not url.startswith(("http://", "https://")) or find_url_fault(url):
                raise FetchFailed(SkipReason.REDIRECTED, "leads to an address that is no plain http or https URL")
        raise FetchFailed(SkipReason.REDIRECTED, f"more than {REDIRECTS} redirects")

    def _require_public(self, url: str) -> None:
        """Raise FetchFailed for a private address that is written as such: no resolver sees it."""
        host = urlsplit(url).hostname or ""
        try:
            public = self.how.private or is_public(host)
        except ValueError:  # a name
            return
        if not public:
            raise FetchFailed(SkipReason.PRIVATE, f"{host} is a private address")

    async def _save(self, response: aiohttp.ClientResponse, file: Path) -> None:
        size, head = 0, b""
        with file.open("wb") as sink:
            async for chunk in response.content.iter_chunked(CHUNK_BYTES):
                if len(head) < HEAD_BYTES:
                    head = (head + chunk)[:HEAD_BYTES]
                    if len(head) == HEAD_BYTES:
                        self._check_head(head)
                size += len(chunk)
                self._check_size(size)
                sink.write(chunk)
        self._check_size(size)
        self._check_head(head)

    def _check_size(self, size: int) -> None:
        if not size:
            raise FetchFailed(SkipReason.EMPTY, "")
        if size > self.how.file_bytes:
            raise FetchFailed(SkipReason.TOO_LARGE, f"more than {self.how.file_bytes} bytes")

    def _check_head(self, head: bytes) -> None:
        if url_suffix(head) is None:
            raise FetchFailed(SkipReason.NOT_AN_IMAGE, "its first bytes are of no known format")


def _check_answer(response: aiohttp.ClientResponse) -> None:
    """Raise FetchFailed for an answer that holds no image."""
    status = response.status
    said = f"the server answers {status} {response.reason or ''}".strip()
    if status in _PASSING:
        raise FetchFailed(SkipReason.UNREACHABLE, said, retry_after(response.headers.get("Retry-After", "")))
    if status != HTTPStatus.OK:
        raise FetchFailed(SkipReason.MISSING if status in _GONE else SkipReason.REFUSED, said)
    kind = response.headers.get("Content-Type", _TYPES[0]).strip().lower()
    if not kind.startswith(_TYPES):
        raise FetchFailed(SkipReason.NOT_AN_IMAGE, f"the server says it is {kind.partition(';')[0][:80]}")


def retry_after(text: str) -> float | None:
    """Return the seconds that a Retry-After header asks for, as a number or a date; None if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (when.astimezone(UTC) - datetime.now(UTC)).total_seconds())
