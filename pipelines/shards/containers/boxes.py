"""AVIF and HEIF: boxes within boxes. The decoder gets the primary picture, no sequence and no metadata.

The sizes in the items' own AV1 headers are held against the limits too: a decoder allocates by these headers, not by
the sizes that the file states.
"""

from collections.abc import Callable, Iterator

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import MAX_CHUNKS, MAX_PIXELS, ImageReject, Metadata, Picture, check_size

MAX_ITEMS = 4096
"""Largest number of items in a file."""
MAX_ITEM_PIXELS = 4 * MAX_PIXELS
"""Largest sum of pixels over all items: tiles of the picture, its transparency, a preview, a map of brightness."""

_AVIF, _HEIF = {b"avif", b"avis"}, {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_SEQUENCES = {b"avis", b"hevc", b"hevx", b"msf1"}
"""Brands of files that must have a sequence."""
_UNREAD = (b"Exif", b"mime", b"uri ")
_SEQUENCE_HEADER = 1

_Box = tuple[bytes, int, int]
_Extent = tuple[bool, int, int]


def walk_boxes(data: bytes) -> Picture:
    """Return the file with its sequence and its metadata renamed to types that every decoder skips."""
    metadata = Metadata()
    boxes = _boxes(data, 0, len(data), metadata)
    kind, start, end = next(boxes)
    major = data[start : start + 4]
    # The major brand, then four bytes of version, then the compatible brands.
    places = [start, *range(start + 8, min(end, start + 1024) - 3, 4)]
    brands = {data[at : at + 4] for at in places}
    form = "AVIF" if brands & _AVIF else "HEIF" if brands & _HEIF else None
    if kind != b"ftyp" or form is None:
        raise ImageReject(Reason.NOT_AN_IMAGE, f"a file of boxes of brand {major!r}, which is not decoded")
    found, whole = list(boxes), bytearray(data)
    metas = [box for box in found if box[0] == b"meta"]
    if len(metas) != 1:
        raise ImageReject(Reason.UNDECODABLE, f"a picture is described in one box, not in {len(metas)}")
    _walk_meta(whole, metas[0], metadata)
    animated = False
    for kind, start, _ in found:
        if kind == b"moov":
            animated = True
            whole[start - 4 : start] = b"free"
    for at in places if animated else ():
        if data[at : at + 4] in _SEQUENCES:
            whole[at : at + 4] = b"avif" if form == "AVIF" else b"heic"
    return Picture(form, bytes(whole), 1, animated)


def _boxes(data: bytes | bytearray, start: int, end: int, metadata: Metadata) -> Iterator[_Box]:
    """Yield type, start and end of the content of each box in a range; the type is right before the start."""
    while start < end:
        metadata.count()
        size, kind, head = int.from_bytes(data[start : start + 4], "big"), bytes(data[start + 4 : start + 8]), 8
        # Size 1: the true one follows the type, in 64 bits. Size 0: the box goes on to the end.
        if size == 1:
            if kind != b"mdat":  # nobody writes these, and the type to rename would not be right before the start
                raise ImageReject(Reason.UNDECODABLE, f"a box {kind!r} with a size of 64 bits")
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif size == 0:
            size = end - start
        if size < head or start + 8 > end:
            raise ImageReject(Reason.UNDECODABLE, f"a box of {size} bytes")
        if start + size > end:
            raise ImageReject(Reason.TRUNCATED, f"ends inside a box of {size} bytes")
        yield kind, start + head, start + size
        start += size


def _walk_meta(data: bytearray, meta: _Box, metadata: Metadata) -> None:
    """Hide items of metadata, and hold the sizes stated by the file and by AV1 headers against the limits."""
    kinds: dict[int, bytes] = {}
    places: dict[int, list[_Extent]] = {}
    sizes: dict[int, int] = {}
    own = 0
    # These boxes begin with a version (1 byte) and flags (3 bytes): meta, iinf, infe, iloc, ispe and ipma.
    for kind, start, end in _boxes(data, meta[1] + 4, meta[2], metadata):
        if kind == b"iinf":
            kinds = _item_kinds(data, start, end, metadata)
        elif kind == b"idat":
            own = start
        elif kind == b"iloc":
            places = _item_places(data, start, end)
        elif kind == b"iprp":
            sizes = _item_sizes(data, start, end, metadata)
    pixels = 0
    for item, extents in places.items():
        if kinds.get(item) == b"av01":
            starts = [(at + own if inside else at, size) for inside, at, size in extents]
            content = b"".join(bytes(data[at : at + size]) for at, size in starts)
            pixels += _av1_pixels(content, metadata)
    pixels = max(pixels, sum(sizes.values()))
    if pixels > MAX_ITEM_PIXELS:
        raise ImageReject(Reason.TOO_LARGE, f"items of {pixels} pixels together")


def _item_kinds(data: bytearray, start: int, end: int, metadata: Metadata) -> dict[int, bytes]:
    kinds: dict[int, bytes] = {}
    first = start + (6 if data[start] == 0 else 8)  # behind the number of entries, of 16 or 32 bits by the version
    for kind, begin, stop in _boxes(data, first, end, metadata):
        if kind != b"infe" or data[begin] < 2:
            continue
        wide = 2 if data[begin] == 2 else 4
        at = begin + 4 + wide + 2  # behind the item's number and the index of its protection
        kinds[int.from_bytes(data[begin + 4 : begin + 4 + wide], "big")] = bytes(data[at : at + 4])
        if data[at : at + 4] in _UNREAD and at + 4 <= stop:
            data[at : at + 4] = b"skip"  # as long as before, so every offset in the file stays right
    return kinds


def _item_sizes(data: bytearray, start: int, end: int, metadata: Metadata) -> dict[int, int]:
    """Return the pixels of each item before it is cropped, from its property `ispe`; raise ImageReject if too large."""
    pixels: list[int] = []
    sizes: dict[int, int] = {}
    for kind, begin, stop in _boxes(data, start, end, metadata):
        if kind == b"ipco":
            for own, at, _ in _boxes(data, begin, stop, metadata):
                width, height = (int.from_bytes(data[at + 4 * n : at + 4 * n + 4], "big") for n in (1, 2))
                pixels.append(width * height if own == b"ispe" else 0)
                if own == b"ispe":
                    check_size(width, height)
        elif kind == b"ipma":
            take = _taker(data, begin + 4, stop)
            wide, index_size = 4 if data[begin] else 2, 2 if data[begin + 3] & 1 else 1
            for _ in range(take(4)):
                metadata.count()
                item = take(wide)
                for _ in range(take(1)):
                    # The top bit says that the property is essential. Properties count from 1; 0 is none.
                    index = (take(index_size) & (0x7F if index_size == 1 else 0x7FFF)) - 1
                    sizes[item] = sizes.get(item, 0) + (pixels[index] if 0 <= index < len(pixels) else 0)
    return sizes


def _taker(data: bytearray, start: int, end: int) -> Callable[[int], int]:
    """Return a function that reads the number in the next bytes of a range; beyond its end it raises ImageReject."""
    place = start

    def take(size: int) -> int:
        nonlocal place
        place += size
        if place > end:
            raise ImageReject(Reason.TRUNCATED, "a list of items ends before the last")
        return int.from_bytes(data[place - size : place], "big")

    return take


def _item_places(data: bytearray, start: int, end: int) -> dict[int, list[_Extent]]:
    """Return the pieces of each item: whether the piece lies in the box `idat`, its start, and its size."""
    take = _taker(data, start + 4, end)
    version = data[start]
    widths = take(1), take(1)
    offset_size, length_size, base_size = widths[0] >> 4, widths[0] & 15, widths[1] >> 4
    index_size = widths[1] & 15 if version else 0
    wide = 2 if version < 2 else 4
    places: dict[int, list[_Extent]] = {}
    extents = total = 0
    for _ in range(take(wide)):
        item = take(wide)
        inside = bool(version and take(2) & 15)  # how offsets count: 0 = from the start of the file
        take(2)  # index of a reference to another file
        base = take(base_size)
        found = places.setdefault(item, [])
        for _ in range(take(2)):
            take(index_size)
            at, size = base + take(offset_size), take(length_size) or len(data)  # length 0 = the rest of the file
            found.append((inside, at, size))
            extents, total = extents + 1, total + min(size, len(data))
        # Pieces may lie over each other, so a small file could list a lot of bytes.
        if len(places) > MAX_ITEMS or extents > MAX_CHUNKS or total > 4 * len(data) + (1 << 20):
            raise ImageReject(Reason.TOO_LARGE, f"{len(places)} items in {extents} pieces of {total} bytes")
    return places


# ----------------------------------------------------------------------------------------------------------------- AV1


def _av1_pixels(content: bytes, metadata: Metadata) -> int:
    """Return the pixels of the largest frame in an AV1 item's headers; raise ImageReject if it is too large."""
    place = most = 0
    while place < len(content):
        metadata.count()
        # The head of a unit: 4 bits of type, then the flags "one more byte of head" and "a size follows". The size has
        # 7 bits in each byte, the lowest first; the top bit says that another byte follows.
        head = content[place]
        place += 2 if head & 4 else 1
        size = shift = 0
        if head & 2:
            for _ in range(8):
                byte = content[place] if place < len(content) else 0
                size |= (byte & 0x7F) << shift
                place, shift = place + 1, shift + 7
                if not byte & 0x80:
                    break
        else:
            size = len(content) - place
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            width, height = _av1_size(content[place : place + min(size, 1024)])
            check_size(width, height)
            most = max(most, width * height)
        place += size
    return most


class _Bits:
    """A reader of bits from the front; zeros follow the last."""

    def __init__(self, data: bytes) -> None:
        self._data, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        return (self._data >> self._left if self._left >= 0 else 0) & ((1 << count) - 1)


def _av1_size(header: bytes) -> tuple[int, int]:
    """Read the largest width and height of frames from a sequence header (AV1 specification, 5.5)."""
    bits = _Bits(header)
    bits.take(3 + 1)  # seq_profile, still_picture
    if bits.take(1):  # reduced_still_picture_header
        bits.take(5)  # seq_level_idx
    else:
        _pass_operating_points(bits)
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    return bits.take(wide) + 1, bits.take(high) + 1


def _pass_operating_points(bits: _Bits) -> None:
    delay = 0
    model = False
    if bits.take(1):  # timing_info_present_flag
        bits.take(32 + 32)  # num_units_in_display_tick, time_scale
        if bits.take(1):  # equal_picture_interval; a number in Exp-Golomb code follows
            zeros = 0
            while zeros < 32 and not bits.take(1):
                zeros += 1
            bits.take(zeros)
        model = bool(bits.take(1))  # decoder_model_info_present_flag
        if model:
            delay = bits.take(5) + 1  # buffer_delay_length_minus_1
            bits.take(32 + 5 + 5)  # num_units_in_decoding_tick, lengths of two other times
    display = bool(bits.take(1))  # initial_display_delay_present_flag
    for _ in range(bits.take(5) + 1):  # operating_points_cnt_minus_1
        bits.take(12)  # operating_point_idc
        if bits.take(5) > 7:  # seq_level_idx
            bits.take(1)  # seq_tier
        if model and bits.take(1):
            bits.take(delay + delay + 1)  # decoder_buffer_delay, encoder_buffer_delay, low_delay_mode_flag
        if display and bits.take(1):
            bits.take(4)  # initial_display_delay_minus_1
