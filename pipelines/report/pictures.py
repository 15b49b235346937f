"""Thumbnails of indexed samples, read from the shards they came from, digest-checked and re-encoded."""

import base64
import io
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import open_input_version
from pipelines.errors import HHNetError
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from pipelines.shards.shards import Shard, ShardSet, open_shards

THUMBNAIL_SIDE = 128
"""Longest side of a thumbnail in a report, in pixels."""
LARGE_SIDE = 256
"""Longest side of a thumbnail where the pictures are what a page is for, in pixels."""
MAX_LOSSLESS_SIDE = 64
"""Longest side up to which images are stored as PNG; larger ones become JPEG."""


class SampleLocation(NamedTuple):
    """The place of a sample's image: the sha256 of its tar, and its row there."""

    shard_sha256: str
    row: int


class Pictures:
    """Thumbnails by place, as data URIs. `problems` says in plain words why some are missing."""

    def __init__(self, sets: Iterable[ShardSet] = (), problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        self._shards: dict[str, tuple[ShardSet, Shard]] = {}
        for entry in sets:
            self.add(entry)

    def add(self, entry: ShardSet) -> None:
        """Take pictures from these shards too."""
        for shard in entry.shards:
            self._shards.setdefault(shard.part.sha256, (entry, shard))

    def __contains__(self, shard_sha256: str) -> bool:
        return shard_sha256 in self._shards

    def has_all(self, tars: Iterable[str]) -> bool:
        """Tell whether each of these tars, by sha256, is known."""
        return all(sha256 in self._shards for sha256 in tars)

    def get(self, places: Iterable[SampleLocation], side: int = THUMBNAIL_SIDE) -> dict[SampleLocation, str]:
        """Return the data URIs of those places whose image can be read; each tar is opened once."""
        groups: dict[str, set[int]] = {}
        for place in places:
            groups.setdefault(place.shard_sha256, set()).add(place.row)
        found: dict[SampleLocation, str] = {}
        for sha256, rows in sorted(groups.items()):
            if sha256 in self._shards:
                found |= self._read(sha256, sorted(rows), side)
        return found

    def _read(self, sha256: str, rows: list[int], side: int) -> dict[SampleLocation, str]:
        entry, shard = self._shards[sha256]
        found = {}
        try:
            for sample in entry.read(shard, [row for row in rows if row < shard.rows]):
                uri = thumbnail(sample.image, side)  # a damaged sample comes without bytes
                if uri is not None:
                    found[SampleLocation(sha256, sample.record.row)] = uri
        except HHNetError as error:
            self.problems.append(str(error))
        return found


def find_pictures(
    codes: Iterable[Artifact], shards: Iterable[ShardSet], needed: Collection[str] | None = None
) -> Pictures:
    """Find the pictures of the samples of `codes`: in `shards`, then in the shards that the codes came from.

    `needed` are the sha256 of the tars that pictures are wanted from: once all are found, no further codes are opened.
    Those that the codes came from may be out of reach.
    """
    pictures = Pictures(shards)
    for artifact in codes:
        if needed is not None and pictures.has_all(needed):
            break
        try:
            pictures.add(open_shards(open_input_version(artifact, "shards")))
        except HHNetError as error:
            pictures.problems.append(str(error))
    return pictures


def thumbnail(data: bytes, side: int = THUMBNAIL_SIDE) -> str | None:
    """Return a picture of at most `side` pixels a side as a data URI, or None if the bytes are no image."""
    try:
        return encode_thumbnail(decode_image(data), side)
    except ImageReject:
        return None


def encode_thumbnail(pixels: npt.NDArray[np.uint8], side: int = THUMBNAIL_SIDE) -> str:
    """Encode uint8 RGB (H, W, 3) as a data URI; small images stay lossless, since they are shown enlarged."""
    image = Image.fromarray(pixels)
    small = max(image.size) <= MAX_LOSSLESS_SIDE
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    if small:
        image.save(sink, "PNG", optimize=True)
    else:
        image.save(sink, "JPEG", quality=85)
    return data_uri(sink.getvalue(), "png" if small else "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Return an image's bytes as a URI that a page carries inside itself."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
