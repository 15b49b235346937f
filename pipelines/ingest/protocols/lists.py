"""Protocols that the field ships as lists, in the format of thuml/HashNet.

    train.txt, test.txt, database.txt     a line an image: <path> <0 or 1 for each class>

Each code base has its own folders in front of the paths, so only the last folder and the name count, as in
`train2014/COCO_train2014_000000440877.jpg`. That is the place of the image below `--root`, beside the lists, and
without suffix its key.

A code base reads the lists one by one, so they may overlap. Here an image is stored once. If it is in two lists, its
part is the first of test, train and database; training images and queries that are in `database.txt` too are searched.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.ingest.protocols.base import ROLES, Protocol
from pipelines.ingest.protocols.files import read_bounded, require_image
from pipelines.ingest.sources import Listing, Source, SourceImage, check_relative_path, make_printable
from pipelines.shards.folders import FolderReader

MAX_LIST_BYTES = 256 << 20
"""Largest size of a list in bytes, seven times the largest of the field (ImageNet-100, 128,503 images)."""
ROOT_HINT = "--root is the folder that holds train.txt, test.txt, database.txt and the images that they list"


@dataclass(frozen=True, slots=True)
class Line:
    """One image of a list: the list and line, the last folder and name of its path, and the columns of its labels."""

    list: Path
    number: int
    path: str
    labels: tuple[int, ...]

    @property
    def where(self) -> str:
        """List and line, for an error."""
        return f"{self.list}, line {self.number}"


@dataclass(frozen=True)
class ImageList:
    """A list. `sha256` is the digest of its lines with paths cut to the last folder and name, and single spaces."""

    lines: Sequence[Line]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Listed(Protocol):
    """A protocol of lists. `classes` are the names of the columns.

    With `halves`, lines 1, 3, 5, ... of test.txt are queries and the others are for validation.
    """

    classes: tuple[str, ...]
    halves: bool = False

    @contextmanager
    def open(self, root: Path) -> Iterator[Source]:
        """Open the lists; each entry's `group` is its part. Raises InputError for lists that cannot be right."""
        names = ("test.txt", "train.txt", "database.txt")
        lists = {name: read_list(root / name, len(self.classes)) for name in names}
        held, searched = self._deal_lines(*lists.values())
        locate = self.locate(root)
        listing = Listing(str(root))
        for path, (part, line) in held.items():
            self.check(line)
            require_image(root, locate(path), line.where)
            labels = sorted(self.classes[column] for column in line.labels)
            listing.add(SourceImage(path, tuple(labels), None, part))
        read = FolderReader(str(root))
        files = {name: found.sha256 for name, found in lists.items()}
        yield Source(listing, lambda path, _="": read(locate(path)), files, searched)

    def deal(self, entries: Sequence[SourceImage], keys: Sequence[str]) -> list[str]:
        """Return the part of each entry from the lists."""
        return [entry.group or "" for entry in entries]

    def locate(self, root: Path) -> Callable[[str], str]:
        """Return a function from an image's listed path to its place below `root`; here they are the same."""
        return str

    def check(self, line: Line) -> None:
        """Raise InputError if a line cannot be right for this data set. Here all pass; a subclass may refuse some."""

    def _deal_lines(
        self, test: ImageList, train: ImageList, database: ImageList
    ) -> tuple[Mapping[str, tuple[str, Line]], tuple[str, ...]]:
        """Return the part and the line of each path, and the parts that are searched.

        Raises InputError if a training image is a query, labels differ, or a part is in the database only partly.
        """
        held: dict[str, tuple[str, Line]] = {}
        for place, line in enumerate(test.lines):
            held[line.path] = ("val" if self.halves and place % 2 else "query", line)
        for line in train.lines:
            if line.path in held:
                raise InputError(
                    f"{line.where}: {make_printable(line.path)} is in {held[line.path][1].where} too: what is "
                    f"trained on cannot be a query, so these are not the lists of {self.name}"
                )
            held[line.path] = ("train", line)
        sizes = Counter(part for part, _ in held.values())
        again: Counter[str] = Counter()
        for line in database.lines:
            part, first = held.setdefault(line.path, ("database", line))
            if first is not line:
                again[part] += 1
                if first.labels != line.labels:
                    raise InputError(
                        f"{line.where}: {make_printable(line.path)} has other labels than in {first.where}"
                    )
        for part, count in again.items():
            if count != sizes[part]:
                raise InputError(
                    f"{database.lines[0].list} has {count} of the {sizes[part]} images for {part}: all or none of "
                    f"them are searched, so these are not the lists of {self.name}"
                )
        return held, tuple(part for part in ROLES if part in again or part == "database")


def read_list(path: Path, columns: int) -> ImageList:
    """Read a list. Raises InputError unless each line is a path and a 0 or 1 per class, and each image comes once."""
    lines: list[Line] = []
    numbers: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, text in enumerate(read_bounded(path, MAX_LIST_BYTES, ROOT_HINT).rstrip().split(b"\n"), 1):
        name, *flags = text.split() or [b""]
        image = _last_two(name)
        if image is None or len(flags) != columns or not {*flags} <= {b"0", b"1"}:
            raise InputError(
                f"{path}, line {number} is not a path <folder>/<name> and {columns} times 0 or 1, one for each class"
            )
        if image in numbers:
            raise InputError(f"{path}, line {number}: {make_printable(image)} is in line {numbers[image]} too")
        numbers[image] = number
        digest.update(b" ".join([os.fsencode(image), *flags]) + b"\n")
        lines.append(Line(path, number, image, tuple(place for place, flag in enumerate(flags) if flag == b"1")))
    return ImageList(lines, digest.hexdigest())


def _last_two(name: bytes) -> str | None:
    """Return the last folder and the name of a path, or None if it has no folder or leads out of it."""
    parts = os.fsdecode(name).split("/")[-2:]
    path, refusal = check_relative_path("/".join(parts))
    return path if refusal is None and path.split("/") == parts and len(parts) == 2 else None
