"""A file as a folder or an archive lists it, before it is known whether it can be a sample."""

from typing import Any, Literal, NamedTuple

from pipelines.errors import InputError

Kind = Literal["file", "folder", "link", "loop", "special", "unreadable"]
"""`link`: leads nowhere or is not followed. `loop`: leads back to a folder that holds it."""


class Found(NamedTuple):
    """A file by its name in the source, with the place of its bytes there. `detail` tells why it is no plain file."""

    name: str
    size: int
    kind: Kind = "file"
    detail: str = ""
    place: Any = None


class Unreadable(InputError):
    """One file of a source cannot be read. `detail` is the message of the system or the archive."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail
