"""What `ingest` reads: a folder, zip or tar of class folders, or a table of paths and labels.

    folder, zip, tar   class = the folder that directly holds the file, at any depth
    CSV, Parquet       `path,label[,label2...]`, paths relative to the table's folder, other columns = metadata;
                       a Parquet table may hold the images themselves

Nothing is extracted by name: a zip is read member by member where it lies, a tar is streamed once into one
nameless scratch file. A file is a sample if its suffix is an image's; all else is skipped, with a reason.
"""

import bz2
import gzip
import io
import lzma
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from pipelines.errors import InputError
from pipelines.images import SUFFIXES
from pipelines.storage import scratch_folder
from pipelines.tars import MAX_MEMBER_BYTES, MAX_NAME_BYTES, TarDamaged, TarEntry, TarLimits, read_tar

MAX_FILES = 20_000_000
SKIPPED_NAMED = 1000
MAX_EXPANSION = 200
"""How many times its own size a compressed tar may unfold to; images barely shrink, tar headers do."""

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_MAGIC = {b"\x1f\x8b": gzip.GzipFile, b"\xfd7zXZ\0": lzma.LZMAFile, b"BZh": bz2.BZ2File}
_BROKEN = (TarDamaged, EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample to be: its path below the source, its class names, metadata, and its cell of the split column."""

    path: str
    labels: tuple[str, ...]
    metadata: Mapping[str, Any] | None = None
    group: str | None = None


@dataclass
class Listing:
    """Samples found so far, and what was passed over: counted in full, the first names kept."""

    where: str
    entries: list[Entry] = field(default_factory=list)
    skipped: int = 0
    named: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else the user should know of the source, one line each."""

    def skip(self, path: str, reason: str) -> None:
        """Pass over a file, and say why."""
        self.skipped += 1
        if len(self.named) < SKIPPED_NAMED:
            self.named.append((printable(path)[:MAX_NAME_BYTES], reason))
        self._bound()

    @property
    def skipped_files(self) -> list[dict[str, str]]:
        """The first that were passed over, each with its reason."""
        return [{"path": path, "reason": reason} for path, reason in self.named]

    def add(self, entry: Entry) -> None:
        """Take a sample."""
        self.entries.append(entry)
        self._bound()

    def _bound(self) -> None:
        if len(self.entries) + self.skipped > MAX_FILES:
            raise InputError(f"{self.where} holds more than {MAX_FILES} files: ingest it in pieces")


@dataclass(frozen=True)
class Source:
    """An opened source. `read` returns all bytes of the file of an entry's path; threads may share it.

    Of a protocol's data set, `files` has the sha256 of what says labels and parts, by its name, and `searched` the
    parts that are the database, where it says so itself.
    """

    listing: Listing
    read: Callable[[str], bytes]
    files: Mapping[str, str] = field(default_factory=dict)
    searched: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Arrow types of the metadata columns of a table."""


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a folder, zip or tar of class folders and list it. InputError where that cannot be done."""
    listing = Listing(str(path))
    if path.is_dir():
        _list_folder(path, listing)
        yield Source(listing, folder_reader(path))
    elif path.name.lower().endswith(_TAR_SUFFIXES):
        with scratch_folder() as scratch, (scratch / "spool").open("w+b") as spool:
            places = _spool_tar(path, spool, listing)
            yield Source(listing, _spool_reader(spool, places))
    elif path.name.lower().endswith(".zip"):
        with _open_zip(path) as archive:
            members = _list_zip(archive, listing)
            yield Source(listing, _zip_reader(archive, members))
    elif not path.exists():
        raise InputError(f"{path} does not exist: SOURCE is a folder, zip or tar of class folders, or a table")
    else:
        raise InputError(
            f"{path} is not a source: give a folder, a .zip, a .tar (.gz, .xz, .bz2), a .csv or a .parquet"
        )


def unfit(path: str, size: int) -> str | None:
    """Why a file cannot be a sample by its name and size alone, or None."""
    name = path[path.rfind("/") + 1 :]
    if path.startswith("__MACOSX/") or name.startswith("._"):
        return "macOS resource fork"
    if os.path.splitext(name)[1].lower() not in SUFFIXES:  # noqa: PTH122 - a Path per file is slow
        return "no image suffix"
    if len(os.fsencode(path)) > MAX_NAME_BYTES:
        return f"name longer than {MAX_NAME_BYTES} bytes"
    if size > MAX_MEMBER_BYTES:
        return f"larger than {MAX_MEMBER_BYTES} bytes"
    return None


def _class_entry(path: str, where: str) -> Entry:
    folders = path.split("/")
    if len(folders) < 2:
        raise InputError(
            f"{where}/{path} lies in no class folder: put the images of each class into a folder of its own"
        )
    return Entry(path, (printable(folders[-2]),))


def file_size(path: str, where: str) -> int:
    """Bytes of a file that is named at `where`; InputError unless it is there, and plain."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path per file is slow
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot read {printable(path)}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{where}: {printable(path)} is not a plain file")
    return found.st_size


def printable(name: str) -> str:
    """A file name as valid Unicode: bytes that are not UTF-8 show as \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------- folder


def folder_reader(root: Path) -> Callable[[str], bytes]:
    """Read files below `root`."""

    def read(path: str) -> bytes:
        try:
            with io.FileIO(f"{root}/{path}") as stream:
                return stream.readall()
        except OSError as error:
            raise InputError(f"cannot read {root}/{path}: {error.strerror}") from None

    return read


def _list_folder(root: Path, listing: Listing) -> None:
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(root / folder) as found:
                for item in found:
                    path = folder + item.name
                    if item.is_dir(follow_symlinks=False):
                        pending.append(path + "/")
                    elif item.is_dir():
                        listing.skip(path, "link to a folder")
                    elif not item.is_file():
                        listing.skip(path, "not a plain file")
                    elif reason := unfit(path, item.stat().st_size):
                        listing.skip(path, reason)
                    else:
                        listing.add(_class_entry(path, listing.where))
        except OSError as error:
            raise InputError(f"cannot list {root / folder}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------------------ archives


def inside(name: str) -> tuple[str, str | None]:
    """A name from an archive or a table as a plain relative path, and why it is refused if it is."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/"):
        return name, "absolute path"
    if ".." in parts:
        return name, "path leaves its root"
    return "/".join(parts), "NUL in its name" if "\0" in name else None


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as a zip: {error}") from None


def _list_zip(archive: zipfile.ZipFile, listing: Listing) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if info.is_dir():
            continue
        path, reason = inside(info.filename)
        if reason is None and stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
            reason = "link or special file"
        if reason is None and info.flag_bits & 1:
            reason = "encrypted"
        if reason is None and info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "compressed by a method other than deflate"
        if reason := reason or unfit(path, info.file_size):
            listing.skip(path, reason)
        else:
            listing.add(_class_entry(path, listing.where))
            members[path] = info
    return members


def _zip_reader(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> Callable[[str], bytes]:
    def read(path: str) -> bytes:
        info = members[path]
        try:
            with archive.open(info) as stream:
                # With a size the decompressor stops there, whatever the compressed bytes would unfold to.
                return stream.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
            raise InputError(f"{archive.filename}: cannot read {path}: {error}") from None

    return read


def _spool_tar(path: Path, spool: IO[bytes], listing: Listing) -> dict[str, tuple[int, int]]:
    """Stream a tar once; its images go end to end into `spool`. Returns offset and size by path."""
    places: dict[str, tuple[int, int]] = {}

    def wanted(entry: TarEntry) -> bool:
        name, reason = inside(entry.name)
        if reason := reason or unfit(name, entry.size):
            listing.skip(name, reason)
        return reason is None

    try:
        with _open_tar(path) as stream:
            for entry, content in read_tar(stream, wanted, _limits(path, stream)):
                if entry.kind in ("link", "special"):
                    listing.skip(entry.name, "link or special file")
                elif content is not None:
                    name, _ = inside(entry.name)
                    listing.add(_class_entry(name, listing.where))
                    places[name] = (spool.tell(), len(content))
                    spool.write(content)
        spool.flush()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except _BROKEN as error:
        raise InputError(f"cannot read {path} as a tar: {error}") from None
    return places


def _limits(path: Path, stream: IO[bytes]) -> TarLimits:
    if isinstance(stream, tuple(_MAGIC.values())):
        return TarLimits(total_bytes=max(64 << 20, MAX_EXPANSION * path.stat().st_size))
    return TarLimits()


def _open_tar(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        magic = stream.read(6)
    for start, opened in _MAGIC.items():
        if magic.startswith(start):
            return cast(IO[bytes], opened(path))
    return path.open("rb")


def _spool_reader(spool: IO[bytes], places: Mapping[str, tuple[int, int]]) -> Callable[[str], bytes]:
    descriptor = spool.fileno()

    def read(path: str) -> bytes:
        offset, size = places[path]
        return os.pread(descriptor, size, offset)

    return read
