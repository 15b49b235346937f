"""Images in the rows of Parquet tables, as on the Hugging Face Hub: read once and kept in a scratch file."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pipelines.ingest.path_resolver import PathResolver
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, find_unfit_reason
from pipelines.ingest.zips import content_stamp
from pipelines.shards.folders import FolderReader

R = TypeVar("R")

_MAGIC = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"BM", ".bmp"),
    (b"GIF8", ".gif"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)


class ImageRows(Generic[R]):
    """Images of rows, and the other content of each row.

    An image is a struct of its bytes and its former path, or its bytes alone. If all rows have different paths of
    images, these are the images' names. Otherwise a name is the table's and the row's number, with a suffix that
    follows from the bytes.
    """

    def __init__(self, spool: IO[bytes], root: Path) -> None:
        self._spool, self._places, self._read_file = spool, PathResolver(root), FolderReader(str(root))
        self._rows: list[tuple[R, str, str | None, int, int, str]] = []
        self._held: dict[str, tuple[int, int]] = {}
        self._sums: list[int] = []

    def add(self, image: Any, row: R, number: str) -> None:
        """Keep the image of a row. `number` becomes its name if its path cannot be."""
        path = image.get("path") if isinstance(image, dict) else None
        data = image.get("bytes") if isinstance(image, dict) else image
        start, size = self._spool.tell(), -1 if data is None else self._spool.write(data)
        self._sums.append(zlib.crc32(data or b""))
        self._rows.append((row, number, path, start, size, _suffix(data or b"", path)))

    def named(self, listing: Listing) -> Iterator[tuple[str, str, R]]:
        """Yield name below the source and stamp of each image, and its row; skip those that are no samples."""
        paths = [path.replace("\\", "/") if path else "" for _, _, path, *_ in self._rows]
        by_path = len(set(paths)) == len(paths) and all(map(_is_name, paths))
        self._spool.flush()
        for (row, number, path, start, size, suffix), own, crc in zip(self._rows, paths, self._sums, strict=True):
            name, stamp = own if by_path else number + suffix, content_stamp(size, crc)
            if size < 0:
                place = self._places.find(path) if path else SkipReason.MISSING
                if isinstance(place, SkipReason):
                    listing.skip(path or number, place)
                    continue
                name, size, stamp = place
            else:
                self._held[name] = (start, size)
            if reason := find_unfit_reason(name, size, listing.limits.file_bytes):
                listing.skip(name, reason)
            else:
                yield name, stamp, row
        self._rows.clear()
        self._sums.clear()

    def read(self, name: str, stamp: str = "", /) -> bytes:
        """Return the bytes of an image by its name; threads may share it."""
        if name in self._held:
            start, size = self._held[name]
            return os.pread(self._spool.fileno(), size, start)
        return self._read_file(name, stamp)


def suffix_by_magic(data: bytes) -> str | None:
    """Return the suffix of a usual image by its first bytes, or None."""
    for magic, suffix in _MAGIC:
        if data.startswith(magic):
            return suffix
    return ".webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _suffix(data: bytes, path: str | None) -> str:
    if found := suffix_by_magic(data):
        return found
    own = Path(path or "").suffix.lower()
    return own if find_unfit_reason("x" + own, 1) is None else ".jpg"


def _is_name(path: str) -> bool:
    parts = path.split("/")
    return bool(path) and "\0" not in path and not {"", ".", ".."} & set(parts) and find_unfit_reason(path, 1) is None
