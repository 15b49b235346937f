"""Pictures as an enemy or a bad disk would leave them, drawn from a seed, and pictures of formats that are not decoded.

mutated_image(seed, number)   bytes of a picture in a format that is decoded, damaged
foreign_images()              name -> bytes in every other format that Pillow writes, and in some that it does not know
outcome_of(seed, number)      what becomes of a damaged picture
both_outcomes(seed, number)   what becomes of a damaged usual JPEG, and whether Pillow alone makes the same of it
"""

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from unittest.mock import patch

import numpy as np
from PIL import Image, features

from pipelines.shards import images
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from tests.support import pictures

INTERESTING = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\xff\xd8",
    b"\xff\xda",
]


@lru_cache
def sources() -> list[bytes]:
    """Whole pictures of each allowed format, in the variants their decoders have."""
    image = Image.fromarray(pictures.picture(0, 0, 48))
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = [
        *(
            saved(image, "JPEG", **options)
            for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 30})
        ),
        *(saved(image, "JPEG", exif=exif), saved(image.convert("L"), "JPEG"), saved(image.convert("CMYK"), "JPEG")),
        *(saved(image, "PNG"), saved(image.convert("L"), "PNG"), saved(image.quantize(16), "PNG", transparency=0)),
        *(saved(image.convert("1"), "PNG"), saved(image.convert("RGBA"), "PNG", exif=exif), pictures.deep_png(48)),
        *(saved(image, "WEBP"), saved(image, "WEBP", lossless=True), saved(image.convert("RGBA"), "WEBP", exif=exif)),
        *(saved(image, "BMP"), saved(image.convert("L"), "BMP"), saved(image.convert("1"), "BMP"), rle_bmp()),
        *(
            pictures.animated_png(),
            pictures.animated_webp(),
            saved(image, "WEBP", save_all=True, append_images=[image.rotate(9)]),
        ),
        saved(image, "MPO", save_all=True, append_images=[image.rotate(9)]),
    ]
    drawn += [
        *(saved(image.quantize(16), "GIF", transparency=3), saved(image.convert("L"), "GIF"), pictures.animated_gif()),
        *(saved(image.convert(mode), "TIFF") for mode in ("RGB", "1", "P", "RGBA", "CMYK")),
        *(saved(image, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
        *(saved(image.convert("1"), "TIFF", compression=how) for how in ("group3", "group4")),
        *(pictures.big_tiff(), pictures.pages_tiff(), saved(image, "TIFF", exif=exif)),
        *(saved(image, "AVIF", speed=9), saved(image.convert("RGBA"), "AVIF", speed=9, exif=exif)),
        pictures.sequence_avif(),
        *map(pictures.heic, ("turned", "veiled", "tiled")),
        *(saved(image.convert(mode), "PPM") for mode in ("RGB", "L", "1")),
        *(b"P3 4 4 255 " + b"9 99 255 " * 16, saved(Image.fromarray(np.full((48, 48), 999, np.uint16)), "PPM")),
    ]
    for data in drawn:
        decode_image(data)
    return drawn


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def rle_bmp(width: int = 48, height: int = 48) -> bytes:
    """A run-length coded BMP: each row is one run."""
    rows = (bytes([min(width, 255), 7]) + b"\0\0") * height + b"\0\1"
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


@lru_cache
def plain_sources() -> list[bytes]:
    """Usual JPEGs of every kind, of a whole and of an odd number of blocks."""
    shown = (pictures.picture(0, 0, 48), pictures.picture(1, 0, 48)[:37, :29])
    return [pictures.jpeg_of_kind(kind, pixels) for kind in pictures.JPEG_KINDS for pixels in shown]


def mutated_image(seed: int, number: int, among: Callable[[], list[bytes]] = sources) -> bytes:
    draw = random.Random(f"{seed} image {number}")
    data = bytearray(draw.choice(among()))
    for _ in range(draw.randint(1, 5)):
        place = draw.randrange(len(data)) if draw.random() < 0.6 else draw.randrange(min(len(data), 200))
        action = draw.random()
        if action < 0.5:
            data[place] ^= 1 << draw.randrange(8)
        elif action < 0.8:
            value = draw.choice(INTERESTING)
            data[place : place + len(value)] = value
        elif action < 0.86:
            del data[place : place + draw.randint(1, 40)]
        elif action < 0.92:
            data[place:place] = draw.randbytes(draw.randint(1, 40))
        elif action < 0.96:
            other = draw.choice(among())
            data[place : place + 100] = other[place : place + 100]
        else:
            del data[max(place, 16) :]
        if not data:
            break
    if draw.random() < 0.7:
        mend_checksums(data)
    return bytes(data)


def mend_checksums(data: bytearray) -> None:
    """Let a damaged PNG reach the decoder behind its checksums."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            return
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4


def outcome_of(seed: int, number: int) -> str:
    """`decoded`, or the reason of the reject; anything else that decoding raises is let through."""
    try:
        pixels = decode_image(mutated_image(seed, number))
    except ImageReject as reject:
        assert "\n" not in reject.detail and len(reject.detail) <= 200
        return reject.reason.value
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    return "decoded"


def both_outcomes(seed: int, number: int) -> str:
    """Decode a damaged usual JPEG with and without libjpeg-turbo's own interface; `decoded` or the reason if equal."""
    data = mutated_image(seed, number, plain_sources)
    found = _become(data)
    with patch.object(images, "_decode_plain", lambda *_: None):
        expected = _become(data)
    if type(found) is not type(expected) or not np.array_equal(found, expected):
        return "differs"
    return "decoded" if isinstance(found, np.ndarray) else found[0]


def _become(data: bytes) -> np.ndarray | tuple[str, str]:
    try:
        return decode_image(data)
    except ImageReject as reject:
        return reject.reason.value, reject.detail


@lru_cache
def foreign_images() -> dict[str, bytes]:
    """Whole pictures in formats off the list. All of them would be decoded by a reader without a list."""
    image = Image.fromarray(pictures.picture(0, 0, 48))
    found = {
        form: saved(image.convert(mode), form)
        for form, mode in [
            *(("ICO", "RGBA"), ("TGA", "RGB"), ("PCX", "RGB")),
            *(
                ("SGI", "RGB"),
                ("DDS", "RGB"),
                ("MSP", "1"),
                ("XBM", "1"),
                ("EPS", "RGB"),
                ("PDF", "RGB"),
            ),
            *(("ICNS", "RGBA"), ("DIB", "RGB"), ("SPIDER", "F"), ("QOI", "RGB")),
        ]
    }
    if features.check_codec("jpg_2000"):
        found["JPEG2000"] = saved(image, "JPEG2000")
    return found | {
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 48, 48, 8, 3) + bytes(4000),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "MP4": b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + b"\0\0\0\x08free" * 9,
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "PICKLE": b"cos\nsystem\n(S'true'\ntR.",
        "ZIP": b"PK\x03\x04" + bytes(100),
        "GZIP": b"\x1f\x8b" + zlib.compress(b"x" * 100),
        "ELF": b"\x7fELF" + bytes(100),
        "TEXT": b"not a picture",
        "EMPTY": b"",
        "ONE BYTE": b"\xff",
        "RIFF": b"RIFF\x24\0\0\0WAVEfmt ",
    }
