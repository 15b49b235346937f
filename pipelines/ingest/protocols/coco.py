"""MS COCO 2014 and its protocols: drawn from the annotations, or by the lists of two families of code bases.

    annotations/instances_train2014.json, instances_val2014.json     images to draw from, with labels
    or train.txt, test.txt, database.txt                             a family's lists
    train2014/, val2014/                                             the images

The lists of thuml/HashNet and yuanli2333/Hadamard-Matrix-for-hashing (CSQ; its train.txt is short of 8 lines) are one
family, with HHF and MMHH; those of swuxyj/DeepHash-pytorch and thulab/DeepHash the other, with DHD and TDH. Both have
the 122,218 images that have an annotation, but their queries and training images are not the same. `coco-h2q` has the
counts of the code of H2Q and of HHNet, which also takes images without an annotation.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.ingest.protocols.base import Protocol
from pipelines.ingest.protocols.draws import draw_parts
from pipelines.ingest.protocols.files import read_bounded, require_image
from pipelines.ingest.protocols.lists import Listed
from pipelines.ingest.skips import SkipReason
from pipelines.ingest.sources import Listing, Source, SourceImage
from pipelines.shards.folders import FolderReader

CLASSES = (
    *("airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bear", "bed", "bench", "bicycle"),
    *("bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "cell phone"),
    *("chair", "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork"),
    *("frisbee", "giraffe", "hair drier", "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop"),
    *("microwave", "motorcycle", "mouse", "orange", "oven", "parking meter", "person", "pizza", "potted plant"),
    *("refrigerator", "remote", "sandwich", "scissors", "sheep", "sink", "skateboard", "skis", "snowboard", "spoon"),
    *("sports ball", "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet"),
    *("toothbrush", "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra"),
)
"""Categories in the order of the lists' columns, which is alphabetical."""
FOLDERS = ("train2014", "val2014")
MAX_JSON_BYTES = 512 << 20
"""Largest size of an annotation file in bytes, 1.5 times that of the larger one."""
DRAW_SEED = "coco draw 1"
"""Seed of all draws, in place of `ingest.seed`: a protocol is the same split for everyone."""
ROOT_HINT = "--root is the folder that holds annotations/instances_train2014.json, train2014 and val2014"

_FIELDS = ("images", "annotations", "categories", "id", "file_name", "name", "image_id", "category_id")


@dataclass(frozen=True, kw_only=True)
class Coco(Protocol):
    """A protocol that is drawn from the annotated images of COCO 2014; if `labelled` is False, also from the others."""

    labelled: bool = True

    @contextmanager
    def open(self, root: Path) -> Iterator[Source]:
        """Open the annotations; the labels of an image are the categories of all objects in it."""
        listing = Listing(str(root))
        files = {}
        for folder in FOLDERS:
            name = f"annotations/instances_{folder}.json"
            data = read_bounded(root / name, MAX_JSON_BYTES, ROOT_HINT)
            files[name] = hashlib.sha256(data).hexdigest()
            for place, (image, labels) in enumerate(read_instances(data, str(root / name))):
                if labels or not self.labelled:
                    require_image(root, f"{folder}/{image}", f"{root / name}: images[{place}]")
                    listing.add(SourceImage(f"{folder}/{image}", labels))
                else:
                    listing.skip(f"{folder}/{image}", SkipReason.NO_LABEL, "no object annotated")
        yield Source(listing, FolderReader(str(root)), files)

    def deal(self, entries: Sequence[SourceImage], keys: Sequence[str]) -> list[str]:
        """Draw the part of each entry without regard to labels, as the code of H2Q does."""
        shares = {part: self.parts[part] for part in ("query", "train", "val") if part in self.parts}
        return draw_parts(keys, [""] * len(keys), shares, DRAW_SEED)


# ------------------------------------------------------------------------------------------------------ annotations


def read_instances(data: bytes, where: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return (file name, sorted class names) of each image, in the order of the file. InputError for malformed data."""
    try:
        # Outlines are most of the file: each object is cut to the known fields as soon as it is parsed.
        document = json.loads(data, object_hook=_known_fields)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}: {_ORIGINAL}") from None
    if not isinstance(document, dict):
        raise InputError(f"{where} is not an object with images, annotations and categories: {_ORIGINAL}")
    names = _read_categories(_objects(document, "categories", where), where)
    found: dict[int, tuple[str, set[str]]] = {}
    for place, image in enumerate(_objects(document, "images", where)):
        number = _integer(image, "id", f"{where}: images[{place}]")
        if number in found:
            raise InputError(f"{where}: images[{place}] has the id {number} of an image before it: {_ORIGINAL}")
        found[number] = (_file_name(image, f"{where}: images[{place}]"), set())
    for place, annotation in enumerate(_objects(document, "annotations", where)):
        at = f"{where}: annotations[{place}]"
        image_id, category = _integer(annotation, "image_id", at), _integer(annotation, "category_id", at)
        if image_id not in found:
            raise InputError(f"{at} is of image {image_id}, which images does not have: {_ORIGINAL}")
        if category not in names:
            raise InputError(f"{at} is of category {category}, which categories does not have: {_ORIGINAL}")
        found[image_id][1].add(names[category])
    return [(name, tuple(sorted(labels))) for name, labels in found.values()]


def _known_fields(parsed: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parsed[name] for name in _FIELDS if name in parsed}


def _objects(document: Mapping[str, Any], name: str, where: str) -> list[Mapping[str, Any]]:
    rows = document.get(name)
    if not isinstance(rows, list):
        raise InputError(f"{where} has no list {name}: {_ORIGINAL}")
    for place, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{where}: {name}[{place}] is not an object: {_ORIGINAL}")
    return rows


def _read_categories(rows: Sequence[Mapping[str, Any]], where: str) -> dict[int, str]:
    """Return the class name of each category id. Raises InputError unless the names are the 80 known ones."""
    names: dict[int, str] = {}
    for place, row in enumerate(rows):
        number, name = _integer(row, "id", f"{where}: categories[{place}]"), row.get("name")
        if number in names or name in names.values() or name not in CLASSES:
            raise InputError(
                f"{where}: categories[{place}], {str(name)[:80]!r}, is unknown to COCO or comes twice: {_ORIGINAL}"
            )
        names[number] = str(name)
    if missing := sorted({*CLASSES} - {*names.values()}):
        raise InputError(
            f"{where} has {len(names)} categories of {len(CLASSES)}, {missing[0]!r} is missing: {_ORIGINAL}"
        )
    return names


def _integer(row: Mapping[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where} has no whole number {name}: {_ORIGINAL}")
    return value


def _file_name(row: Mapping[str, Any], where: str) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name.isprintable() or "/" in name:
        raise InputError(f"{where} has no plain file_name: {_ORIGINAL}")
    return name


_ORIGINAL = "take the original annotations of COCO"
_COUNTS = {"train": 10_000, "query": 5_000, "database": 107_218}

PROTOCOLS = (
    Coco(name="coco", parts=_COUNTS, database=("train", "database")),
    Listed(
        name="coco-hashnet",
        parts=_COUNTS,
        classes=CLASSES,
        keys={
            "train": "a3420d6bf1cca1aba9cc234b3b52b0c7199afb23ca2800a0f2035ca942b79f98",
            "query": "98420196f895b9761ee5c1b3eaf5ebba45b8f47de36b2332d05143a2d4d02a1f",
            "database": "e2f968b8496c3c250928ee2b7258718e52d0a3238bd5cfe062be10a0a1f3c3bb",
        },
    ),
    Listed(
        name="coco-deephash",
        parts=_COUNTS,
        classes=CLASSES,
        keys={
            "train": "24ca230bc54f3ff2a9708eb1b24943a94ec10487abde61e81f0d1f12cd0fc10a",
            "query": "9497c24c74f9bd84cb3692dae7feb33618c8ecfe9a785a460848964dd5436a2e",
        },
    ),
    Coco(
        name="coco-h2q",
        parts={"train": 10_000, "query": 5_000, "val": 5_000, "database": 103_287},
        database=("database",),
        labelled=False,
    ),
)
