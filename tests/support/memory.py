"""A store in a dictionary that keeps to the contract of `Store`, and one that does not.

MemoryStore()                     put if absent, reads see whole objects
MemoryStore(OverwritingObjects)   a put replaces what was there
"""

import io
from pathlib import Path

from pipelines.storage import ObjectInfo, Store
from pipelines.storage.failpoints import failpoint


class MemoryObjects:
    """Objects in a dictionary."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def read(self, name: str, limit: int | None = None) -> bytes:
        try:
            return self.held[name][: None if limit is None else limit + 1]
        except KeyError:
            raise FileNotFoundError(name) from None

    def open(self, name: str, block: int | None = None, start: int = 0) -> io.BytesIO:
        stream = io.BytesIO(self.read(name))
        stream.seek(start)
        return stream

    def size(self, name: str) -> int:
        return len(self.read(name))

    def entries(self, prefix: str) -> dict[str, ObjectInfo]:
        below = f"{prefix}/" if prefix else ""
        return {name: ObjectInfo(len(data), 0.0) for name, data in self.held.items() if name.startswith(below)}

    def folders(self, prefix: str) -> list[str]:
        below = f"{prefix}/" if prefix else ""
        rest = [name[len(below) :] for name in self.held if name.startswith(below)]
        return list({name.partition("/")[0] for name in rest if "/" in name})

    def require(self) -> None:
        """A dictionary is always there."""

    def delete(self, name: str) -> None:
        self.held.pop(name, None)

    def delete_all(self, prefix: str) -> None:
        for name in self.entries(prefix):
            self.delete(name)

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        failpoint(point)
        if name in self.held:
            return False
        self.held[name] = data if isinstance(data, bytes) else data.read_bytes()
        return True


class OverwritingObjects(MemoryObjects):
    """A plain PUT."""

    def put(self, name: str, data: bytes | Path, point: str) -> bool:
        self.held.pop(name, None)
        return super().put(name, data, point)


class MemoryStore(Store):
    """A `Store` over such objects."""

    def __init__(self, objects: type[MemoryObjects] = MemoryObjects) -> None:
        self.root = self.uri = "memory"
        self.is_local, self.scheme = False, "memory"
        self._objects = self.memory = objects()
