"""The operations that a folder and a bucket have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class ObjectInfo:
    """An object in a listing: its bytes, and the time of its put in seconds since the epoch."""

    size: int
    modified: float


class Objects(Protocol):
    """A place for bytes. Each call may raise FileNotFoundError, OSError or an HHNetError."""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Return all bytes of an object; if it has more than `limit`, the first `limit` + 1."""

    def open(self, name: str, block: int | None = None, start: int = 0) -> IO[bytes]:
        """Open a stream over an object at byte `start`; one that is far away is fetched `block` bytes at a time."""

    def size(self, name: str) -> int:
        """Return the bytes of an object."""

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        """List the objects below a prefix, by name."""

    def folders(self, prefix: str) -> list[str]:
        """List the folders directly below a prefix, in any order."""

    def require(self) -> None:
        """Raise FileNotFoundError if the bucket of the objects does not exist."""

    def delete(self, name: str) -> None:
        """Remove an object."""

    def delete_all(self, prefix: str) -> None:
        """Remove all objects below a prefix."""

    def uploads(self) -> dict[str, ObjectInfo]:
        """List the uploads in parts that were begun and never ended: by name, with the time of the last beginning."""

    def abort(self, name: str) -> None:
        """End the uploads of an object and free their parts."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Put an object if none has that name; pass failpoint `point` when its bytes are stored without the name."""
