"""What a store is made of: the operations that a folder and a bucket have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol


@dataclass(frozen=True)
class Entry:
    """An object as a listing shows it: its bytes, and when it was put, in seconds since the epoch."""

    size: int
    modified: float


class Objects(Protocol):
    """Where the bytes lie. Each call fails with FileNotFoundError, OSError or an HHNetError."""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """All bytes of an object; of one that has more than `limit`, the first `limit` + 1."""

    def open(self, name: str) -> IO[bytes]:
        """A seekable stream over an object."""

    def size(self, name: str) -> int:
        """Bytes of an object."""

    def entries(self, prefix: str) -> dict[str, Entry]:
        """Objects below a prefix, by name."""

    def folders(self, prefix: str) -> list[str]:
        """First parts of the names below a prefix that go on after a slash, in any order."""

    def require(self) -> None:
        """FileNotFoundError where the bucket that all objects lie in is not there."""

    def delete(self, name: str) -> None:
        """Remove an object."""

    def delete_all(self, prefix: str) -> None:
        """Remove all objects below a prefix."""

    def uploads(self) -> dict[str, Entry]:
        """What was begun to be put in parts and never ended, by name, with the time of the last beginning."""

    def abort(self, name: str) -> None:
        """End the uploads of an object and free their parts."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        """Put an object if there is none of that name; pass failpoint `point` when its bytes are there unnamed."""
