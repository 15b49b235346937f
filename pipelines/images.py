"""From untrusted bytes to pixels: a guarded decoder that either returns RGB or says why not, and a pool to run it.

Pillow sees only what makes pixels. The container is walked here first: its size, frames, scans and metadata are held
against limits, the orientation is read from its one EXIF entry, and comments, profiles and thumbnails are left out,
since parsing them costs an attacker little and a reader much (one 64 KiB EXIF block can name 300 MiB of values).
"""

import io
import queue
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from pipelines.schema import Reason

T = TypeVar("T")
R = TypeVar("R")

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
MAX_METADATA_BYTES = 16 << 20
"""Of everything in a file that makes no pixels; depth maps and profiles of cameras take some MiB."""
MAX_CHUNKS = 65_536
"""Segments of a JPEG, chunks of a PNG or WebP."""
MAX_SCANS = 100
"""Of a JPEG; each costs a pass over all pixels, however few bytes it has. Encoders write about ten."""
MAX_SCANNED_PIXELS = 1 << 30
"""Scans times pixels of a JPEG: about sixteen scans of the largest picture."""
MAX_RUN_LENGTH = 4 << 20
"""Bytes, and pixels, of a run-length coded BMP, which Pillow decodes pixel by pixel in Python."""
STRIP_PIXELS = 4 << 20
"""What is converted to RGB at a time."""

# Pillow only warns between one and two times its own ceiling; here the first is already an error.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)

_TURNS = {
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}
"""How a picture of each EXIF orientation comes upright: whether its axes swap, then the step along rows and columns."""


class ImageReject(Exception):
    """The bytes do not become pixels, for `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode image bytes to RGB, uint8 (H, W, 3), upright by EXIF.

    CMYK and palette images are converted, 16-bit grey is scaled to 8 bits, transparency lies on white.
    Raises ImageReject and nothing else.
    """
    if len(data) > MAX_BYTES:
        raise ImageReject(Reason.TOO_LARGE, f"{len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        picture = _walk(data)
        with Image.open(io.BytesIO(picture.data), formats=(picture.format,)) as image:
            _check_size(*image.size)
            image.load()
            pixels = _to_pixels(image)
        return _upright(pixels, picture.orientation)
    except ImageReject:
        raise
    except UnidentifiedImageError:
        raise ImageReject(Reason.UNDECODABLE, f"not a {picture.format} beyond its first bytes") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageReject(Reason.TOO_LARGE, str(error)) from None
    except OSError as error:
        truncated = "truncated" in str(error) or "broken data stream" in str(error)
        raise ImageReject(Reason.TRUNCATED if truncated else Reason.UNDECODABLE, str(error)) from None
    except Exception as error:  # Pillow's plugins let many types through on bad bytes; none may end a run
        raise ImageReject(Reason.UNDECODABLE, f"{type(error).__name__}: {error}") from None


def _to_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """RGB of a loaded picture, converted strip by strip: all at once, a large one would be held four times over."""
    width, height = image.size
    rows = max(1, STRIP_PIXELS // width)
    if rows >= height:
        return np.asarray(_to_rgb(image), dtype=np.uint8)
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(_to_rgb(strip), dtype=np.uint8)
    return pixels


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    if orientation not in _TURNS:
        return pixels
    swapped, row_step, column_step = _TURNS[orientation]
    turned = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(turned[::row_step, ::column_step])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layered).convert("RGB")
    if image.mode not in ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"):
        raise ImageReject(Reason.UNDECODABLE, f"no conversion from {image.mode} to RGB is defined")
    return image.convert("RGB")


def _check_size(width: int, height: int) -> None:
    """Refuse by what a header declares, before any pixel is decoded."""
    if width * height > MAX_PIXELS:
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} is more elongated than {MAX_ASPECT}:1")


# ---------------------------------------------------------------------------------------------------- containers


@dataclass(frozen=True, slots=True)
class _Picture:
    """What a decoder gets to see: the format, the bytes that make pixels, and the EXIF orientation beside them."""

    format: str
    data: bytes
    orientation: int = 1


def _walk(data: bytes) -> _Picture:
    """The picture in a file of an allowed format, within the limits of its container. Raises ImageReject."""
    if data.startswith(b"\xff\xd8\xff"):
        return _walk_jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _walk_png(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _walk_webp(data)
    if data.startswith(b"BM"):
        return _walk_bmp(data)
    raise ImageReject(Reason.NOT_AN_IMAGE, f"none of {', '.join(FORMATS)}")


class _Metadata:
    """The chunks of one file: how many there are, how much of it makes no pixels, and which way is up."""

    def __init__(self) -> None:
        self.chunks = self.bytes = 0
        self.orientation: int | None = None

    def count(self) -> None:
        self.chunks += 1
        if self.chunks > MAX_CHUNKS:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_CHUNKS} chunks")

    def leave_out(self, size: int, exif: bytes | None = None) -> None:
        self.bytes += size
        if self.bytes > MAX_METADATA_BYTES:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_METADATA_BYTES} bytes of metadata")
        if exif is not None and self.orientation is None:
            self.orientation = _orientation(exif)

    def picture(self, form: str, data: bytes) -> _Picture:
        return _Picture(form, data, self.orientation or 1)


# A marker is FF and a byte that is neither stuffing (00), filling (FF) nor a restart inside a scan (D0 to D7).
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_BARE = {0x01, 0xD8}
_SOS, _EOI, _EXIF = 0xDA, 0xD9, b"Exif\0\0"
_SEQUENTIAL = {0xC0, 0xC1, 0xC9}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Application data and comments; JFIF (E0) and Adobe (EE) decide how components become colours.
_APPLICATION = {*range(0xE1, 0xEE), 0xEF, 0xFE}


def _walk_jpeg(data: bytes) -> _Picture:
    metadata, kept = _Metadata(), [data[:2]]
    components, one_scan, pixels = 0, False, 0
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
            if one_scan and data[place + 2] == components:
                break
            if scans > MAX_SCANS or scans * pixels > MAX_SCANNED_PIXELS:
                raise ImageReject(Reason.TOO_LARGE, f"{scans} or more scans of {pixels} pixels")
        elif marker in _FRAMES:
            components, one_scan = data[place + 7] if length > 7 else 0, marker in _SEQUENTIAL
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (place + 3, place + 5))
            pixels = max(pixels, width * height)
        if marker in _APPLICATION:
            content = data[place + 2 : place + length]
            is_exif = marker == 0xE1 and content.startswith(_EXIF)
            metadata.leave_out(length, content[len(_EXIF) :] if is_exif else None)
        elif not first_scan:
            kept.append(data[start : place + length])
        place += length
    if not first_scan:
        raise ImageReject(Reason.TRUNCATED, "the JPEG ends before its first scan")
    return metadata.picture("JPEG", b"".join([*kept, data[first_scan:]]))


def _walk_png(data: bytes) -> _Picture:
    metadata, kept = _Metadata(), [data[:8]]
    place = 8
    while True:
        metadata.count()
        kind, length = data[place + 4 : place + 8], int.from_bytes(data[place : place + 4], "big")
        end = place + 12 + length
        if end > len(data) or not kind:
            raise ImageReject(Reason.TRUNCATED, "the PNG ends before its last chunk")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(data[place:end])
        else:
            content = data[place + 8 : end - 4]
            if kind == b"acTL" and int.from_bytes(content[:4], "big") > 1:
                raise ImageReject(Reason.TOO_LARGE, "more than one frame")
            metadata.leave_out(length, content.removeprefix(_EXIF) if kind == b"eXIf" else None)
        if kind == b"IEND":
            return metadata.picture("PNG", b"".join(kept))
        place = end


def _walk_webp(data: bytes) -> _Picture:
    metadata = _Metadata()
    place, end, frames = 12, 8 + int.from_bytes(data[4:8], "little"), 0
    if end > len(data):
        raise ImageReject(Reason.TRUNCATED, f"{len(data)} of {end} bytes")
    while place + 8 <= end:
        metadata.count()
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        start, place = place + 8, place + 8 + length + length % 2
        frames += kind in (b"ANMF", b"VP8 ", b"VP8L")
        if frames > 1:
            raise ImageReject(Reason.TOO_LARGE, "more than one frame")
        if kind in (b"VP8X", b"VP8 ", b"VP8L"):
            _check_size(*_webp_size(kind, data[start : start + 10]))
        elif kind in (b"ICCP", b"EXIF", b"XMP "):
            content = data[start : start + length]
            metadata.leave_out(length, content.removeprefix(_EXIF) if kind == b"EXIF" else None)
    return metadata.picture("WEBP", data)


def _webp_size(kind: bytes, header: bytes) -> tuple[int, int]:
    """What a WebP chunk declares; libwebp allocates two canvases of it before Pillow can look."""
    if kind == b"VP8X":
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L":
        sizes = int.from_bytes(header[1:5], "little")
        return 1 + (sizes & 0x3FFF), 1 + (sizes >> 14 & 0x3FFF)
    return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF


def _walk_bmp(data: bytes) -> _Picture:
    header, compression = int.from_bytes(data[14:18], "little"), int.from_bytes(data[30:34], "little")
    if header >= 40 and compression in (1, 2):
        width, height = (abs(int.from_bytes(data[at : at + 4], "little", signed=True)) for at in (18, 22))
        if max(len(data), width * height) > MAX_RUN_LENGTH:
            raise ImageReject(Reason.TOO_LARGE, f"a run-length coded BMP of more than {MAX_RUN_LENGTH} pixels or bytes")
    return _Picture("BMP", data)


def _orientation(exif: bytes) -> int | None:
    """The orientation that the first directory of an EXIF block (from its TIFF header on) states, or None."""
    order: Literal["little", "big"]
    if exif.startswith(b"II*\0"):
        order = "little"
    elif exif.startswith(b"MM\0*"):
        order = "big"
    else:
        return None

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    directory = number(4, 4)
    last = min(directory + 2 + 12 * number(directory, 2), len(exif) - 11)
    for entry in range(directory + 2, last, 12):
        if number(entry, 2) == 0x0112:
            return number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
    return None


# ---------------------------------------------------------------------------------------------------- in parallel


def decode_ahead(items: Iterable[T], work: Callable[[T], R], threads: int, limit: int) -> Iterator[R]:
    """`work(item)` for each item, in order, computed by `threads` threads at most `limit` items ahead.

    The items are drawn in a thread of their own, so reading, decoding and what the caller does with the results
    run side by side. An exception of `items` or `work` is raised at its place in the order.
    """
    results: queue.Queue[Future[R] | BaseException | None] = queue.Queue(maxsize=limit)
    stopped = threading.Event()

    def put(entry: Future[R] | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                results.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        try:
            for item in items:
                put(pool.submit(work, item))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        producer = threading.Thread(target=produce, name="read", daemon=True)
        producer.start()
        try:
            while (entry := results.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry.result()
        finally:
            stopped.set()
            producer.join()
