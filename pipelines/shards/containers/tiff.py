"""TIFF and BigTIFF: a directory of tags. The decoder gets the tags that make pixels of the first picture."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import ImageReject, Picture, check_size
from pipelines.shards.containers.usual import walk_jpeg

MAX_ENTRIES = 4096
"""Largest number of tags in a directory."""
MAX_VALUES = 8 << 20
"""Largest sum of the values of the kept tags, in bytes: places of strips and tiles, and colours."""
MAX_TILE = 2048
"""Longest side of a tile in pixels, unless the picture is as wide or high."""

_WIDTH, _HEIGHT, _COMPRESSION, _ORIENTATION = 256, 257, 259, 274
_STRIPS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_BITS, _SAMPLES = 258, 277
# Also photometric interpretation, fill order, rows per strip, planes, fax options, predictor and palette; then inks,
# extra samples, sample format, JPEG tables and four tags of YCbCr. Not the orientation: `Picture` carries it.
_KEPT = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, 262, 266, _STRIPS, _SAMPLES, 278, _STRIP_BYTES, 284, 292, 293, 317, 320),
    *(_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES, 332, 338, 339, 347, 529, 530, 531, 532),
}
_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}
"""None, CCITT, LZW, JPEG, deflate, PackBits and Zstandard; not old-style JPEG, nor SGI's logarithmic coding."""
_JPEG = 7
# Bytes of one value, by the type of a tag's values.
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


@dataclass(frozen=True)
class _Form:
    """The widths of a TIFF's numbers, in bytes: a count of entries, an entry, a value or offset inside it."""

    order: Literal["little", "big"]
    count: int
    entry: int
    offset: int


def walk_tiff(data: bytes) -> Picture:
    """Return the first picture: the file with a new directory at its end that has no successor."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    big = b"+" in data[2:4]  # the number 43, in either byte order; 42 ("*") is a plain TIFF
    form = _Form(order, 8, 20, 8) if big else _Form(order, 2, 12, 4)
    link = 8 if big else 4  # where the header names the first directory; a BigTIFF first gives the width of offsets
    place = _number(data, link, form.offset, form)
    entries = _number(data, place, form.count, form)
    first, after = place + form.count, place + form.count + entries * form.entry
    if entries > MAX_ENTRIES:
        raise ImageReject(Reason.TOO_LARGE, f"a TIFF directory of {entries} entries")
    if place < link or after + form.offset > len(data):
        raise ImageReject(Reason.TRUNCATED, "the TIFF ends before its directory does")
    tags: dict[int, bytes] = {}
    for start in range(first, after, form.entry):
        tags.setdefault(_number(data, start, 2, form), data[start : start + form.entry])
    _check(data, tags, form)
    kept = [entry for tag, entry in sorted(tags.items()) if tag in _KEPT]
    pad = len(data) % 2  # a directory begins at an even byte
    end = len(data) + pad
    if not big and end > 0xFFFFFFFF:
        raise ImageReject(Reason.TOO_LARGE, "a TIFF of 4 GiB")
    whole = b"".join(
        [
            data[:link] + end.to_bytes(form.offset, order) + data[link + form.offset :] + bytes(pad),
            # Zeros at the end in place of the offset of a next directory.
            len(kept).to_bytes(form.count, order) + b"".join(kept) + bytes(form.offset),
        ]
    )
    turn = _one(data, tags, _ORIENTATION, form)
    further = _number(data, after, form.offset, form)
    return Picture("TIFF", whole, turn or 1, further != 0)


def _check(data: bytes, tags: dict[int, bytes], form: _Form) -> None:
    """Raise ImageReject for a directory that would cost much more than its size."""
    total = 0
    for tag in _KEPT & tags.keys():
        size = _bytes_of(tags[tag], form)
        total += size
        if size > form.offset and _number(tags[tag], form.entry - form.offset, form.offset, form) + size > len(data):
            raise ImageReject(Reason.TRUNCATED, f"the values of tag {tag} lie behind the end of the TIFF")
    if total > MAX_VALUES:
        raise ImageReject(Reason.TOO_LARGE, f"{total} bytes of values in a TIFF directory")
    width, height = (_one(data, tags, tag, form) for tag in (_WIDTH, _HEIGHT))
    if width is None or height is None:
        raise ImageReject(Reason.UNDECODABLE, "the TIFF does not say its width and height")
    check_size(width, height)
    compression = _one(data, tags, _COMPRESSION, form) or 1
    if compression not in _COMPRESSIONS:
        raise ImageReject(Reason.UNDECODABLE, f"a TIFF of compression {compression}, which is not decoded")
    # The sides of tiles are multiples of 16, so one tile may reach up to 15 pixels beyond the picture.
    for tag, side in ((_TILE_WIDTH, width), (_TILE_HEIGHT, height)):
        if (_one(data, tags, tag, form) or 0) > max(MAX_TILE, side + 15):
            raise ImageReject(Reason.TOO_LARGE, f"a tile of {_one(data, tags, tag, form)} pixels for {side}")
    samples = _one(data, tags, _SAMPLES, form) or 1
    if samples > 6 or _values(data, tags, _BITS, form).max(initial=1) > 64:
        raise ImageReject(Reason.UNDECODABLE, f"a TIFF of {samples} samples, or of more than 64 bits for each")
    _check_places(data, tags, form, compression == _JPEG)


def _check_places(data: bytes, tags: dict[int, bytes], form: _Form, jpegs: bool) -> None:
    """Raise ImageReject unless each strip or tile lies in the file, and each JPEG among them is within the limits."""
    tiled = _TILES in tags
    places = _values(data, tags, _TILES if tiled else _STRIPS, form)
    sizes = _values(data, tags, _TILE_BYTES if tiled else _STRIP_BYTES, form)
    if not 0 < len(places) == len(sizes):
        raise ImageReject(Reason.UNDECODABLE, "the TIFF does not say where its pixels lie")
    # Offsets are below 2^64, and so may their sums be beyond it.
    if (places > len(data)).any() or (sizes > len(data) - np.minimum(places, len(data))).any():
        raise ImageReject(Reason.TRUNCATED, "the TIFF ends before its pixels do")
    if jpegs and int(sizes.sum()) > len(data):
        raise ImageReject(Reason.UNDECODABLE, "a TIFF of JPEGs that lie over each other")
    for place, size in zip(places.tolist(), sizes.tolist(), strict=True) if jpegs else ():
        walk_jpeg(data[place : place + size])


def _one(data: bytes, tags: dict[int, bytes], tag: int, form: _Form) -> int | None:
    values = _values(data, tags, tag, form)
    return int(values[0]) if len(values) else None


def _values(data: bytes, tags: dict[int, bytes], tag: int, form: _Form) -> npt.NDArray[np.uint64]:
    """Return the whole numbers of a tag; none if it is missing or of another type."""
    entry = tags.get(tag, b"")
    kind = _number(entry, 2, 2, form)
    # Unsigned whole numbers of 1, 2, 4 and 8 bytes.
    if kind not in (1, 3, 4, 16) or _bytes_of(entry, form) > MAX_VALUES:
        return np.empty(0, np.uint64)
    size, step = _bytes_of(entry, form), _SIZES[kind]
    start = form.entry - form.offset
    # Values that are no longer than an offset stand in its place.
    if size > form.offset:
        place = _number(entry, start, form.offset, form)
        content = data[place : place + size]
    else:
        content = entry[start : start + size]
    kept = content[: len(content) // step * step]
    return np.frombuffer(kept, f"{'<' if form.order == 'little' else '>'}u{step}").astype(np.uint64)


def _bytes_of(entry: bytes, form: _Form) -> int:
    """Return the bytes of the values that an entry names; an unknown type counts as the widest."""
    return _number(entry, 4, form.offset, form) * _SIZES.get(_number(entry, 2, 2, form), 8)


def _number(data: bytes, place: int, size: int, form: _Form) -> int:
    return int.from_bytes(data[place : place + size], form.order)
