"""The look of a picture: a file that was saved again looks alike, another picture does not."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipelines.dedupe.looks import FILE_KNOWN, SEEN, look_of, mark_alike, mark_candidates
from tests.support.pictures import png

SHA = bytes(range(32))


def scene(seed: int, width: int = 240, height: int = 180) -> Image.Image:
    """A smooth picture of many colours, as a photograph out of focus has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def weak(seed: int, strength: int = 2) -> Image.Image:
    """A picture of nearly one grey, whose hash is noise."""
    grey = np.random.default_rng(seed).integers(120, 120 + strength, (90, 120, 1)).astype(np.uint8)
    return Image.fromarray(np.repeat(grey, 3, axis=2))


def page(seed: int) -> Image.Image:
    """Lines of text in one layout; the words are seeded."""
    random, image = np.random.default_rng(seed), Image.new("RGB", (600, 800), "white")
    for y in range(60, 740, 14):
        ImageDraw.Draw(image).text(
            (50, y), "".join(random.choice(list("abcdefghij klmnop rstuvw  "), 80)), fill="black"
        )
    return image


def saved(image: Image.Image, kind: str = "JPEG", **options: int) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def alike(first: bytes, second: bytes) -> bool:
    one, other = look_of(SHA, first), look_of(SHA, second)
    found = bool(mark_alike(one, other[0])[0])
    assert bool(mark_alike(other, one[0])[0]) == found  # the order of the two does not matter
    assert bool(mark_candidates(one, other[0])[0]) or not found  # candidates leave none of them out
    return found


SAVED_AGAIN: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG of quality 95": lambda image: saved(image, quality=95),
    "JPEG of quality 50": lambda image: saved(image, quality=50),
    "WebP": lambda image: saved(image, "WEBP", quality=75),
    "half the size": lambda image: png(np.asarray(image.resize((image.width // 2, image.height // 2)))),
    "twice the size": lambda image: saved(image.resize((image.width * 2, image.height * 2)), quality=90),
}


@pytest.mark.parametrize("how", SAVED_AGAIN)
@pytest.mark.parametrize("image", [scene(1), weak(2), page(3)], ids=["scene", "nearly constant", "text"])
def test_a_picture_that_was_saved_again_looks_alike(image: Image.Image, how: str) -> None:
    assert alike(png(np.asarray(image)), SAVED_AGAIN[how](image))


def test_a_picture_turned_by_its_exif_looks_as_it_is_shown() -> None:
    image, exif = scene(5), Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    image.transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG", quality=95, exif=exif)
    assert alike(png(np.asarray(image)), turned.getvalue())


def with_a_mark(image: Image.Image) -> Image.Image:
    marked = image.copy()
    ImageDraw.Draw(marked).rectangle((40, 40, 56, 56), fill="black")
    return marked


def faint(image: Image.Image, brighter: int = 0) -> Image.Image:
    """The picture at a seventh of its contrast."""
    return image.point(lambda value: 110 + value // 7 + brighter)


def pale(image: Image.Image, red: int = 0) -> Image.Image:
    """The picture in paler colours; with `red`, of more red and less green at the same brightness."""
    return Image.fromarray((np.asarray(image) * 0.4 + 80 + np.array([red, -0.51 * red, 0])).astype(np.uint8))


def grey(value: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (value, value, value))


OTHERS = {
    "another scene": (scene(1), scene(2)),
    "the same scene, mirrored": (scene(1), scene(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "a mark on it": (Image.new("RGB", (240, 180), "white"), with_a_mark(Image.new("RGB", (240, 180), "white"))),
    "a mark on a scene": (scene(1), with_a_mark(scene(1))),
    "other colours of one brightness": (pale(scene(1)), pale(scene(1), red=60)),
    "a faint scene, a little brighter": (faint(scene(1)), faint(scene(1), brighter=4)),
    "another constant grey": (grey(100), grey(110)),
    "another text in the same layout": (page(1), page(2)),
    "nearly constant, and not": (grey(127), scene(3)),
}


@pytest.mark.parametrize("pair", OTHERS)
def test_another_picture_does_not_look_alike(pair: str) -> None:
    first, second = (png(np.asarray(image)) for image in OTHERS[pair])
    assert not alike(first, second)


def test_only_the_file_is_known_of_what_does_not_decode() -> None:
    broken = look_of(SHA, b"no picture")[0]
    assert (int(broken["known"]), broken["sha256"].tobytes()) == (FILE_KNOWN, SHA)
    assert int(look_of(SHA, png(np.asarray(scene(1))))[0]["known"]) == SEEN
