"""NUS-WIDE and the protocols of its 21 most frequent concepts: drawn from the label files, or by lists of the field.

    ImageList/Imagelist.txt                       269,648 lines <folder>\\<name>
    Groundtruth/AllLabels/Labels_<concept>.txt    as many lines, 0 or 1 for these images (or AllLabels in the root)
    Flickr/<folder>/<name>, or images/<name>      the images
    or train.txt, test.txt, database.txt, images/ for a protocol of lists

`nuswide21` has the counts of data/nuswide_21/code.py of swuxyj/DeepHash-pytorch and fills them in the same way; that
code's own draw is `nuswide21-list`. HyP2 uses these counts too. `nuswide21-m` are the lists of swuxyj and of DHD over
the images of HashNet's archive (those of CSQ lack 45 and 60 lines). `nuswide21-h2q` has the counts of the code of H2Q
and of HHNet, which uses the images that can still be downloaded.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError
from pipelines.ingest.protocols.base import REST, Protocol
from pipelines.ingest.protocols.draws import draw_parts, fill_parts
from pipelines.ingest.protocols.files import read_bounded, require_image
from pipelines.ingest.protocols.lists import Listed
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, Source, SourceImage, check_relative_path, make_printable
from pipelines.shards.folders import FolderReader

CLASSES = (
    *("sky", "clouds", "person", "water", "animal", "grass", "buildings", "window", "plants", "lake", "ocean", "road"),
    *("flowers", "sunset", "reflection", "rocks", "vehicle", "snow", "tree", "beach", "mountain"),
)
"""The 21 concepts in the order of the lists' columns, the most frequent first; the draw uses this order too."""
MAX_LINE_BYTES = 256
"""Longest line of the image list in bytes."""
DRAW_SEED = "nuswide draw 1"
"""Seed of all draws, in place of `ingest.seed`: a protocol is the same split for everyone."""
ROOT_HINT = "--root is the folder that holds ImageList, Groundtruth/AllLabels, and Flickr or images"


@dataclass(frozen=True, kw_only=True)
class NusWide(Protocol):
    """A protocol that is drawn from the images with at least one of the 21 concepts.

    `images` is the number of all images, `labelled` of those with a concept. With `by_class`, each concept has its
    share of queries and of training images; otherwise any image can be drawn. With `partial`, missing images are
    skipped, and the others are split.
    """

    images: int = 269_648
    labelled: int = 195_834
    by_class: bool = True
    partial: bool = False

    @contextmanager
    def open(self, root: Path) -> Iterator[Source]:
        """Open the label files; a key is a line of the image list without its suffix, such as actor/0001_2124494179."""
        folder = "Groundtruth/AllLabels" if (root / "Groundtruth").is_dir() else "AllLabels"
        files = {"ImageList/Imagelist.txt": self.images * MAX_LINE_BYTES}
        # A line is 0 or 1 and a line end.
        files |= {f"{folder}/Labels_{name}.txt": 4 * self.images for name in CLASSES}
        data = {name: read_bounded(root / name, limit, ROOT_HINT) for name, limit in files.items()}
        (list_name, lines), *columns = data.items()
        paths = _read_paths(lines, root / list_name, self.images)
        flags_NC = np.stack([_read_flags(text, root / name, self.images) for name, text in columns], axis=1)
        if (found := int(flags_NC.any(axis=1).sum())) != self.labelled:
            raise InputError(f"{root}: {found} images have one of the 21 concepts, {self.labelled} expected")
        locate = _locate(root)
        listing = Listing(str(root))
        for number, (path, flags_C) in enumerate(zip(paths, flags_NC, strict=True), 1):
            labels = tuple(sorted(CLASSES[column] for column in np.flatnonzero(flags_C)))
            if not labels:
                listing.skip(path, SkipReason.NO_LABEL, "none of the 21 concepts")
            elif self.partial and not (root / locate(path)).exists():
                listing.skip(path, SkipReason.MISSING)
            else:
                require_image(root, locate(path), f"{root / list_name}, line {number}")
                listing.add(SourceImage(path, labels))
        read = FolderReader(str(root))
        # Without the folder above it, since the same AllLabels may also lie in the root.
        digests = {name.removeprefix("Groundtruth/"): hashlib.sha256(text).hexdigest() for name, text in data.items()}
        yield Source(listing, lambda path, _="": read(locate(path)), digests)

    def deal(self, entries: Sequence[SourceImage], keys: Sequence[str]) -> list[str]:
        """Draw the part of each entry: by concept, training images first as in code.py, or without regard to labels."""
        if self.by_class:
            labels = [sorted(entry.labels, key=CLASSES.index) for entry in entries]
            shares = {part: self.parts[part] // len(CLASSES) for part in ("train", "query")}
            return fill_parts(keys, labels, shares, DRAW_SEED)
        shares = {part: self.parts[part] for part in ("query", "train", "val")}
        return draw_parts(keys, [""] * len(keys), shares, DRAW_SEED)


def _read_paths(data: bytes, where: Path, images: int) -> list[str]:
    """Return the path of each image with slashes. Raises InputError for a line that is no path or comes twice."""
    lines = data.rstrip().split(b"\n")
    if len(lines) != images:
        raise InputError(f"{where} has {len(lines)} lines, {images} expected: one for each image")
    numbers: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().decode("utf-8", "surrogateescape").replace("\\", "/")
        path, refusal = check_relative_path(text)
        if refusal or path != text or path.count("/") != 1 or len(line) > MAX_LINE_BYTES:
            raise InputError(f"{where}, line {number}: {make_printable(text)[:80]!r} is not <folder>\\<name>")
        if path in numbers:
            raise InputError(f"{where}, line {number}: {make_printable(path)} is in line {numbers[path]} too")
        numbers[path] = number
    return list(numbers)


def _read_flags(data: bytes, where: Path, images: int) -> npt.NDArray[np.bool_]:
    """Read which images have the concept, bool (images,)."""
    flags = data.split()
    if len(flags) != images:
        raise InputError(f"{where} has {len(flags)} lines, {images} expected: one for each image")
    for number, flag in enumerate(flags, 1):
        if flag not in (b"0", b"1"):
            raise InputError(f"{where}, line {number} is not 0 or 1")
    return np.array([flag == b"1" for flag in flags])


def _locate(root: Path) -> Callable[[str], str]:
    """Return a function from a path of the list to the image's place below `root`."""
    if (root / "Flickr").is_dir():
        return lambda path: f"Flickr/{path}"
    return lambda path: f"images/{path.partition('/')[2]}"


_COUNTS = {"train": 10_500, "query": 2_100, "database": 183_234}

PROTOCOLS = (
    NusWide(name="nuswide21", parts=_COUNTS, database=("train", "database")),
    Listed(
        name="nuswide21-list",
        parts=_COUNTS,
        classes=CLASSES,
        keys={
            "train": "10fb537e50f267c983600425c9685553a67cd697395736c2006927f6e5580c8c",
            "query": "3c6265b9c0a4f7df973e5625d1fd8479ce5e2f81430de3159c082acfb36e1b87",
        },
    ),
    Listed(
        name="nuswide21-m",
        parts={"train": 10_500, "query": 2_100, "database": REST},
        classes=CLASSES,
        keys={
            "train": "2d6d3dda55a82a33ddcc368d53ad864c21404a32b52bd7135d437e5d42c27a61",
            "query": "29cf6ed66abb17fab7d8785a208498cbbd68f7b4799e23ed4c7982125cbf6871",
        },
    ),
    NusWide(
        name="nuswide21-h2q",
        parts={"train": 10_500, "query": 2_100, "val": 2_100, "database": REST},
        database=("database",),
        by_class=False,
        partial=True,
    ),
)
