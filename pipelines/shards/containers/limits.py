"""The parts that every walk of a container shares: limits, the reject, the resulting picture, and its orientation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelines.artifacts.tables import Reason

MAX_PIXELS = 64_000_000
"""Largest picture that is decoded, in pixels."""
MAX_ASPECT = 200
"""Largest ratio of the longer side to the shorter one."""
MAX_METADATA_BYTES = 16 << 20
"""Largest sum of bytes in a file that make no pixels; depth maps and profiles of cameras take some MiB."""
MAX_CHUNKS = 65_536
"""Largest number of segments of a JPEG, chunks of a PNG or WebP, blocks of a GIF, boxes and items of an AVIF."""
MAX_SCANS = 100
"""Largest number of scans of a JPEG. Each costs a pass over all pixels, however short; encoders write about ten."""
MAX_SCANNED_PIXELS = 1 << 30
"""Largest product of scans and pixels of a JPEG: about sixteen scans of the largest picture."""
MAX_GIF_BLOCKS = 1 << 20
"""Largest number of blocks in one image or extension of a GIF; encoders write blocks of 255 bytes."""
MAX_RUN_LENGTH = 4 << 20
"""Largest run-length coded BMP, and PPM of text or of other than 8 bits, in bytes and in pixels. Pillow decodes these
pixel by pixel in Python."""

_BYTE_ORDERS: Mapping[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}


class ImageReject(Exception):
    """The bytes cannot become pixels, for `reason`."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())[:200]


def check_size(width: int, height: int) -> None:
    """Raise ImageReject for a size in a header that is beyond the limits, before any pixel is decoded."""
    if width * height > MAX_PIXELS:
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} pixels, the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageReject(Reason.TOO_LARGE, f"{width} x {height} is more elongated than {MAX_ASPECT}:1")


@dataclass(frozen=True, slots=True)
class Picture:
    """The input of a decoder: the format, the bytes that make pixels, and the orientation beside them.

    `animated`: there are further frames, which are left out. `plain`: a JPEG of the usual kind, with 8 bits a sample,
    Huffman codes and one or three components.
    """

    format: str
    data: bytes
    orientation: int = 1
    animated: bool = False
    plain: bool = False


class Metadata:
    """Counts over the chunks of one file, held against the limits, and the orientation found among them."""

    def __init__(self) -> None:
        self.chunks = self.bytes = 0
        self.orientation: int | None = None

    def count(self) -> None:
        """Count one chunk; raise ImageReject if there are too many."""
        self.chunks += 1
        if self.chunks > MAX_CHUNKS:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_CHUNKS} chunks")

    def leave_out(self, size: int, exif: bytes | None = None) -> None:
        """Count `size` bytes that make no pixels, and read the orientation of `exif`; ImageReject above the limit."""
        self.bytes += size
        if self.bytes > MAX_METADATA_BYTES:
            raise ImageReject(Reason.TOO_LARGE, f"more than {MAX_METADATA_BYTES} bytes of metadata")
        if exif is not None and self.orientation is None:
            self.orientation = orientation_of(exif)

    def picture(self, form: str, data: bytes, animated: bool = False, plain: bool = False) -> Picture:
        """Make the picture of `data`, with the orientation found in the metadata."""
        return Picture(form, data, self.orientation or 1, animated, plain)


def orientation_of(exif: bytes) -> int | None:
    """Return the orientation stated by the first directory of an EXIF block (from its TIFF header on), or None."""
    if (order := _BYTE_ORDERS.get(exif[:4])) is None:
        return None

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    # An entry has 12 bytes: tag (2), type (2), number of values (4), and the value (4) if it fits.
    directory = number(4, 4)
    last = min(directory + 2 + 12 * number(directory, 2), len(exif) - 11)
    for entry in range(directory + 2, last, 12):
        if number(entry, 2) == 0x0112:
            # Type 4 is a number of 4 bytes; the standard wants 2, which begin the field in both byte orders.
            return number(entry + 8, 4 if number(entry + 2, 2) == 4 else 2)
    return None
