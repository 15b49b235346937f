"""CIFAR-10's binary version as a source of `ingest`: six files of records, a label byte and 3,072 bytes of pixels.

    data_batch_1.bin ... data_batch_5.bin, test_batch.bin, batches.meta.txt (the class names, one a line)

The format is described at https://www.cs.toronto.edu/~kriz/cifar.html. The Python version of the set is made of
pickles and is not read. Images become BMP: without loss, and with bytes that no version of a compressor changes.
"""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.errors import InputError, WorkFailed
from pipelines.intake.protocols.table import Protocol
from pipelines.intake.sources import Entry, Listing, Source

CLASSES = 10
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
NAMES = "batches.meta.txt"
MAX_NAMES_BYTES = 4096
TEST = "test_batch"
BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), TEST)
DRAW_SEED = (0, 2)
"""Not `ingest.seed`: a protocol is the same split for everyone."""


def open_cifar(folder: Path, protocol: Protocol) -> Source:
    """Check the files in `folder` and deal their images to the parts of `protocol`, named in `group` of each entry.

    InputError, with file, found and expected, where a file is missing or does not fit.
    """
    names = _class_names(folder / NAMES)
    labels = np.concatenate([_labels(folder / f"{batch}.bin", protocol.batch) for batch in BATCHES])
    for klass, count in enumerate(np.bincount(labels, minlength=CLASSES)):
        if count * CLASSES != protocol.images:
            raise InputError(
                f"{folder}: {count} images of class {names[klass]}, {protocol.images // CLASSES} expected: "
                "it is not the original set"
            )
    parts = _official(protocol) if protocol.official else _drawn(labels, protocol)
    listing = Listing(str(folder))
    for place, part in enumerate(parts):
        batch, row = divmod(place, protocol.batch)
        listing.add(Entry(f"{BATCHES[batch]}/{row:05d}.bmp", (names[labels[place]],), None, part))
    return Source(listing, lambda path: _read(folder, path))


def _class_names(path: Path) -> list[str]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_NAMES_BYTES + 1)
        names = data.decode("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}: --root is the folder cifar-10-batches-bin") from None
    if len(data) > MAX_NAMES_BYTES or len(set(names)) != CLASSES or len(names) != CLASSES:
        raise InputError(f"{path} has {len(names)} class names, {CLASSES} different ones expected")
    return names


def _labels(path: Path, images: int) -> npt.NDArray[np.uint8]:
    """The label byte of each record."""
    try:
        size = path.stat().st_size
        if size != images * RECORD:
            raise InputError(f"{path} has {size} bytes, {images * RECORD} expected ({images} images of {RECORD})")
        labels = np.fromfile(path, np.uint8, images * RECORD).reshape(images, RECORD)[:, 0].copy()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} became shorter while it was read") from None
    wrong = np.flatnonzero(labels >= CLASSES)
    if len(wrong):
        raise InputError(f"{path}, image {wrong[0]}: its label is {labels[wrong[0]]}, 0 to {CLASSES - 1} expected")
    return labels


def _official(protocol: Protocol) -> list[str]:
    return ["query" if batch == TEST else "train" for batch in BATCHES for _ in range(protocol.batch)]


def _drawn(labels: npt.NDArray[np.uint8], protocol: Protocol) -> list[str]:
    """Of each class, in a seeded order: the queries first, then training, validation and the rest."""
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence(DRAW_SEED)))
    parts = ["database"] * len(labels)
    for klass in range(CLASSES):
        places = random.permutation(np.flatnonzero(labels == klass))
        start = 0
        for part in ("query", "train", "val"):
            stop = start + protocol.parts.get(part, 0) // CLASSES
            for place in places[start:stop]:
                parts[place] = part
            start = stop
    return parts


def _read(folder: Path, path: str) -> bytes:
    """One image as BMP bytes."""
    batch, _, name = path.partition("/")
    file = folder / f"{batch}.bin"
    try:
        with file.open("rb") as stream:
            stream.seek(int(name.removesuffix(".bmp")) * RECORD + 1)
            data = stream.read(RECORD - 1)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    if len(data) != RECORD - 1:
        raise WorkFailed(f"{file} changed while it was ingested: run again")
    pixels = np.frombuffer(data, np.uint8).reshape(3, SIDE, SIDE).transpose(1, 2, 0)
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(sink, "BMP")
    return sink.getvalue()
