"""Small real pictures in class folders, and specimens of what goes wrong with pictures.

write_folder(root)            folder of class folders; a class is a colour, a stripe angle and noise
picture(klass, number)        one such picture as uint8 RGB (size, size, 3)
jpeg(pixels), png(pixels)     encoded bytes
jpeg_of_kind(kind, pixels)    a JPEG of a subsampling and coding among JPEG_KINDS
READABLE, UNREADABLE          file name -> function that makes the bytes of a specimen
write_specimens(folder)       all of them, into one class folder
"""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from simplejpeg import encode_jpeg

Pixels = npt.NDArray[np.uint8]


def class_names(classes: int) -> list[str]:
    """The sorted names of the classes that `write_folder` makes."""
    return [f"class_{number:02d}" for number in range(classes)]


def picture(klass: int, number: int, size: int = 32, seed: int = 0) -> Pixels:
    """Picture `number` of class `klass`: stripes of the class's colour and angle, shifted, under noise."""
    random = np.random.default_rng([seed, klass, number])
    angle = np.pi * klass * 0.618
    y, x = np.mgrid[0:size, 0:size] / size
    phase = random.uniform(0, 2 * np.pi)
    stripes = np.sin(2 * np.pi * 3 * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    hue = 2 * np.pi * (klass * 0.618 + random.normal(0, 0.02))
    colour = 0.5 + 0.4 * np.cos(hue + np.array([0.0, 2.1, 4.2]))
    values = colour * (0.65 + 0.35 * stripes[..., None]) + random.normal(0, 0.06, (size, size, 3))
    pixels: Pixels = (values.clip(0, 1) * 255).astype(np.uint8)
    return pixels


def jpeg(pixels: Pixels, quality: int = 90) -> bytes:
    """RGB or grey pixels as JPEG bytes."""
    return _encode(Image.fromarray(pixels), "JPEG", quality=quality)


JPEG_KINDS: dict[str, dict[str, object]] = {
    **{
        f"{name}{how}": {"subsampling": code, **options}
        for name, code in (("4:4:4", 0), ("4:2:2", 1), ("4:2:0", 2))
        for how, options in (
            ("", {}),
            (", progressive", {"progressive": True}),
            (", restarts", {"restart_marker_blocks": 2}),
            (", progressive, restarts", {"progressive": True, "restart_marker_rows": 1}),
        )
    },
    "grey": {"mode": "L"},
    "grey, progressive": {"mode": "L", "progressive": True},
    "grey, restarts": {"mode": "L", "restart_marker_blocks": 2},
    "RGB": {"keep_rgb": True},
    "4:4:0": {"colorsubsampling": "440"},
    "4:1:1": {"colorsubsampling": "411"},
}
"""Usual JPEGs: subsampling, coding, restart markers; with the options of the encoder."""


def jpeg_of_kind(kind: str, pixels: Pixels, quality: int = 75) -> bytes:
    """RGB pixels as a JPEG of a kind of JPEG_KINDS."""
    options = JPEG_KINDS[kind]
    if "colorsubsampling" in options:  # Pillow writes none of these
        data: bytes = encode_jpeg(np.ascontiguousarray(pixels), quality=quality, **options)
        return data
    image = Image.fromarray(pixels).convert(str(options.get("mode", "RGB")))
    return _encode(image, "JPEG", quality=quality, **{name: options[name] for name in options if name != "mode"})


def png(pixels: Pixels) -> bytes:
    """RGB, grey or 16-bit grey pixels as PNG bytes."""
    return _encode(Image.fromarray(pixels), "PNG")


def write_folder(
    root: Path, classes: int = 3, per_class: int = 8, size: int = 32, seed: int = 0, first: int = 0
) -> list[str]:
    """Write ROOT/class_00/0000.jpg ...: JPEG, every fourth a PNG. Returns the class names.

    `first` is the number of the first picture, so that two folders can share classes but no
    picture.
    """
    names = class_names(classes)
    for klass, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(first, first + per_class):
            pixels = picture(klass, number, size, seed)
            suffix, data = (".png", png(pixels)) if number % 4 == 3 else (".jpg", jpeg(pixels))
            (folder / f"{number:04d}{suffix}").write_bytes(data)
    return names


# ----------------------------------------------------------------------------------------------- specimens


def text_as_jpeg() -> bytes:
    """Text, to be named .jpg."""
    return b"this is a text file, whatever its name says\n"


def truncated_jpeg(size: int = 64) -> bytes:
    """The first half of a JPEG: the header is whole, the last rows are missing."""
    whole = jpeg(picture(0, 0, size))
    return whole[: len(whole) // 2]


def cmyk_jpeg(size: int = 32) -> bytes:
    """A JPEG in CMYK, as print shops make them."""
    return _encode(Image.fromarray(picture(1, 0, size)).convert("CMYK"), "JPEG", quality=95)


def deep_png(size: int = 32) -> bytes:
    """A 16-bit grey PNG: a ramp from 0 at the left to 65535 at the right."""
    return png(np.tile(np.linspace(0, 65535, size).astype(np.uint16), (size, 1)))


def palette_png(size: int = 32) -> bytes:
    """A palette PNG."""
    return _encode(Image.fromarray(picture(2, 0, size)).quantize(16), "PNG")


def palette_alpha_png(size: int = 32) -> bytes:
    """A palette PNG of black pixels whose one palette entry is fully transparent."""
    image = Image.new("P", (size, size), 0)
    image.putpalette([0, 0, 0])
    return _encode(image, "PNG", transparency=0)


def alpha_png(size: int = 32) -> bytes:
    """An RGBA PNG of red whose left half is fully transparent."""
    pixels = np.zeros((size, size, 4), dtype=np.uint8)
    pixels[..., 0] = 255
    pixels[:, size // 2 :, 3] = 255
    return _encode(Image.fromarray(pixels), "PNG")


def grey_jpeg(size: int = 32) -> bytes:
    """A JPEG with one channel."""
    return jpeg(picture(0, 1, size)[..., 0].copy())


def rotated_jpeg(size: int = 32) -> bytes:
    """A JPEG stored on its side (EXIF orientation 6); upright, its top half is white, its bottom black."""
    upright = np.zeros((size, size, 3), dtype=np.uint8)
    upright[: size // 2] = 255
    image = Image.fromarray(np.rot90(upright, 1).copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(image, "JPEG", quality=95, exif=exif)


def bomb_png(width: int = 30_000, height: int = 30_000) -> bytes:
    """A few hundred bytes that declare 900 million pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def animated_png(size: int = 32, frames: int = 3) -> bytes:
    """An animated PNG of several frames."""
    images = [Image.fromarray(picture(0, number, size)) for number in range(frames)]
    return _encode(images[0], "PNG", save_all=True, append_images=images[1:])


def webp(size: int = 32) -> bytes:
    """A lossless WebP."""
    return _encode(Image.fromarray(picture(0, 0, size)), "WEBP", lossless=True)


def bmp(size: int = 32) -> bytes:
    """A BMP."""
    return _encode(Image.fromarray(picture(0, 0, size)), "BMP")


def gif(size: int = 32) -> bytes:
    """A GIF, as it may hide under another name."""
    return _encode(Image.fromarray(picture(0, 0, size)).quantize(16), "GIF")


def frames(form: str, size: int = 32, count: int = 3, **options: object) -> bytes:
    """Pictures 0, 1, ... of class 0 as the frames or pages of one file."""
    images = [Image.fromarray(picture(0, number, size)) for number in range(count)]
    images = [image.quantize(16) for image in images] if form == "GIF" else images
    return _encode(images[0], form, save_all=True, append_images=images[1:], **options)


def animated_webp() -> bytes:
    """A lossless WebP of several frames."""
    return frames("WEBP", lossless=True)


def animated_gif() -> bytes:
    """A GIF of several frames."""
    return frames("GIF")


def pages_tiff() -> bytes:
    """A TIFF of several pages, compressed."""
    return frames("TIFF", compression="tiff_lzw")


def big_tiff() -> bytes:
    """A TIFF with offsets of 64 bits."""
    return _encode(Image.fromarray(picture(0, 0)), "TIFF", big_tiff=True)


def sequence_avif() -> bytes:
    """An AVIF with a sequence."""
    return frames("AVIF", quality=95)


# Made once with pillow-heif 1.8.1 (libheif 1.23.6, x265), since what the tests install only decodes HEIC: red grows
# downwards, green to the right, blue fades downwards. `turned` is 32 x 32, cropped from 64 x 64, and lies on its side
# (box `irot`), `veiled` is 32 x 32 with a see-through left half, `tiled` 128 x 96 of four tiles, as phones write it.
_HEIC = {
    "turned": (
        "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAA"
        "AERAAAIAAQAAAAAB7AABAAAAAAAAAJ4AAgAAAAACigABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZl"
        "AgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH/"
        "/wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29s"
        "cm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAACAAAAABAAAAIAAAAAH////gAAAAAv///+AAAAACAAAAEHBpeGkAAAAA"
        "AwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAMptZGF0AAAAmigBrwT43lvT"
        "lkSDfsYeAW5GQkDTLQKm0vjK3dm/IOH2H7/mM/yz45jdjv6QwGmVvij26OHiDWeh8xHXltpnMo3qdF/Dnxldx79fbWMtDvFnzUdS/diW3lJusp/H"
        "ciCOAXO7qwrhI8Izr9C9KciHgo5G5BFIK01sENTAcz3jSh93d0GtFy6ENDGdsyZCZJ46ubLXAkQRO++ev/gAAAAGRXhpZgAATU0AKgAAAAgAAQES"
        "AAMAAAABAAYAAAAAAAA="
    ),
    "veiled": (
        "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAmttZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAAAA"
        "AERAAAIAAQAAAAACjwABAAAAAAAAAJEAAgAAAAADIAABAAAAAAAAAP0AAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVpbmZl"
        "AgAAAAACAABodmMxAAAAAA5waXRtAAAAAAABAAABqmlwcnAAAAGCaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH/"
        "/wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29s"
        "cm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAACAAAAABAAAAIAAAAAH////gAAAAAv///+AAAAACAAAAEHBpeGkAAAAA"
        "AwgICAAAAHBodmNDAQQIAAAAn/gAAAAAHvAA/Pz4+AAADwNgAAEAF0ABDAH//wQIAAADAJ/4AAADAAAeugJAYQABACVCAQEECAAAAwCf+AAAAwAA"
        "HsCCBBZbq5Ka5sCAAAAMgAAAAwCEYgABAAZEAcFzwIkAAAAOcGl4aQAAAAABCAAAACdhdXhDAAAAAHVybjptcGVnOmhldmM6MjAxNTphdXhpZDox"
        "AAAAACBpcG1hAAAAAAAAAAIAAQWBAgMFhAACBYYDB4iEAAAAGmlyZWYAAAAAAAAADmF1eGwAAgABAAEAAAGWbWRhdAAAAI0oAa8E+HFniotfysPV"
        "pM7M9V4hELWhxOuH+MRlaBsjv38xoN/m/N/pPvXWHUF/spK2MV8kx9vQ3FATza3BtoAGQR5DyQoerbwWxryY6nEWtOHQu8fbFc0Q+sCWn4ED1+LJ"
        "zqvQ0nTz/r8Raw0bA5Ft0zNGbbDrsZKaI+94ex2/uKnLEhk/Y/DB5kD5v/wAAAD5KAGuCfBkNSm/+RP/xc/xT9IDT3A6rLUiaO94dursWQQO3wxO"
        "RtBfQ71uumfKsFgVd9wJAIq63e0Xcwcvw7/JU+r9yPt/s3Qr/P9/Mjnpg6tG+nI1I8v06f18P5QUu0Pvp8HAesEONV1EjCd9GJqGUHQfFnhhld5R"
        "9k55z7130C/I//HWcpIVTDNUo8JZk1DTaJOZAeGsW0QSuy0tqVrSrIZ5f5t0OmWEy4DJBPwQHpLUj4B+VatKdvfLhhgUSRV5dK8h7bQOG+j7C3bl"
        "0+J9ssN+52t/2cJML5lOz5Jw/D/ecMdeG4oDAiwad4j9Wa4gB/Cox9+vo7zY"
    ),
    "tiled": (
        "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAlttZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAABBpZGF0AAAB"
        "AQCAAGAAAAB0aWxvYwEAAABEQAAFAAEAAQAAAAAAAAABAAAAAAAAAAgAAgAAAAAAAAJ/AAEAAAAAAAAAewADAAAAAAAAAvoAAQAAAAAAAACDAAQA"
        "AAAAAAADfQABAAAAAAAAAGoABQAAAAAAAAPnAAEAAAAAAAAAZAAAAHdpaW5mAAAAAAAFAAAAFWluZmUCAAAAAAEAAGdyaWQAAAAAFWluZmUCAAAB"
        "AAIAAGh2YzEAAAAAFWluZmUCAAABAAMAAGh2YzEAAAAAFWluZmUCAAABAAQAAGh2YzEAAAAAFWluZmUCAAABAAUAAGh2YzEAAAAADnBpdG0AAAAA"
        "AAEAAAEFaXBycAAAAMtpcGNvAAAAFGlzcGUAAAAAAAAAgAAAAGAAAAB4aHZjQwEDcAAAAJAAAAAAAB7wAPz9+PgAAA8DYAABABhAAQwB//8DcAAA"
        "AwCQAAADAAADAB66AkBhAAEAK0IBAQNwAAADAJAAAAMAAAMAHqAggQWW6kkprm4CGgwIAAADAMgAAAMACEBiAAEAB0QBwXKwIkAAAAATY29scm5j"
        "bHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAQcGl4aQAAAAADCAgIAAAAMmlwbWEAAAAAAAAABQABAwGFAwACBIIDBAUAAwSCAwQFAAQE"
        "ggMEBQAFBIIDBAUAAAAgaXJlZgAAAAAAAAAUZGltZwABAAQAAgADAAQABQAAAdRtZGF0AAAAdygBrwng1k8ldUStoxYuXv7Baa08U/cnXLiv8LJx"
        "YA99ZUfOBMEDSoQmqATyuUPh5VQgU6p30AVV+qCri2GWpfqnu+oRqHvUrUnYHzgYMc2Tyd0Fw8W++5UlP0P9sGmlXT1XTwm63CCR/y6h5O4zNvLN"
        "zqP8vOAgAAAAfygBrwng1dcldUStoxYuXv7Baa08U/clBXwsnFgD31UcbgTBA0p+iBaeC8rk+lzGrAgBTpZjhyQB4pnbRvA+8IXUnBfBPeUp7/U+"
        "6O3fBCu3qaqSlIh05yd0Fw9lvZaZejwdS8j1T3muk2yYNnRuZn+Q+r8831jvlltbTDk7WJoAAABmKAGvCeDWSw9VUStoxYuXv7Baa08U/cnWe5/w"
        "snFgD31HbLgTBA0qEJq3i3yuT6XAW6BTqnfQBVX6oKlvpRjTITaIzfE1cqbAG8rtlD9FKUOpRm/mE+UwDV8IOGSaSlINZdkCiteAAAAAYCgBrwng"
        "y55ONUStoxYuXv7Baa08U/cnWHlfCycWAPe6LOBMEDSoQnAPlcofD4tgBsuvSbYrHftTfIXU3BcHUJsHj/k4L3y0OCZ47Y7rM7JYmt8FYgz7MGm4"
        "EBZBbFXSwA=="
    ),
}


def heic(name: str = "turned") -> bytes:
    """A HEIC: `turned`, `veiled` or `tiled`, see above."""
    return base64.b64decode(_HEIC[name])


def grey_pgm() -> bytes:
    """A grey netpbm picture with a comment in its header."""
    return _encode(Image.fromarray(picture(0, 0)[..., 0].copy()), "PPM").replace(b"P5\n", b"P5 # grey\n")


def endless_png() -> bytes:
    """A PNG whose last chunk is missing."""
    return png(picture(0, 0))[:-12]


READABLE: dict[str, Callable[[], bytes]] = {
    "cmyk.jpg": cmyk_jpeg,
    "deep.png": deep_png,
    "palette.png": palette_png,
    "palette_alpha.png": palette_alpha_png,
    "alpha.png": alpha_png,
    "grey.jpg": grey_jpeg,
    "rotated.jpg": rotated_jpeg,
    "lossless.webp": webp,
    "windows.bmp": bmp,
    "gif.jpg": gif,
    "animated.png": animated_png,
    "animated.webp": animated_webp,
    "animated.gif": animated_gif,
    "pages.tif": pages_tiff,
    "big.tiff": big_tiff,
    "sequence.avif": sequence_avif,
    "turned.heic": heic,
    "grey.pgm": grey_pgm,
    "endless.png": endless_png,
}
"""File name -> bytes of pictures that are unusual but fine."""

UNREADABLE: dict[str, Callable[[], bytes]] = {
    "text.jpg": text_as_jpeg,
    "truncated.jpg": truncated_jpeg,
    "bomb.png": bomb_png,
    "empty.jpg": bytes,
}
"""File name -> bytes of files that must become rejects."""


def write_specimens(folder: Path, readable: bool = True, unreadable: bool = True) -> list[str]:
    """Write the specimens into one (class) folder; returns their file names."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = (READABLE if readable else {}) | (UNREADABLE if unreadable else {})
    for name, make in chosen.items():
        (folder / name).write_bytes(make())
    return sorted(chosen)


def _encode(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()
