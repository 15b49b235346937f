"""JPEG, PNG, WebP, BMP, GIF and PPM: their segments, chunks, blocks and headers."""

import re
import struct
import zlib

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.limits import (
    MAX_GIF_BLOCKS,
    MAX_RUN_LENGTH,
    MAX_SCANNED_PIXELS,
    MAX_SCANS,
    ImageReject,
    Metadata,
    Picture,
    check_size,
)

# A marker is FF and a byte that is neither stuffing (00), filling (FF) nor a restart inside a scan (D0 to D7).
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_BARE = {0x01, 0xD8}  # markers without a segment: TEM, and a second start of image
_SOS, _EOI, _EXIF = 0xDA, 0xD9, b"Exif\0\0"
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_HUFFMAN = {0xC0, 0xC1, 0xC2}
# Not C4 (Huffman tables), C8 (reserved) and CC (arithmetic coding), which lie among the frames.
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Application data and comments; JFIF (E0) and Adobe (EE) decide how components become colours.
_APPLICATION = {*range(0xE1, 0xEE), 0xEF, 0xFE}
_COLOURS = {0xE0, 0xEE}
_LEAST_COLOURS = 9
"""Length of a JFIF or Adobe segment that Pillow reads; it refuses a file with a shorter one, which libjpeg ignores."""


def walk_jpeg(data: bytes) -> Picture:
    """Keep the segments that make pixels."""
    metadata, kept = Metadata(), [data[:2]]
    components, one_scan, pixels, plain = 0, False, 0, True
    place, scans, first_scan = 2, 0, 0
    while (found := _MARKER.search(data, place)) is not None:
        start, place = found.start(), found.end()
        marker = data[place - 1]
        metadata.count()
        if marker == _EOI:
            break
        if marker in _BARE:
            continue
        length = int.from_bytes(data[place : place + 2], "big")
        if length < 2:
            raise ImageReject(Reason.UNDECODABLE, f"a JPEG segment of {length} bytes")
        if place + length > len(data):
            raise ImageReject(Reason.TRUNCATED, "the JPEG ends inside a segment")
        if marker == _SOS:
            scans, first_scan = scans + 1, first_scan or start
            # A sequential scan of all components is the whole picture.
            if one_scan and data[place + 2] == components:
                break
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise ImageReject(Reason.TOO_LARGE, f"{scans} or more scans of {pixels} pixels")
        elif marker in _FRAMES:
            # Behind the length (2 bytes): precision (1), height (2), width (2) and number of components (1).
            components, one_scan = data[place + 7] if length > 7 else 0, marker in _SEQUENTIAL
            plain = plain and marker in _HUFFMAN and data[place + 2] == 8 and components in (1, 3)
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 3, place + 5))
            pixels = max(pixels, width * height)
        elif marker in _COLOURS:
            plain = plain and length >= _LEAST_COLOURS
        if marker in _APPLICATION:
            content = data[place + 2 : place + length]
            is_exif = marker == 0xE1 and content.startswith(_EXIF)
            metadata.leave_out(length, content[len(_EXIF) :] if is_exif else None)
        elif not first_scan:
            kept.append(data[start : place + length])
        place += length
    if not first_scan:
        raise ImageReject(Reason.TRUNCATED, "the JPEG ends before its first scan")
    return metadata.picture("JPEG", b"".join([*kept, data[first_scan:]]), plain=plain)


_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")


def walk_png(data: bytes) -> Picture:
    """Keep the chunks that make pixels.

    Missing chunks at the end are left to the decoder to report.
    """
    metadata, kept = Metadata(), [data[:8]]
    place, animated, begun = 8, False, False
    while True:
        metadata.count()
        kind, length = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length  # length, type and CRC have 4 bytes each
        cut = end > len(data) or not kind
        if cut and not (begun or kind == b"IDAT"):
            raise ImageReject(Reason.TRUNCATED, "the PNG ends before its pixels")
        if kind == b"IDAT" and cut:
            kept.append(_png_chunk(kind, data[place + 8 : place + 8 + length]))
        if kind == b"IEND" or cut:
            return metadata.picture("PNG", b"".join([*kept, _png_chunk(b"IEND", b"")]), animated)
        if kind in _PNG_PIXELS:
            kept.append(data[place:end])
            begun = begun or kind == b"IDAT"
        elif kind in (b"acTL", b"fcTL", b"fdAT"):
            animated = animated or (kind == b"acTL" and int.from_bytes(data[place + 8 : place + 12], "big") > 1)
        else:
            content = data[place + 8 : end - 4]
            metadata.leave_out(length, content.removeprefix(_EXIF) if kind == b"eXIf" else None)
        place = end


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Types of metadata chunks, each with its flag in the header of an extended file."""


def walk_webp(data: bytes) -> Picture:
    """Keep the picture, or the canvas with the first frame of an animation."""
    metadata = Metadata()
    place, end, frames = 12, 8 + int.from_bytes(data[4:8], "little"), 0
    kept = []
    if end > len(data):
        raise ImageReject(Reason.TRUNCATED, f"{len(data)} of {end} bytes")
    while place + 8 <= end:
        metadata.count()
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        begin, start, place = place, place + 8, place + 8 + length + length % 2  # chunks begin at even bytes
        frames += kind in (b"ANMF", b"VP8 ", b"VP8L")
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            check_size(*_webp_size(kind, data[start : start + 10]))
        if kind in _WEBP_METADATA:
            content = data[start : start + length]
            metadata.leave_out(length, content.removeprefix(_EXIF) if kind == b"EXIF" else None)
        elif kind == b"VP8X":
            flags = data[start] & ~sum(_WEBP_METADATA.values()) if length else 0
            kept.append(data[begin:start] + bytes([flags]) + data[start + 1 : place])
        elif frames <= 1:
            kept.append(data[begin:place])
    body = b"".join(kept)
    whole = b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body
    return metadata.picture("WEBP", whole, frames > 1)


def _webp_size(kind: bytes, header: bytes) -> tuple[int, int]:
    """Return the size that a WebP chunk declares; libwebp allocates two such canvases before Pillow can look."""
    # VP8X: 4 bytes of flags, then 24 bits for each side, less one. VP8L: a signature of one byte, then 14 bits each,
    # less one. VP8: a tag and a start code of 3 bytes each, then 14 bits each, with 2 bits of scale above them.
    if kind == b"VP8X":
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L":
        sizes = int.from_bytes(header[1:5], "little")
        return 1 + (sizes & 0x3FFF), 1 + (sizes >> 14 & 0x3FFF)
    return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF


def walk_bmp(data: bytes) -> Picture:
    """Keep the file unchanged; raise ImageReject for a large run-length coded one."""
    header, compression = int.from_bytes(data[14:18], "little"), int.from_bytes(data[30:34], "little")
    # Headers from 40 bytes on name a compression; 1 and 2 are run lengths. A negative height means rows from the top.
    if header >= 40 and compression in (1, 2):
        width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
        if max(len(data), width * height) > MAX_RUN_LENGTH:
            raise ImageReject(Reason.TOO_LARGE, f"a run-length coded BMP of more than {MAX_RUN_LENGTH} pixels or bytes")
    return Picture("BMP", data)


# ----------------------------------------------------------------------------------------------------------------- GIF

_GIF_TRAILER, _GIF_EXTENSION, _GIF_IMAGE, _GIF_CONTROL = 0x3B, 0x21, 0x2C, 0xF9


def walk_gif(data: bytes) -> Picture:
    """Keep the screen, its colours, and the first image with the control block right before it."""
    if len(data) < 13:
        raise ImageReject(Reason.TRUNCATED, "the GIF ends inside its header")
    width, height, flags = struct.unpack_from("<HHB", data, 6)  # behind the signature
    place = 13 + _gif_colours(flags)
    metadata, kept, control = Metadata(), [data[:place]], b""
    first = False
    while place < len(data) and data[place] != _GIF_TRAILER:
        metadata.count()
        begin = place
        if data[place] == _GIF_EXTENSION:
            place = _gif_blocks(data, place + 2)
            if data[begin + 1 : begin + 2] == bytes([_GIF_CONTROL]):
                control = data[begin:place]
            metadata.leave_out(place - begin)
        elif data[place] != _GIF_IMAGE:
            break
        elif first:
            return metadata.picture("GIF", b"".join(kept) + bytes([_GIF_TRAILER]), animated=True)
        else:
            if place + 10 > len(data):
                raise ImageReject(Reason.TRUNCATED, "the GIF ends inside an image header")
            left, top, columns, rows, own = struct.unpack_from("<HHHHB", data, place + 1)
            # Pillow makes the screen larger for an image that lies beyond it.
            check_size(max(width, left + columns), max(height, top + rows))
            # 10 bytes of image header, the image's own colours, and 1 byte with the width of the first codes.
            place = _gif_blocks(data, place + 10 + _gif_colours(own) + 1)
            kept += [control, data[begin:place]]
            first = True
    if not first:
        raise ImageReject(Reason.TRUNCATED, "the GIF ends before its first image")
    return metadata.picture("GIF", b"".join(kept) + bytes([_GIF_TRAILER]))


def _gif_colours(flags: int) -> int:
    """Return the bytes of the colour table that the flags of a screen or an image announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_blocks(data: bytes, place: int) -> int:
    """Return the end of a series of blocks that begins at `place`: behind the empty block, or the end of the file."""
    for _ in range(MAX_GIF_BLOCKS):
        if place >= len(data):
            return len(data)
        size = data[place]
        place += 1 + size
        if not size:
            return place
    raise ImageReject(Reason.TOO_LARGE, f"a GIF image of more than {MAX_GIF_BLOCKS} blocks")


# ----------------------------------------------------------------------------------------------------------------- PPM

_GAP = rb"(?:[ \t\n\v\f\r]|#[^\n\r]*[\n\r])"
_BITMAP = re.compile(rb"P([14])" + _GAP + rb"+(\d{1,9})" + _GAP + rb"+(\d{1,9})[ \t\n\v\f\r]")
_MAP = re.compile(rb"P([2356])" + (_GAP + rb"+(\d{1,9})") * 3 + rb"[ \t\n\v\f\r]")
_PPM_HEADER = 4096
"""Bytes within which a header must end, comments included."""


def walk_ppm(data: bytes) -> Picture:
    """Return the pixels with a newly written header."""
    found = (_BITMAP if data[1:2] in b"14" else _MAP).match(data[:_PPM_HEADER])
    if found is None:
        raise ImageReject(Reason.NOT_AN_IMAGE, "begins like a PPM, but has no header of one")
    kind, width, height, *most = (int(number) for number in found.groups())
    check_size(width, height)
    pixels = data[found.end() :]
    if kind in (5, 6) and most == [65535]:
        pixels, most = pixels[::2], [255]  # the upper 8 of 16 bits: Pillow decodes 16 bits slowly
    if (kind < 4 or most not in ([], [255])) and max(len(data), width * height) > MAX_RUN_LENGTH:
        raise ImageReject(
            Reason.TOO_LARGE, f"a PPM of text, or not of 8 bits, with more than {MAX_RUN_LENGTH} pixels or bytes"
        )
    header = " ".join([f"P{kind}", *map(str, (width, height, *most))])
    return Picture("PPM", header.encode() + b"\n" + pixels)
