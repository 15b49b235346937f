"""Sources of `ingest`: a folder, zip or tar of class folders, or a table of paths and labels.

    folder, zip, tar   class = the first folder below the source, see `layout`
    CSV, Parquet       `path,label[,label2...]`, paths relative to the table's folder, other columns = metadata;
                       a Parquet table may hold the images themselves, and any table URLs in place of paths

Nothing is extracted by name: a zip is read in place, member by member, and a tar is streamed once into one scratch
file. A file with the suffix of an image is a sample; every other file is skipped with a reason.
"""

import bz2
import gzip
import logging
import lzma
import os
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, cast

from pipelines.errors import Degraded, InputError
from pipelines.ingest.beside import MAX_BESIDE_BYTES, read_beside_picture
from pipelines.ingest.bounds import LIMITS, SourceLimits, max_unfolded_bytes, require_bounded
from pipelines.ingest.layout import (
    Layout,
    is_numbered,
    is_statistics,
    may_stand_beside,
    place_pictures,
    wrapping_folders,
)
from pipelines.ingest.skips import NO_LOSS, RETRYABLE, SkipReason
from pipelines.ingest.zips import SomeMembers, content_stamp, list_guessed_names, list_zip, open_zip, zip_reader
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.folders import FolderReader, Found, Read, is_hidden, walk_folder
from pipelines.shards.tar import MAX_NAME_BYTES, TarDamaged, TarEntry, TarLimits, read_tar
from pipelines.storage import scratch_folder

_log = logging.getLogger(__name__)

SKIPPED_NAMED = 1000
"""Number of skipped files that a result names; the others are only counted."""
SUFFIXES_COUNTED = 1000
"""Number of different suffixes that are counted by themselves; the others are counted together."""
SUFFIXES_SHOWN = 5
"""Number of suffixes that a message shows."""

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")
_LONGEST_FIRST = sorted(_TAR_SUFFIXES, key=len, reverse=True)
_MAGIC = {b"\x1f\x8b": gzip.GzipFile, b"\xfd7zXZ\0": lzma.LZMAFile, b"BZh": bz2.BZ2File}
_REASONS = {
    "link": SkipReason.LINK,
    "loop": SkipReason.LINK,
    "special": SkipReason.SPECIAL,
    "unreadable": SkipReason.UNREADABLE,
}
_BROKEN = (TarDamaged, EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A future sample: its path below the source, its class names, its metadata, and its part if the source has one."""

    path: str
    labels: tuple[str, ...]
    metadata: Mapping[str, Any] | None = None
    group: str | None = None
    stamp: str = ""
    """Changes when the bytes do, see `Found`; "" is an image that has none."""


@dataclass
class Listing:
    """The samples found so far, and the skipped files: all are counted, the first ones are named."""

    where: str
    entries: list[SourceImage] = field(default_factory=list)
    skipped: int = 0
    losses: Counter[str] = field(default_factory=Counter)
    """Counts of skipped files that would have been samples, by reason."""
    reasons: Counter[str] = field(default_factory=Counter)
    suffixes: Counter[str] = field(default_factory=Counter)
    """Counts of the files that were skipped for their suffix, by that suffix in lower case."""
    named: list[dict[str, str | bool]] = field(default_factory=list)
    first: dict[str, str] | None = None
    first_lost: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    """Notes on the source for the user, one line each."""
    limits: SourceLimits = LIMITS

    def skip(self, path: str, reason: str, detail: str = "", loss: bool | None = None) -> None:
        """Record a skipped file with its reason: a `SkipReason`, or a `TarReason` for an adopted tar.

        `loss` tells whether a picture is lost; by default that follows from the reason.
        """
        self.skipped += 1
        if _log.isEnabledFor(logging.DEBUG):
            fields = {
                "path": make_printable(path)[:MAX_NAME_BYTES],
                "reason": str(reason),
                "detail": make_printable(detail),
            }
            _log.debug("skipped: %(path)s (%(reason)s)", fields, extra={"source": self.where, **fields})
        if reason is SkipReason.WRONG_SUFFIX:
            suffix = make_printable(os.path.splitext(path)[1].lower()) or "none"  # noqa: PTH122 - a Path per file is slow
            known = suffix in self.suffixes or len(self.suffixes) < SUFFIXES_COUNTED
            self.suffixes[suffix if known else "others"] += 1
        self.reasons[str(reason)] += 1
        lost = reason not in NO_LOSS if loss is None else loss
        if lost:
            self.losses[str(reason)] += 1
        if len(self.named) < SKIPPED_NAMED or (lost and self.first_lost is None):
            named = {"path": make_printable(path)[:MAX_NAME_BYTES], "reason": str(reason)}
            named |= {"detail": make_printable(detail)} if detail else {}
            more = {"retryable": reason in RETRYABLE} if "://" in path else {}
            self.named += [{**named, **more}] if len(self.named) < SKIPPED_NAMED else []
            self.first = self.first or named
            if lost:
                self.first_lost = self.first_lost or named
        self.bound(0)

    def skip_unnamed(self, reason: SkipReason, number: int) -> None:
        """Record that `number` more files were skipped, whose names are not known any more."""
        self.skipped += number
        self.reasons[str(reason)] += number
        if reason not in NO_LOSS:
            self.losses[str(reason)] += number

    @property
    def skipped_suffixes(self) -> dict[str, int]:
        """Number of skipped files for each suffix that no picture has, the most frequent first."""
        return dict(sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0])))

    @property
    def lost_files(self) -> list[str]:
        """Paths of the first skipped pictures, stray ones too."""
        return [str(file["path"]) for file in self.named if file["reason"] not in NO_LOSS - {SkipReason.STRAY}]

    @property
    def skipped_reasons(self) -> dict[str, int]:
        """Number of skipped files for each reason."""
        return dict(sorted(self.reasons.items()))

    def require_budget(self, samples: int, budget: float, allow_degraded: bool) -> bool:
        """Tell whether more than the share `budget` of the pictures is lost. Raises Degraded if that is not allowed."""
        lost = self.losses.total()
        if not self.exceeds_budget(samples, budget):
            return False
        if not allow_degraded:
            raise Degraded(
                f"{lost} of {samples + lost} pictures of {self.where} cannot be taken, more than ingest.skip_budget = "
                f"{budget:g}: {_counted(self.losses, self.first_lost)}: mend them, or pass --allow-degraded to publish "
                "without them"
            )
        return True

    def exceeds_budget(self, samples: int, budget: float, more: int = 0) -> bool:
        """Tell whether more than the share `budget` of the pictures is lost, of which `more` are not skipped yet."""
        lost = self.losses.total() + more
        return lost > budget * (samples + lost)

    def why_skipped(self) -> str:
        """Describe the skipped files: reasons with counts, the suffixes that no picture has, and the first file."""
        return _counted(self.reasons, self.first, self.skipped_suffixes)

    def add(self, entry: SourceImage) -> None:
        """Add a sample."""
        self.entries.append(entry)
        self.bound(0)

    def bound(self, more: int) -> None:
        """Raise InputError if the files so far and `more` are too many."""
        if len(self.entries) + self.skipped + more > self.limits.files:
            raise InputError(f"{self.where} holds more than {self.limits.files} files: ingest it in pieces")


def _counted(
    reasons: Mapping[str, int], first: Mapping[str, str] | None, suffixes: Mapping[str, int] = MappingProxyType({})
) -> str:
    listed = [f"{suffix} {count}" for suffix, count in suffixes.items()]
    shown = ", ".join(listed[:SUFFIXES_SHOWN] + ["..."] * (len(listed) > SUFFIXES_SHOWN))
    counted = ", ".join(
        f"{reason} {count}" + (f" ({shown})" if reason == SkipReason.WRONG_SUFFIX and shown else "")
        for reason, count in sorted(reasons.items())
    )
    if first is None:
        return counted
    path, *why = first.values()
    return f"{counted}; the first is {path}: {', '.join(why)}"


@dataclass(frozen=True)
class Source:
    """An opened source. `read` returns all bytes of the file at an entry's path; threads may share it.

    `remote` returns a reader of some paths for other processes; it is unset if the bytes lie in a scratch file.

    For the data set of a protocol, `files` has the sha256 of each file with labels or parts, by its name. `searched`
    are the parts that form the database, if the data set names them itself.
    """

    listing: Listing
    read: Read
    files: Mapping[str, str] = field(default_factory=dict)
    searched: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    """Arrow types of the metadata columns of a table."""
    remote: Callable[[Sequence[str]], Read] | None = None


@contextmanager
def open_source(path: Path, layout: Layout | None = None, limits: SourceLimits = LIMITS) -> Iterator[Source]:
    """Open a folder, zip or tar of pictures and list it. Raises InputError if that cannot be done."""
    listing, layout = Listing(str(path), limits=limits), layout or Layout()
    files = _Files(listing)
    if path.is_dir():
        files.meet_all(walk_folder(path))
        read = FolderReader(str(path.absolute()))
        yield files.source(layout, read, lambda _: read)
    elif path.name.lower().endswith(_TAR_SUFFIXES):
        with scratch_folder() as scratch, (scratch / "spool").open("w+b") as spool:
            files.meet_all(_spool_tar(path, spool, limits.file_bytes))
            yield files.source(layout, _spool_reader(spool, files.places), None, _stem(path))
    elif path.name.lower().endswith(".zip"):
        with open_zip(path) as archive:
            files.meet_all(list_zip(archive))
            require_bounded(path, sum(info.file_size for info in files.places.values()))
            if guessed := list_guessed_names(archive):
                listing.notes.append(
                    f"{len(guessed):,} names are not UTF-8 and are read as code page 437 "
                    f"({make_printable(guessed[0])}): if that is wrong, unpack the zip with its encoding and "
                    "ingest the folder"
                )
            where = str(path.absolute())

            def remote(paths: Sequence[str]) -> Read:
                return SomeMembers(where, {path: files.places[path] for path in paths})

            yield files.source(layout, zip_reader(archive, files.places), remote, _stem(path))
    elif not path.exists():
        raise InputError(f"{path} does not exist: SOURCE is a folder, zip or tar of class folders, or a table")
    else:
        raise InputError(
            f"{path} is not a source: give a folder, a .zip, a .tar (.gz, .xz, .bz2), a .csv or a .parquet"
        )


def find_unfit_reason(path: str, size: int, limit: int = LIMITS.file_bytes) -> SkipReason | None:
    """Return why a file cannot be a sample by its name and size alone, or None if it can."""
    name = path[path.rfind("/") + 1 :]
    if os.path.splitext(name)[1].lower() not in SUFFIXES:  # noqa: PTH122 - a Path per file is slow
        return SkipReason.WRONG_SUFFIX
    if len(os.fsencode(path)) > MAX_NAME_BYTES:
        return SkipReason.UNSAFE_NAME
    if not size:
        return SkipReason.EMPTY
    return SkipReason.TOO_LARGE if size > limit else None


class _Files:
    """The files of a source as they are listed: pictures, and files beside them, with the place of each by its path."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing
        self.places: dict[str, Any] = {}
        self.stamps: dict[str, str] = {}
        self._beside: set[str] = set()
        self._folders = 0
        self._statistics = False
        self._common: str | None = None
        """Folder that holds all files so far, ending with a slash."""

    def meet_all(self, found: Iterable[Found]) -> None:
        """Sort each file: a picture, a file beside one, or skipped."""
        for one in found:
            if one.kind == "folder":
                self._folders += 1
            else:
                self._meet(one)
            self.listing.bound(len(self.places) + self._folders)

    def _meet(self, found: Found) -> None:
        path, unsafe = check_relative_path(found.name)
        if unsafe:
            self.listing.skip(path, SkipReason.UNSAFE_NAME, unsafe)
            return
        if path in self.places:
            del self.places[path]
            self._beside.discard(path)
            self.listing.skip(path, SkipReason.REPLACED)
        reason = _refusal(path, found, self.listing.limits.file_bytes)
        if reason is not SkipReason.HIDDEN:
            self._share(path)
        if reason is None:
            self.places[path], self.stamps[path] = found.place, found.stamp
        elif found.kind == "file" and reason is SkipReason.WRONG_SUFFIX and _stands_beside(path, found.size):
            self.places[path] = found.place
            self._beside.add(path)
        else:
            self._statistics |= is_statistics(path)
            self.listing.skip(path, reason, found.detail, loss=False if found.kind == "loop" else None)

    def _share(self, path: str) -> None:
        if self._common is None:
            self._common = path[: path.rfind("/") + 1]
        while not path.startswith(self._common):
            self._common = self._common[: self._common.rfind("/", 0, -1) + 1]

    def source(
        self,
        layout: Layout,
        read: Read,
        remote: Callable[[Sequence[str]], Read] | None,
        archive: str | None = None,
    ) -> Source:
        """Make samples of the pictures. For an `archive` (its name), paths leave out folders that wrap everything."""
        pictures = [path for path in self.places if path not in self._beside]
        wrapper = wrapping_folders(self._common or "", pictures, layout.depth, archive) if archive else ""
        if wrapper:
            self.listing.notes.append(
                f"all files lie in {make_printable(wrapper)}, so paths and classes begin below it"
            )
        paths = [path[len(wrapper) :] for path in pictures]
        beside = {path[len(wrapper) :] for path in self._beside}
        may_be = bool(beside and paths) and layout.class_from is None and not layout.parts
        numbered = may_be and is_numbered(paths, self._statistics)
        found = place_pictures(paths, layout, self.listing.where, numbered)
        self.listing.notes += map(make_printable, found.notes)

        read_below = _Below(read, wrapper)
        strays = found.labels.count(None)
        used: set[str] = set()
        for path, labels in zip(paths, found.labels, strict=True):
            if labels is None:  # stray pictures count as lost only if they are more than half of all
                self.listing.skip(path, SkipReason.STRAY, loss=2 * strays > len(paths))
            else:
                facts = read_beside_picture(path, beside, used, read_below) if numbered else None
                stamp = self.stamps[wrapper + path]
                self.listing.add(SourceImage(path, tuple(map(make_printable, labels)), facts, None, stamp))
        for path in sorted(beside - used):
            self.listing.skip(path, SkipReason.WRONG_SUFFIX)
        if remote is None or not wrapper:
            return Source(self.listing, read_below if wrapper else read, remote=remote)
        whole = remote
        return Source(
            self.listing, read_below, remote=lambda some: _Below(whole([wrapper + path for path in some]), wrapper)
        )


@dataclass(frozen=True)
class _Below:
    """Reads the files below the folders that wrap everything."""

    read: Read
    wrapper: str

    def __call__(self, path: str, stamp: str = "", /) -> bytes:
        return self.read(self.wrapper + path, stamp)


def _refusal(path: str, found: Found, limit: int) -> SkipReason | None:
    """Return why a file of a folder or archive is no sample, or None if it is one."""
    if is_hidden(path):
        return SkipReason.HIDDEN
    reason = find_unfit_reason(path, found.size, limit)
    suffix = os.path.splitext(found.name)[1]  # noqa: PTH122 - a folder that cannot be listed has none
    if found.kind == "file" or (reason is SkipReason.WRONG_SUFFIX and suffix and found.kind != "loop"):
        return reason
    return _REASONS[found.kind]


def _stands_beside(path: str, size: int) -> bool:
    return size <= MAX_BESIDE_BYTES and may_stand_beside(path)


def _stem(archive: Path) -> str:
    """Return the name of an archive without its suffixes."""
    name = archive.name
    return next(name[: -len(end)] for end in (*_LONGEST_FIRST, ".zip") if name.lower().endswith(end))


def file_size(path: str, where: str) -> int:
    """Return the size of a file in bytes. Raises InputError, with `where` it is named, unless it is a plain file."""
    try:
        found = os.stat(path)  # noqa: PTH116 - a Path per file is slow
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: cannot read {make_printable(path)}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{where}: {make_printable(path)} is not a plain file")
    return found.st_size


def make_printable(name: str) -> str:
    """Return a file name as valid Unicode, with \\xNN for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------------------ archives


def check_relative_path(name: str) -> tuple[str, str | None]:
    """Return a name from an archive or table as a plain relative path, and why it is refused, or None."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/"):
        return name, "absolute path"
    if ".." in parts:
        return name, "path leaves its root"
    return "/".join(parts), "NUL in its name" if "\0" in name else None


def _spool_tar(path: Path, spool: IO[bytes], file_bytes: int) -> Iterator[Found]:
    """Stream a tar once and append its pictures to `spool`; the place of each is (offset, size) there."""
    held: dict[str, Found] = {}
    """Targets of hard links, also hidden pictures: a tar holds the bytes of linked files only once."""
    try:
        with _open_tar(path) as stream:
            for entry, content in read_tar(stream, partial(_is_spooled, file_bytes), _limits(path, stream)):
                name = check_relative_path(entry.name)[0]
                found = Found(entry.name, entry.size, entry.kind)
                if content is not None:
                    place = (spool.tell(), len(content))
                    found = found._replace(place=place, stamp=content_stamp(len(content), zlib.crc32(content)))
                    spool.write(content)
                elif linked := held.get(check_relative_path(entry.target)[0]):
                    found = Found(entry.name, linked.size, place=linked.place, stamp=linked.stamp)
                elif entry.target:
                    found = found._replace(detail=f"no picture before it is called {entry.target}")
                if found.place:
                    held[name] = found
                elif found.kind != "folder":
                    # A later entry replaces the earlier one, so hard links must no longer find that.
                    held.pop(name, None)
                yield found
        spool.flush()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except _BROKEN as error:
        raise InputError(f"cannot read {path} as a tar: {error}") from None


def _is_spooled(file_bytes: int, entry: TarEntry) -> bool:
    name, refusal = check_relative_path(entry.name)
    if refusal is not None:
        return False
    return find_unfit_reason(name, entry.size, file_bytes) is None or _stands_beside(name, entry.size)


def _limits(path: Path, stream: IO[bytes]) -> TarLimits:
    if isinstance(stream, tuple(_MAGIC.values())):
        return TarLimits(total_bytes=max_unfolded_bytes(path))
    return TarLimits()


def _open_tar(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        magic = stream.read(6)
    for start, opened in _MAGIC.items():
        if magic.startswith(start):
            return cast(IO[bytes], opened(path))
    return path.open("rb")


def _spool_reader(spool: IO[bytes], places: Mapping[str, tuple[int, int]]) -> Read:
    descriptor = spool.fileno()

    def read(path: str, _stamp: str = "", /) -> bytes:
        offset, size = places[path]
        # pread, since threads share the descriptor and must not move each other's position.
        return os.pread(descriptor, size, offset)

    return read
