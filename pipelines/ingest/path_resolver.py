"""Finds the files that a table names, below its folder or below a root that the user gives."""

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from pipelines.ingest.skips import SkipReason
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.folders import stamp_of

PATHS_TRIED = 1000
"""Number of paths, evenly taken from those not found, on which leading folders are tried."""


class FileAt(NamedTuple):
    """A file below the root: its path there, its size and its stamp."""

    path: str
    size: int
    stamp: str


class PathResolver:
    """Finds files below the folder `root` by the paths that a table has for them.

    A path is relative to `root`, or absolute and below it, and may contain `..`. Backslashes may separate folders,
    accents may be composed differently than on disk, and the suffix of an image may be missing if exactly one file has
    the rest of the name. Nothing outside `root` is ever taken.
    """

    def __init__(self, root: Path) -> None:
        folder = os.path.abspath(root)  # noqa: PTH100 - without following links, as a table spells it
        self._folder = folder.rstrip("/") + "/"
        self._starts = tuple({self._folder, os.path.realpath(folder).rstrip("/") + "/"})

    def find(self, name: str, foreign: Sequence[str] = ()) -> FileAt | SkipReason:
        """Return the file below the root that a path means, or the reason to skip it.

        `foreign` are leading folders of `name` on another machine; they are left out.
        """
        reason = SkipReason.MISSING
        for spelling in _spellings(name):
            parts = split_path(spelling)
            if foreign and tuple(parts[: len(foreign)]) == tuple(foreign):
                spelling = "/".join(parts[len(foreign) :])
            path = self._below(spelling)
            if path is None:
                reason = SkipReason.UNSAFE_NAME
                continue
            found = self._plain_file(path) or self._with_suffix(path)
            if found is not None:
                return found
        return reason

    def _plain_file(self, path: str) -> FileAt | SkipReason | None:
        try:
            found = os.stat(self._folder + path)  # noqa: PTH116 - a Path per file is slow
        except ValueError:  # a NUL
            return SkipReason.UNSAFE_NAME
        except OSError:
            return None
        return FileAt(path, found.st_size, stamp_of(found)) if stat.S_ISREG(found.st_mode) else SkipReason.SPECIAL

    def _with_suffix(self, path: str) -> FileAt | SkipReason | None:
        """Return the only file named `path` plus the suffix of an image, or None. Lists of ids name files like that."""
        if os.path.splitext(path)[1].lower() in SUFFIXES:  # noqa: PTH122 - a Path per file is slow
            return None
        spelled = [path + suffix for known in SUFFIXES for suffix in (known, known.upper())]
        found = [one for one in map(self._plain_file, spelled) if isinstance(one, tuple)]
        return found[0] if len(found) == 1 else None

    def foreign_folders(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the leading folders to cut off so that most of these paths are found below the root, or () for none.

        All paths lose the same folders, so that files of one name in two folders are never mistaken for each other.
        """
        tried = [split_path(name.replace("\\", "/")) for name in names[:: -(-len(names) // PATHS_TRIED) or 1]]
        shared = _shared([parts[:-1] for parts in tried])
        hits = [
            (sum(isinstance(self.find("/".join(parts[depth:])), tuple) for parts in tried), -depth)
            for depth in range(1, len(shared) + 1)
        ]
        found, depth = max(hits, default=(0, 0))
        return tuple(shared[:-depth]) if found else ()

    def _below(self, name: str) -> str | None:
        path = os.path.normpath(os.path.join(self._folder, name))  # noqa: PTH118 - a Path per file is slow
        return next((path[len(start) :] for start in self._starts if path.startswith(start)), None)


def split_path(name: str) -> list[str]:
    """Split a path into its folders and its name. An absolute path begins with an empty folder."""
    return [part for place, part in enumerate(name.split("/")) if part not in ("", ".") or (place == 0 and part == "")]


def _shared(folders: Sequence[Sequence[str]]) -> list[str]:
    """Return the leading folders that all paths share."""
    return [own[0] for own in takewhile(lambda own: len(set(own)) == 1, zip(*folders, strict=False))]


def _spellings(name: str) -> Iterator[str]:
    slashed = (name, name.replace("\\", "/")) if "\\" in name else (name,)
    for spelling in slashed:
        yield spelling
        if not spelling.isascii():
            yield unicodedata.normalize("NFC", spelling)
            yield unicodedata.normalize("NFD", spelling)
