"""CIFAR-10 and its protocols, read from its binary version, or from a folder of pictures.

    cifar-10-batches-bin/   data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt (the class names)
    pictures/               train/<class>/<picture>, test/<class>/<picture>

The binary version (https://www.cs.toronto.edu/~kriz/cifar.html) has 10,000 records a file, each a label byte and
3,072 bytes of red, green and blue planes. A key is a file and a row in it, such as data_batch_1/00017. The Python
version is made of pickles and is refused.

The protocols and the code bases with the same counts: `cifar10` swuxyj/DeepHash-pytorch and thulab/DeepHash;
`cifar10-1` swuxyj, ssppp/GreedyHash I and kamwoh/orthohash; `cifar10-2` ssppp/GreedyHash II; `cifar10-h2q` the code of
H2Q and of HHNet. Only the counts are theirs: drawn parts have other images.
"""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.errors import InputError, WorkFailed
from pipelines.ingest.layout import Layout
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.protocols.draws import draw_parts
from pipelines.ingest.sources import Listing, Source, SourceImage, make_printable, open_source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
"""Side of an image in pixels."""
IMAGE_BYTES = 3 * SIDE * SIDE
"""Bytes of the pixels of an image."""
RECORD_BYTES = 1 + IMAGE_BYTES
"""Bytes of a record."""
NAMES_FILE = "batches.meta.txt"
MAX_NAMES_BYTES = 4096
"""Bytes that are read of the file of class names."""
TEST_FILE = "test_batch"
BATCH_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), TEST_FILE)
DRAW_SEED = "cifar10 draw 1"
"""Seed of all draws, in place of `ingest.seed`: a protocol is the same split for everyone."""
ROOT_HINT = "--root is the folder cifar-10-batches-bin, or one of train/<class> and test/<class>"

_BMP = struct.pack(
    "<2sIIIIiiHHIIiiII", b"BM", 54 + IMAGE_BYTES, 0, 54, 40, SIDE, SIDE, 1, 24, 0, IMAGE_BYTES, 0, 0, 0, 0
)
"""Header of an uncompressed BMP of 24 bits a pixel; rows of 32 pixels need no padding."""


@dataclass(frozen=True, kw_only=True)
class Cifar10(Protocol):
    """A protocol of CIFAR-10.

    If `official`, the test images are the queries and the others the training images. Otherwise the parts are drawn
    from all images, with the same number of each class. `batch` is the number of images in each of the six files.
    """

    official: bool = False
    batch: int = 10_000

    @contextmanager
    def open(self, root: Path) -> Iterator[Source]:
        """Open the binary version or a folder of pictures; each entry's `group` is its original part, train or test."""
        names = _names_in(root)
        if NAMES_FILE in names or any(f"{batch}.bin" in names for batch in BATCH_FILES):
            source = _open_binary(root, self.batch)
            self._check_classes(source.listing)
            yield source
        elif "batches.meta" in names or any(batch in names for batch in BATCH_FILES):
            raise InputError(
                f"{root} is the Python version of CIFAR-10, which is made of pickles and never read: take the binary "
                f"version, cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html"
            )
        elif {"train", "test"} <= names:
            with open_source(root, Layout(parts=True)) as source:
                _mark_pictures(source.listing)
                self._check_classes(source.listing)
                yield source
        else:
            raise InputError(f"{root} does not hold CIFAR-10: {ROOT_HINT}")

    def _check_classes(self, listing: Listing) -> None:
        """Raise InputError unless each class has its share of the training and of the test images."""
        found = Counter((entry.group, *entry.labels) for entry in listing.entries)
        for group, images in (("train", 5 * self.batch), ("test", self.batch)):
            for name in CLASSES:
                if found[group, name] != images // len(CLASSES):
                    raise InputError(
                        f"{listing.where}: {found[group, name]} {group} images of {name}, {images // len(CLASSES)} "
                        f"expected: it is not the original CIFAR-10"
                    )

    def deal(self, entries: Sequence[SourceImage], keys: Sequence[str]) -> list[str]:
        """Return the official part of each entry, or a drawn one."""
        if self.official:
            return ["query" if entry.group == "test" else "train" for entry in entries]
        shares = {part: self.parts[part] // len(CLASSES) for part in ("query", "train", "val") if part in self.parts}
        return draw_parts(keys, [entry.labels[0] for entry in entries], shares, DRAW_SEED)


_DRAWN = {"train": 5_000, "query": 1_000, "database": 54_000}

PROTOCOLS = (
    Cifar10(name="cifar10", parts=_DRAWN, database=("database",)),
    Cifar10(name="cifar10-1", parts=_DRAWN, database=("train", "database")),
    Cifar10(name="cifar10-2", parts={"train": 50_000, "query": 10_000}, database=("train",), official=True),
    Cifar10(
        name="cifar10-h2q",
        parts={"train": 5_000, "query": 1_000, "val": 1_000, "database": 53_000},
        database=("database",),
    ),
)


def _names_in(root: Path) -> set[str]:
    try:
        return {path.name for path in root.iterdir()}
    except OSError as error:
        raise InputError(f"cannot list {root}: {error.strerror}: {ROOT_HINT}") from None


# ---------------------------------------------------------------------------------------------------- binary version


def _open_binary(root: Path, images: int) -> Source:
    _check_names(root / NAMES_FILE)
    listing = Listing(str(root))
    for batch in BATCH_FILES:
        group = "test" if batch == TEST_FILE else "train"
        for row, label in enumerate(_read_labels(root / f"{batch}.bin", images)):
            listing.add(SourceImage(f"{batch}/{row:05d}.bmp", (CLASSES[label],), None, group))
    return Source(listing, lambda path, _="": _read_picture(root, path))


def _check_names(path: Path) -> None:
    """Raise InputError unless the class names are the known ones, in the order of their labels."""
    try:
        with path.open("rb") as stream:
            names = stream.read(MAX_NAMES_BYTES).decode("ascii", "replace").split()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}: {ROOT_HINT}") from None
    if names != list(CLASSES):
        raise InputError(f"{path} does not name {', '.join(CLASSES)}: it is not the original CIFAR-10")


def _read_labels(path: Path, images: int) -> npt.NDArray[np.uint8]:
    """Read the label of each record, uint8 (images,)."""
    try:
        if (size := path.stat().st_size) != images * RECORD_BYTES:
            raise InputError(
                f"{path} has {size} bytes, {images * RECORD_BYTES} expected ({images} records of {RECORD_BYTES})"
            )
        data = np.fromfile(path, np.uint8, images * RECORD_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}: {ROOT_HINT}") from None
    if len(data) != images * RECORD_BYTES:
        raise WorkFailed(f"{path} changed while it was read: run again")
    labels = data[::RECORD_BYTES].copy()
    if len(wrong := np.flatnonzero(labels >= len(CLASSES))):
        raise InputError(f"{path}: the label of record {wrong[0]} is {labels[wrong[0]]}, 0 to 9 expected")
    return labels


def _read_picture(root: Path, path: str) -> bytes:
    """Return a record's pixels as BMP: lossless, and in bytes that depend on no version of an encoder."""
    batch, _, name = path.partition("/")
    file = root / f"{batch}.bin"
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(int(name.removesuffix(".bmp")) * RECORD_BYTES + 1)
            data = stream.read(IMAGE_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    if len(data) != IMAGE_BYTES:
        raise WorkFailed(f"{file} changed while it was ingested: run again")
    planes = np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE)
    # BMP begins with the lowest row, and each pixel with blue.
    return _BMP + planes[::-1, ::-1].transpose(1, 2, 0).tobytes()


# ------------------------------------------------------------------------------------------------ folder of pictures


def _mark_pictures(listing: Listing) -> None:
    """Set each picture's `group` to its top folder. InputError for one outside train/<class> and test/<class>."""
    for path in [*(entry.path for entry in listing.entries), *listing.lost_files]:
        group, *folders = path.split("/")[:-1] or [""]
        if group not in ("train", "test") or len(folders) != 1 or folders[0] not in CLASSES:
            raise InputError(
                f"{listing.where}/{make_printable(path)} does not lie in train/<class> or test/<class> of the classes "
                f"{', '.join(CLASSES)}"
            )
    for place, entry in enumerate(listing.entries):
        listing.entries[place] = replace(entry, group=entry.path.partition("/")[0])
