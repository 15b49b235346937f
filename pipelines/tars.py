"""A strict, bounded reader of tar streams; it never touches the file system.

`tarfile` ends a stream quietly at a damaged or missing header, and reads headers of any length into memory. Here a
stream that does not end in its end-of-archive marker is an error, as is a header that is not one.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20
SKIP_BYTES = 1 << 20

_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_EXTENDED = {tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE}


class TarDamaged(Exception):
    """The stream is not a whole tar archive; the message says where it breaks."""


class Readable(Protocol):
    """What a tar is read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        ...


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry: its name, where its content starts in the archive, its size, and whether it is a plain file."""

    name: str
    offset: int
    size: int
    kind: str
    """`file`, `folder`, `link`, or `special` (devices, FIFOs, sparse files)."""


def read_tar(
    stream: Readable, wanted: Callable[[TarEntry], bool] | None = None
) -> Iterator[tuple[TarEntry, bytes | None]]:
    """Every entry of a tar in order, with the content of those files that are `wanted` (default: all of them).

    Bounds are the caller's: `wanted` sees name and size before any content is held. Raises TarDamaged where the
    stream is cut, altered, or goes on after its end-of-archive marker.
    """
    source = _Counted(stream)
    extended: dict[str, str] = {}
    while True:
        header = source.exactly(BLOCK, "a header")
        if not any(header):
            _check_end(source)
            return
        info = _parse_header(header, source.offset - BLOCK)
        if info.type in _LONG_NAMES or info.type in _EXTENDED or info.type == tarfile.XGLTYPE:
            content = _header_content(source, info)
            if info.type in _LONG_NAMES:
                extended[_LONG_NAMES[info.type]] = _text(content.rstrip(b"\0"))
            elif info.type in _EXTENDED:
                extended |= _pax_fields(content)
            continue
        entry = _entry(info, extended, source.offset)
        extended = {}
        content_size = entry.size if entry.kind in ("file", "special") else 0
        if entry.kind == "file" and (wanted is None or wanted(entry)):
            yield entry, source.exactly(entry.size, entry.name)
        else:
            source.skip(content_size, entry.name)
            yield entry, None
        source.skip(-content_size % BLOCK, entry.name)


class _Counted:
    """The stream with its offset, on which a short read is an error."""

    def __init__(self, stream: Readable) -> None:
        self.stream, self.offset = stream, 0

    def exactly(self, size: int, what: str) -> bytes:
        data = self.stream.read(size)
        while len(data) < size:
            more = self.stream.read(size - len(data))
            if not more:
                raise TarDamaged(f"the tar ends inside {what}, at byte {self.offset + len(data)}")
            data += more
        self.offset += size
        return data

    def skip(self, size: int, what: str) -> None:
        while size > 0:
            size -= len(self.exactly(min(size, SKIP_BYTES), what))


def _check_end(source: _Counted) -> None:
    if any(source.exactly(BLOCK, "the end-of-archive marker")):
        raise TarDamaged(f"the tar has half an end-of-archive marker at byte {source.offset - 2 * BLOCK}")
    while tail := source.stream.read(SKIP_BYTES):
        if any(tail):
            raise TarDamaged("the tar goes on after its end-of-archive marker")


def _parse_header(header: bytes, offset: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise TarDamaged(f"no valid tar header at byte {offset}: {error}") from None
    if info.size < 0:
        raise TarDamaged(f"the tar header at byte {offset} declares a negative size")
    return info


def _header_content(source: _Counted, info: tarfile.TarInfo) -> bytes:
    if info.size > MAX_HEADER_BYTES:
        raise TarDamaged(f"the tar holds a header of {info.size} bytes, the limit is {MAX_HEADER_BYTES}")
    content = source.exactly(info.size, "a header")
    source.skip(-info.size % BLOCK, "a header")
    return content


def _pax_fields(content: bytes) -> dict[str, str]:
    """The records `<length> <key>=<value>\\n` of an extended header."""
    fields: dict[str, str] = {}
    while content.rstrip(b"\0"):
        digits, space, _ = content[:20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = content[len(digits) + 1 : length]
        key, equals, value = record[:-1].partition(b"=")
        if not len(digits) + 3 <= length <= len(content) or not equals or not record.endswith(b"\n"):
            raise TarDamaged("the tar holds a damaged extended header")
        fields[_text(key)] = _text(value)
        content = content[length:]
    return fields


def _entry(info: tarfile.TarInfo, extended: dict[str, str], offset: int) -> TarEntry:
    name, size = extended.get("path", info.name), extended.get("size", str(info.size))
    if not size.isascii() or not size.isdigit() or len(size) > 19:
        raise TarDamaged(f"the tar declares the size {size[:40]!r} for {name[:200]!r}")
    if info.issym() or info.islnk():
        kind = "link"
    elif info.isdir():
        kind = "folder"
    elif info.isreg() and not info.issparse() and not any(key.startswith("GNU.sparse") for key in extended):
        kind = "file"
    else:
        kind = "special"
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise TarDamaged(f"the tar holds a sparse file, {name[:200]!r}: write it without --sparse")
    return TarEntry(name, offset, int(size), kind)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
