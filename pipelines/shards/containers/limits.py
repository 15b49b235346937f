"""What every walk of a container shares: the limits, the reject, what a decoder gets to see, and the way up."""

from dataclasses import dataclass
from typing import Literal

from pipelines.artifacts.tables import Reason

MAX_PIXELS = 64_000_000
MAX_ASPECT = 200
MAX_METADATA_BYTES = 16 << 20
"""Of everything in a file that makes no pixels; depth maps and profiles of cameras take some MiB."""
MAX_CHUNKS = 65_536
"""Segments of a JPEG, chunks of a PNG or WebP, blocks of a GIF, boxes and items of an AVIF."""
MAX_SCANS = 100
"""Of a JPEG; each costs a pass over all pixels, however few bytes it has. Encoders write about ten."""
MAX_SCANNED_PIXELS = 1 << 30
"""Scans times pixels of a JPEG: about sixteen scans of the largest picture."""
MAX_GIF_BLOCKS = 1 << 20
"""Of 255 bytes each as encoders write them, in one image or extension of a GIF."""
MAX_RUN_LENGTH = 4 << 20
"""Bytes, and pixels, of a run-length coded BMP and of a PPM that is text or not of 8 bits: Pillow decodes them pixel by
pixel in Python."""


class ImageReject(Exception):
    """The bytes do not become pixels, for `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


def check_size(width: int, height: int) -> None:
    """Refuse by what a header declares, before any pixel is decoded."""
    if width * height > MAX_PIXELS:
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} is more elongated than {MAX_ASPECT}:1")


@dataclass(frozen=True, slots=True)
class Picture:
    """What a decoder gets to see: the format, the bytes that make pixels, and the orientation beside them.

    `animated`: there are further frames, which are left out.
    """

    format: str
    data: bytes
    orientation: int = 1
    animated: bool = False


class Metadata:
    """The chunks of one file: how many there are, how much of it makes no pixels, and which way is up."""

    def __init__(self) -> None:
        self.chunks = self.bytes = 0
        self.orientation: int | None = None

    def count(self) -> None:
        """Pass one chunk; ImageReject where there are too many."""
        self.chunks += 1
        if self.chunks > MAX_CHUNKS:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_CHUNKS} chunks")

    def leave_out(self, size: int, exif: bytes | None = None) -> None:
        """Pass over what makes no pixels, and read the orientation of `exif`; ImageReject where it is too much."""
        self.bytes += size
        if self.bytes > MAX_METADATA_BYTES:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_METADATA_BYTES} bytes of metadata")
        if exif is not None and self.orientation is None:
            self.orientation = orientation_of(exif)

    def picture(self, form: str, data: bytes, animated: bool = False) -> Picture:
        """The picture of `data`, turned as the metadata say."""
        return Picture(form, data, self.orientation or 1, animated)


def orientation_of(exif: bytes) -> int | None:
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
