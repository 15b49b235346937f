"""A strict, bounded reader of tar streams; it never touches the file system.

`tarfile` ends a stream quietly at a damaged or missing header, and reads headers of any length into memory. Here an
invalid header is an error, and so is a stream without its end-of-archive marker. `TarLimits` bounds the cost of a
hostile archive.
"""

import hashlib
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

BLOCK_BYTES = 512
MAX_HEADER_BYTES = 1 << 20
"""Largest sum of the extended headers in front of one entry, in bytes."""
MAX_MEMBER_BYTES = 256 << 20
"""Largest member of a sample, in bytes."""
MAX_NAME_BYTES = 1024
"""Longest name of an entry, in bytes of UTF-8."""
SKIP_BYTES = 1 << 20
"""Bytes read at a time where content is passed over."""

_SPARSE_GOES_ON, _SPARSE_MORE = 482, 504
"""Offsets in the header of a GNU sparse file, and in a block of its map, of the flag that another block follows."""
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}


class TarReason(StrEnum):
    """A reason not to take a tar, or something in it. A closed list: readers may switch on it."""

    TRUNCATED = "truncated"
    """The archive ends before its end-of-archive marker."""
    BAD_HEADER = "bad_header"
    """A header is invalid, or contradicts itself; the next one cannot be found."""
    TRAILING_DATA = "trailing_data"
    """Something follows the end-of-archive marker."""
    TOO_LARGE = "too_large"
    """A member, a header or the archive is larger than its limit."""
    TOO_MANY = "too_many"
    """The archive has more entries than its limit."""
    TOO_SLOW = "too_slow"
    """Reading took longer than its limit."""
    LINK = "link"
    """A symbolic or hard link; nothing is followed."""
    SPECIAL = "special"
    """A device, a FIFO or a sparse file."""
    UNSAFE_NAME = "unsafe_name"
    """The name is absolute or leads out of the archive."""
    BAD_NAME = "bad_name"
    """The name is too long, is not UTF-8, or has control characters."""
    NO_KEY = "no_key"
    """The name has no suffix, so it belongs to no sample."""
    NO_IMAGE = "no_image"
    """No member of the sample is an image."""
    SEVERAL_IMAGES = "several_images"
    """More than one member of the sample is an image."""
    DUPLICATE_KEY = "duplicate_key"
    """An earlier sample has this key."""
    INTERLEAVED = "interleaved"
    """Members of other samples stand between those of this one."""
    BAD_METADATA = "bad_metadata"
    """The `cls` or `json` member cannot be read, or its label is not a possible one."""


class TarDamaged(Exception):
    """The stream is not a whole tar archive within the limits; the message names the place of the damage."""

    def __init__(self, reason: TarReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class TarBeyondLimits(TarDamaged):
    """The archive exceeds `TarLimits`, so nothing more of it is read."""


class Readable(Protocol):
    """A source of a tar's bytes."""

    def read(self, size: int, /) -> bytes:
        """Read at most `size` bytes; none at the end."""
        ...


class Hashed:
    """A stream that counts and hashes its bytes as they are read."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._digest, self._size = stream, hashlib.sha256(), 0
        self.head = b""
        """The bytes of the first read."""

    def read(self, size: int, /) -> bytes:
        """Read at most `size` bytes; none at the end."""
        data = self._stream.read(size)
        self._digest.update(data)
        self.head = data if not self._size else self.head
        self._size += len(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Read on to the end; return size and hex sha256 of the whole stream."""
        while self.read(SKIP_BYTES):
            pass
        return self._size, self._digest.hexdigest()


@dataclass(frozen=True, slots=True)
class TarLimits:
    """The limits on the cost of an archive to its reader."""

    member_bytes: int = MAX_MEMBER_BYTES
    """Largest content held in memory, in bytes; a larger member is passed over."""
    entries: int = 4_000_000
    """Largest number of headers of any type."""
    total_bytes: int = 1 << 40
    seconds: float = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry: its name, where its content starts in the archive, its size, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    kind: Literal["file", "folder", "link", "special"]
    """`file`, `folder`, `link`, or `special` (devices, FIFOs, sparse files)."""
    target: str = ""
    """Name of the entry that a hard link refers to, else empty."""

    @property
    def refusal(self) -> TarReason | None:
        """Why the entry cannot be a member of a sample by its type, name and size, or None."""
        if self.kind in ("link", "special"):
            return TarReason.LINK if self.kind == "link" else TarReason.SPECIAL
        if self.name.startswith("/") or ".." in self.name.split("/"):
            return TarReason.UNSAFE_NAME
        if len(self.name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES or not _is_plain_name(self.name):
            return TarReason.BAD_NAME
        return TarReason.TOO_LARGE if self.size > MAX_MEMBER_BYTES else None


def _is_plain_name(name: str) -> bool:
    return not any(char < " " or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in name)


def read_tar(
    stream: Readable, wanted: Callable[[TarEntry], bool] | None = None, limits: TarLimits | None = None
) -> Iterator[tuple[TarEntry, bytes | None]]:
    """Yield every entry of a tar in order, with the content of the files that are `wanted` (default: all of them).

    A file above `limits.member_bytes` comes without content. Raises TarDamaged if the stream is cut, altered, or goes
    on after its end-of-archive marker, and its subclass TarBeyondLimits if it exceeds another limit.
    """
    limits = limits or TarLimits()
    source = _Bounded(stream, limits)
    extended: dict[str, str] = {}
    entries = header_bytes = 0
    while True:
        header = source.exactly(BLOCK_BYTES, "a header")
        if not any(header):  # the first of two blocks of zeros that end an archive
            _check_end(source)
            return
        entries += 1
        if entries > limits.entries:
            raise TarBeyondLimits(TarReason.TOO_MANY, f"the tar has more than {limits.entries} entries")
        info = _parse_header(header, source.offset - BLOCK_BYTES)
        if info.type in _LONG_NAMES or info.type in _EXTENDED or info.type == tarfile.XGLTYPE:
            header_bytes += info.size
            fields = _header_fields(info.type, _header_content(source, info.size, header_bytes))
            if fields.keys() & extended.keys():
                where = f"in front of byte {source.offset}"
                raise TarDamaged(TarReason.BAD_HEADER, f"two extended headers {where} contradict each other")
            extended |= fields
            continue
        if info.type == tarfile.GNUTYPE_SPARSE and header[_SPARSE_GOES_ON]:
            header_bytes = _skip_sparse_map(source, header_bytes)
        entry = _entry(info, extended, source.offset)
        extended, header_bytes = {}, 0
        # Links, folders, devices and FIFOs have no content, whatever size they declare.
        content_size = entry.size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
        if entry.kind == "file" and entry.size <= limits.member_bytes and (wanted is None or wanted(entry)):
            yield entry, source.exactly(entry.size, entry.name)
        else:
            source.skip(content_size, entry.name)
            yield entry, None
        source.skip(-content_size % BLOCK_BYTES, entry.name)  # contents are filled up to whole blocks


class _Bounded:
    """The stream with its offset. A short read raises TarDamaged, a read beyond the limits TarBeyondLimits."""

    def __init__(self, stream: Readable, limits: TarLimits) -> None:
        self.stream, self.limits, self.offset = stream, limits, 0
        self.deadline = time.monotonic() + limits.seconds

    def exactly(self, size: int, what: str) -> bytes:
        data = self.read(size)
        while len(data) < size:
            more = self.read(size - len(data))
            if not more:
                raise TarDamaged(TarReason.TRUNCATED, f"the tar ends inside {what[:200]}, at byte {self.offset}")
            data += more
        return data

    def read(self, size: int) -> bytes:
        if time.monotonic() > self.deadline:
            raise TarBeyondLimits(TarReason.TOO_SLOW, f"the tar took more than {self.limits.seconds:g} s to read")
        data = self.stream.read(size)
        self.offset += len(data)
        if self.offset > self.limits.total_bytes:
            raise TarBeyondLimits(TarReason.TOO_LARGE, f"the tar has more than {self.limits.total_bytes} bytes")
        return data

    def skip(self, size: int, what: str) -> None:
        while size > 0:
            size -= len(self.exactly(min(size, SKIP_BYTES), what))


def _check_end(source: _Bounded) -> None:
    if any(source.exactly(BLOCK_BYTES, "the end-of-archive marker")):
        where = f"at byte {source.offset - 2 * BLOCK_BYTES}"
        raise TarDamaged(TarReason.BAD_HEADER, f"the tar has half an end-of-archive marker {where}")
    while tail := source.read(SKIP_BYTES):
        if tail.count(0) != len(tail):
            raise TarDamaged(TarReason.TRAILING_DATA, "the tar goes on after its end-of-archive marker")


def _parse_header(header: bytes, offset: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarDamaged(TarReason.BAD_HEADER, f"no valid tar header at byte {offset}: {error}") from None
    if info.size < 0:
        raise TarDamaged(TarReason.BAD_HEADER, f"the tar header at byte {offset} declares a negative size")
    return info


def _header_content(source: _Bounded, size: int, pending: int) -> bytes:
    """Read an extended header's content; `pending` bytes of headers, this one included, precede the next entry."""
    if pending > MAX_HEADER_BYTES:
        message = f"the tar holds a header of {pending} bytes, the limit is {MAX_HEADER_BYTES}"
        raise TarDamaged(TarReason.TOO_LARGE, message)
    content = source.exactly(size, "a header")
    source.skip(-size % BLOCK_BYTES, "a header")
    return content


def _skip_sparse_map(source: _Bounded, pending: int) -> int:
    """Skip the further blocks of a GNU sparse file's map; return `pending` plus their bytes."""
    while True:
        block = _header_content(source, BLOCK_BYTES, pending := pending + BLOCK_BYTES)
        if not block[_SPARSE_MORE]:
            return pending


def _header_fields(kind: bytes, content: bytes) -> dict[str, str]:
    """Return the fields that an extended header sets for the next entry.

    A global header must not set where entries lie or what they are called: that would change every later entry.
    """
    if kind in _LONG_NAMES:
        return {_LONG_NAMES[kind]: _decode_name(content.rstrip(b"\0"))}
    fields = _pax_fields(content)
    if kind in _EXTENDED:
        return fields
    if any(key in ("path", "linkpath", "size") or key.startswith("GNU.sparse") for key in fields):
        raise TarDamaged(TarReason.BAD_HEADER, "the tar holds a global header that names or sizes every entry")
    return {}


def _pax_fields(content: bytes) -> dict[str, str]:
    """Parse the records `<length> <key>=<value>\\n` of an extended header."""
    fields: dict[str, str] = {}
    content = content.rstrip(b"\0")
    start = 0
    while start < len(content):
        digits, space, _ = content[start : start + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[start + len(digits) + 1 : start + length]
        key, equals, value = record[:-1].partition(b"=")
        # A length counts its own digits too, and at least the space, the "=" and the line end.
        if not len(digits) + 3 <= length <= len(content) - start or not equals or not record.endswith(b"\n"):
            raise TarDamaged(TarReason.BAD_HEADER, "the tar holds a damaged extended header")
        fields[_decode_name(key)] = _decode_name(value)
        start += length
    return fields


def _entry(info: tarfile.TarInfo, extended: dict[str, str], offset: int) -> TarEntry:
    # For a sparse file, `path` is a made-up name; the real one is in GNU.sparse.name.
    name = extended.get("GNU.sparse.name", extended.get("path", info.name))
    size = extended.get("size", str(info.size))
    if not size.isascii() or not size.isdigit() or len(size) > 19:
        message = f"the tar declares the size {size[:40]!r} for {name[:200]!r}"
        raise TarDamaged(TarReason.BAD_HEADER, message)
    sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in extended)
    kind: Literal["file", "folder", "link", "special"] = "file" if info.isreg() and not sparse else "special"
    if info.issym() or info.islnk():
        kind = "link"
    elif info.isdir():
        kind = "folder"
    target = extended.get("linkpath", info.linkname) if info.islnk() else ""
    return TarEntry(name, offset, int(size), kind, target)


def _decode_name(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
