"""A file as a folder or an archive shows it, before it is known whether it can be a sample."""

from typing import Any, Literal, NamedTuple

from pipelines.errors import InputError

Kind = Literal["file", "folder", "link", "loop", "special", "unreadable"]
"""`link` leads nowhere or is not followed, `loop` leads back to a folder that holds it."""


class Found(NamedTuple):
    """A file by its name in the source, and where its bytes lie there; `detail` says why it is no plain file."""

    name: str
    size: int
    kind: Kind = "file"
    detail: str = ""
    place: Any = None


class Unreadable(InputError):
    """One file of a source cannot be read; `detail` is what the system or the archive says of it."""

    def __init__(self, message: str, detail: str) -> None:
        super().__init__(message)
        self.detail = detail
