"""The containers of image files, walked by hand to find the bytes of the picture, within limits, and its orientation.

No decoder has seen a byte yet. Size, frames, scans and metadata are held against limits, and the orientation is read
from its one entry. Comments, profiles, thumbnails and all frames but the first are left out: they cost an attacker
little and a parser much (one 64 KiB EXIF block can name 300 MiB of values).
"""

from pipelines.artifacts.tables import Reason
from pipelines.shards.containers.boxes import walk_boxes
from pipelines.shards.containers.limits import ImageReject, Picture
from pipelines.shards.containers.tiff import walk_tiff
from pipelines.shards.containers.usual import walk_bmp, walk_gif, walk_jpeg, walk_png, walk_ppm, walk_webp

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")
"""Formats that are decoded, by Pillow's names; HEIF comes with an extra."""
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".ppm", ".pgm", ".pbm", ".pnm"),
)
"""Suffixes of files that are taken for images."""

_WALKS = {
    b"\xff\xd8\xff": walk_jpeg,
    b"\x89PNG\r\n\x1a\n": walk_png,
    b"BM": walk_bmp,
    b"GIF87a": walk_gif,
    b"GIF89a": walk_gif,
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), walk_tiff),
    **{b"P%d" % kind: walk_ppm for kind in range(1, 7)},
}


def walk(data: bytes) -> Picture:
    """Return the picture in a file of an allowed format, whatever its name; raise ImageReject beyond the limits."""
    for start, walked in _WALKS.items():
        if data.startswith(start):
            return walked(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return walk_webp(data)
    if data[4:8] == b"ftyp":
        return walk_boxes(data)
    raise ImageReject(Reason.NOT_AN_IMAGE, f"none of {', '.join(FORMATS)}")
