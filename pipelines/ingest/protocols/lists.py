"""Protocols that the field ships as lists, in the format of thuml/HashNet.

    train.txt, test.txt, database.txt     a line an image: <path> <0 or 1 for each class>

Each code base has its own folders in front of the paths, so a path counts by its last folder and name, as in
`train2014/COCO_train2014_000000440877.jpg`. That, without suffix, is the image's key, and it says where the image lies
below `--root`, beside the lists.

A code base reads the lists one by one, so they may overlap. Here an image is stored once: one that is in two lists is
part of the first of test, train and database, and whether training images or queries are searched is what
`database.txt` says of them.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.ingest.folders import folder_reader
from pipelines.ingest.protocols.base import ROLES, Protocol
from pipelines.ingest.protocols.files import read_bounded, require_image
from pipelines.ingest.sources import Entry, Listing, Source, inside, printable

MAX_LIST_BYTES = 256 << 20
"""Seven times the largest list of the field, the 128,503 images of ImageNet-100."""
WANTED = "--root is the folder that holds train.txt, test.txt, database.txt and the images that they list"


@dataclass(frozen=True, slots=True)
class Line:
    """One image of a list: where it is listed, the last folder and name of its path, and its labels as columns."""

    list: Path
    number: int
    path: str
    labels: tuple[int, ...]

    @property
    def where(self) -> str:
        """The list and the line, for an error."""
        return f"{self.list}, line {self.number}"


@dataclass(frozen=True)
class ImageList:
    """A list that was read. `sha256` is that of its lines with paths cut to last folder and name, single spaces."""

    lines: Sequence[Line]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Listed(Protocol):
    """A protocol of lists. `classes` are what the columns stand for.

    With `halves` the lines 1, 3, 5 ... of test.txt are queries and the others are for validation.
    """

    classes: tuple[str, ...]
    halves: bool = False

    @contextmanager
    def open(self, root: Path) -> Iterator[Source]:
        """Open the lists; each entry's `group` is its part."""
        names = ("test.txt", "train.txt", "database.txt")
        lists = {name: read_list(root / name, len(self.classes)) for name in names}
        held, searched = self._deal_lines(*lists.values())
        locate = self.locate(root)
        listing = Listing(str(root))
        for path, (part, line) in held.items():
            self.check(line)
            require_image(root, locate(path), line.where)
            labels = sorted(self.classes[column] for column in line.labels)
            listing.add(Entry(path, tuple(labels), None, part))
        read = folder_reader(root)
        files = {name: found.sha256 for name, found in lists.items()}
        yield Source(listing, lambda path: read(locate(path)), files, searched)

    def deal(self, entries: Sequence[Entry], keys: Sequence[str]) -> list[str]:
        """The parts that the lists say."""
        return [entry.group or "" for entry in entries]

    def locate(self, root: Path) -> Callable[[str], str]:
        """How the place of an image below `root` follows from its listed path: it is that path."""
        return str

    def check(self, line: Line) -> None:
        """InputError where a line cannot be right for this data set."""

    def _deal_lines(
        self, test: ImageList, train: ImageList, database: ImageList
    ) -> tuple[Mapping[str, tuple[str, Line]], tuple[str, ...]]:
        """The part and the line of each path, and the parts that the database list has too."""
        held: dict[str, tuple[str, Line]] = {}
        for place, line in enumerate(test.lines):
            held[line.path] = ("val" if self.halves and place % 2 else "query", line)
        for line in train.lines:
            if line.path in held:
                raise InputError(
                    f"{line.where}: {printable(line.path)} is in {held[line.path][1].where} too: what is trained on "
                    f"cannot be a query, so these are not the lists of {self.name}"
                )
            held[line.path] = ("train", line)
        sizes = Counter(part for part, _ in held.values())
        again: Counter[str] = Counter()
        for line in database.lines:
            part, first = held.setdefault(line.path, ("database", line))
            if first is not line:
                again[part] += 1
                if first.labels != line.labels:
                    raise InputError(f"{line.where}: {printable(line.path)} has other labels than in {first.where}")
        for part, count in again.items():
            if count != sizes[part]:
                raise InputError(
                    f"{database.lines[0].list} has {count} of the {sizes[part]} images for {part}: all or none of "
                    f"them are searched, so these are not the lists of {self.name}"
                )
        return held, tuple(part for part in ROLES if part in again or part == "database")


def read_list(path: Path, columns: int) -> ImageList:
    """Read a list; InputError unless each line is a path and a 0 or 1 for each class, and each image comes once."""
    lines: list[Line] = []
    numbers: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, text in enumerate(read_bounded(path, MAX_LIST_BYTES, WANTED).rstrip().split(b"\n"), 1):
        name, *flags = text.split() or [b""]
        image = _last_two(name)
        if image is None or len(flags) != columns or not {*flags} <= {b"0", b"1"}:
            raise InputError(
                f"{path}, line {number} is not a path <folder>/<name> and {columns} times 0 or 1, one for each class"
            )
        if image in numbers:
            raise InputError(f"{path}, line {number}: {printable(image)} is in line {numbers[image]} too")
        numbers[image] = number
        digest.update(b" ".join([os.fsencode(image), *flags]) + b"\n")
        lines.append(Line(path, number, image, tuple(place for place, flag in enumerate(flags) if flag == b"1")))
    return ImageList(lines, digest.hexdigest())


def _last_two(name: bytes) -> str | None:
    """The last folder and the name of a path; None where it has none, or leaves its folder."""
    parts = os.fsdecode(name).split("/")[-2:]
    path, refusal = inside("/".join(parts))
    return path if refusal is None and path.split("/") == parts and len(parts) == 2 else None
