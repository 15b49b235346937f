"""Lists and reads the members of a zip under the names that their writer meant.

A name is UTF-8 if its flag says so, else that of the Unicode path field, else UTF-8 if it is valid UTF-8 (macOS and old
Info-ZIP set no flag), else code page 437. Some Windows programs write `\\` between folders.
"""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipelines.errors import InputError
from pipelines.shards.folders import Found, Read, Unreadable

_NO_MEMBERS = b"PK\x05\x06" + bytes(18)
"""A zip without members."""
_UTF8_FLAG = 0x800
_UNICODE_PATH = 0x7075
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError, OverflowError)
"""Exceptions from damaged members; the last two from names that are no text, and from offsets outside the zip."""
_WINDOWS = frozenset({0, 10, 11, 14})
"""Numbers in a zip for systems on which no name can hold a backslash: FAT, NTFS and VFAT."""


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip. Raises InputError if it is none, or only one part of a split zip."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as a zip: {error}") from None
    if any(info.volume for info in archive.infolist()):
        archive.close()
        raise InputError(
            f"{path} is a part of a split zip: join the parts, as zip -s 0 {path.name} --out joined.zip does"
        )
    return archive


def list_zip(archive: zipfile.ZipFile) -> Iterator[Found]:
    """Yield every member; the `place` of a file is its ZipInfo."""
    infos = archive.infolist()
    for info, name in zip(infos, _meant_names(infos), strict=True):
        mode = stat.S_IFMT(info.external_attr >> 16)
        if name.endswith("/"):
            yield Found(name, 0, "folder")
        elif mode not in (0, stat.S_IFREG):
            yield Found(name, 0, "link" if mode == stat.S_IFLNK else "special")
        elif hindrance := _hindrance(info):
            yield Found(name, info.file_size, "unreadable", hindrance)
        else:
            yield Found(name, info.file_size, place=info, stamp=content_stamp(info.file_size, info.CRC))


def list_guessed_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names without any sign of their encoding; they are read as code page 437."""
    return [name for name, sure in map(_said, archive.infolist()) if not sure]


def content_stamp(size: int, crc: int) -> str:
    """Return the stamp of a file whose CRC-32 is known without reading the file again."""
    return f"{size}-{crc:08x}"


def zip_reader(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Read:
    """Return a function that reads a member by its path, and raises Unreadable if it cannot.

    It holds the bytes against the CRC-32 that the zip's directory has, and so against the stamp.
    """

    def read(path: str, _stamp: str = "", /) -> bytes:
        info = members[path]
        try:
            with archive.open(info) as stream:
                # With a size given, the decompressor stops there, even if the compressed bytes would unfold to more.
                data = stream.read(info.file_size + 1)
        except _BROKEN as error:
            raise Unreadable(f"{archive.filename}: cannot read {path}: {error}", str(error)) from None
        if len(data) != info.file_size:
            detail = f"it has {len(data)} bytes, not {info.file_size}"
            raise Unreadable(f"{archive.filename}: cannot read {path}: {detail}", detail)
        return data

    return read


@dataclass(frozen=True)
class SomeMembers:
    """Reads some members of a zip in another process, which opens the zip at its first read."""

    archive: str
    members: Mapping[str, zipfile.ZipInfo]

    def __call__(self, path: str, stamp: str = "", /) -> bytes:
        """Return all bytes of a member."""
        return zip_reader(_opened(self.archive), self.members)(path, stamp)


@cache
def _opened(path: str) -> zipfile.ZipFile:
    """Open a zip without its directory, which may be large: the members that are read are known already."""
    archive = zipfile.ZipFile(io.BytesIO(_NO_MEMBERS))
    archive.fp = Path(path).open("rb")  # noqa: SIM115 - stays open as long as the process
    return archive


def _hindrance(info: zipfile.ZipInfo) -> str:
    """Return why a member cannot be unpacked here, or "" if it can."""
    if info.flag_bits & 1:
        return "encrypted: unpack it"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "compressed by a method other than deflate: pack it anew"
    return ""


def _meant_names(infos: Sequence[zipfile.ZipInfo]) -> list[str]:
    """Return the names with `/` between folders; the name of a folder ends with one."""
    names = [_said(info)[0] for info in infos]
    # Without a single slash, backslashes separate folders on whatever system the zip was written.
    slashes = any("/" in name for name in names)
    return [
        name.replace("\\", "/") if info.create_system in _WINDOWS or not slashes else name
        for info, name in zip(infos, names, strict=True)
    ]


def _said(info: zipfile.ZipInfo) -> tuple[str, bool]:
    """Return the name, and whether the zip states its encoding or the bytes show it."""
    name = info.orig_filename
    if info.flag_bits & _UTF8_FLAG:
        return name, True
    raw = name.encode("cp437")  # zipfile decodes names without the flag as code page 437: back to the bytes
    try:
        return _unicode_path(info.extra, raw) or raw.decode("utf-8"), True
    except UnicodeDecodeError:
        return name, False


def _unicode_path(extra: bytes, raw: bytes) -> str:
    """Return the name in the Unicode path field if its checksum fits the `raw` name, else ""."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and size > 5 and field[:5] == b"\x01" + struct.pack("<I", zlib.crc32(raw)):
            return field[5:].decode("utf-8")
    return ""
