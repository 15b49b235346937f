"""Lists and reads every file below a folder, also in linked folders. A link to a folder above is reported as a loop."""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipelines.errors import InputError, WorkFailed

_Identity = tuple[int, int]
Kind = Literal["file", "folder", "link", "loop", "special", "unreadable"]
"""`link`: leads nowhere or is not followed. `loop`: leads back to a folder that holds it."""

HIDDEN_NAMES = frozenset(
    {
        *("@eadir", "@recycle", "#recycle", "__macosx", "lost+found", "$recycle.bin", "system volume information"),
        *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
    }
)
"""Names of system files and folders that have no leading dot, in lower case."""


class Found(NamedTuple):
    """A file by its name in the source, with the place of its bytes there. `detail` tells why it is no plain file.

    `stamp` changes when the bytes do, and is known without reading them; "" is a file that has none.
    """

    name: str
    size: int
    kind: Kind = "file"
    detail: str = ""
    place: Any = None
    stamp: str = ""


class Read(Protocol):
    """Returns the bytes of a source's file; raises WorkFailed if the file has another `stamp` than that given."""

    def __call__(self, path: str, stamp: str = "", /) -> bytes:
        """Read it; threads may do so side by side."""


class Unreadable(InputError):
    """One file of a source cannot be read. `detail` is the message of the system, the archive or the server."""

    def __init__(self, message: str, detail: str, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.detail, self.reason = detail, reason


def is_hidden(path: str) -> bool:
    """Tell whether the file or a folder above it is hidden."""
    return any(name.startswith(".") or name.lower() in HIDDEN_NAMES for name in path.split("/"))


def walk_folder(root: Path) -> Iterator[Found]:
    """Yield every file below `root`, and each folder before its files. Raises InputError if `root` cannot be listed.

    A folder below `root` that cannot be listed is yielded as `unreadable`.
    """
    above = tuple(_identity(folder.stat()) for folder in (root, *root.resolve().parents))
    pending = [("", above)]
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(root / folder) as found:
                items = sorted(found, key=lambda item: item.name)
        except OSError as error:
            if not folder:
                raise InputError(f"cannot list {root}: {error.strerror}") from None
            yield Found(folder, 0, "unreadable", error.strerror or "")
            continue
        yield Found(folder, 0, "folder")
        below = []
        for item in items:
            met = _look_at(folder + item.name, item)
            if met.kind != "folder":
                yield met
            elif met.place in above:
                yield met._replace(kind="loop", detail="leads back to a folder that holds it")
            else:
                below.append((met.name + "/", (met.place, *above)))
        pending += reversed(below)


def _identity(found: os.stat_result) -> _Identity:
    return found.st_dev, found.st_ino


def _look_at(path: str, item: "os.DirEntry[str]") -> Found:
    """Return an item of a folder by its kind. The `place` of a folder is its device and inode numbers."""
    linked = item.is_symlink()
    try:
        if item.is_dir() and not (linked and is_hidden(path)):
            return Found(path, 0, "folder", "", _identity(item.stat()))
        if item.is_file():
            found = item.stat()
            return Found(path, found.st_size, stamp=stamp_of(found))
    except OSError as error:
        if not linked:
            return Found(path, 0, "unreadable", error.strerror or "")
        return Found(path, 0, "link", error.strerror or "")
    return Found(path, 0, "link") if linked else Found(path, 0, "special")


def stamp_of(found: os.stat_result) -> str:
    """Return the stamp of a file: its size, and the times at which its bytes and its inode last changed."""
    return f"{found.st_size}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"


@dataclass(frozen=True)
class FolderReader:
    """Reads the files below `root`; raises Unreadable for a file that cannot be read."""

    root: str

    def __call__(self, path: str, stamp: str = "", /) -> bytes:
        """Return all bytes of a file."""
        try:
            with io.FileIO(f"{self.root}/{path}") as stream:
                data = stream.readall()
                now = stamp_of(os.fstat(stream.fileno())) if stamp else ""
        except OSError as error:
            raise Unreadable(f"cannot read {self.root}/{path}: {error.strerror}", error.strerror or "") from None
        if now != stamp:
            raise WorkFailed(f"{self.root}/{path} changed while it was ingested: run again")
        return data
