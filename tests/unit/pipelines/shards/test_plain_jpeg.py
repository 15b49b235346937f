"""Usual JPEGs, which libjpeg-turbo's own interface decodes: what becomes of each is what Pillow makes of it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.artifacts.tables import Reason
from pipelines.shards import images
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from tests.support import pictures

SIDES = [(1, 1), (1, 37), (53, 1), (2, 3), (7, 9), (16, 16), (17, 33), (37, 53), (64, 48), (127, 101)]


def expected_of(data: bytes) -> np.ndarray:
    """The pixels by Pillow alone, upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("Pillow was asked")


@pytest.mark.parametrize("kind", pictures.JPEG_KINDS)
@pytest.mark.parametrize("side", SIDES, ids="{0[0]}x{0[1]}".format)
def test_a_usual_jpeg_has_the_pixels_that_pillow_gives(
    kind: str, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pictures.picture(0, 0, max(side))[: side[0], : side[1]]
    for quality in (30, 75, 95, 100):
        data = pictures.jpeg_of_kind(kind, pixels, quality)
        expected = expected_of(data)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", refuse)
            decoded = decode_image(data)
        assert decoded.flags.c_contiguous
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["4:2:0", "grey, progressive"])
def test_every_orientation_comes_upright(kind: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = pictures.jpeg_of_kind(kind, pictures.picture(0, 0, 53)[:37])
    block = b"\xff\xe1" + (2 + len(exif.tobytes())).to_bytes(2, "big") + exif.tobytes()
    data = data[:2] + block + data[2:]
    expected = expected_of(data)
    monkeypatch.setattr(Image, "open", refuse)
    np.testing.assert_array_equal(decode_image(data), expected)


def without_quick_path(data: bytes, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | tuple[Reason, str]:
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode_plain", lambda data: None)
        return outcome_of(data)


def outcome_of(data: bytes) -> np.ndarray | tuple[Reason, str]:
    try:
        return decode_image(data)
    except ImageReject as reject:
        return reject.reason, reject.detail


@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2, progressive", "grey", "4:2:0, restarts"])
def test_a_file_cut_anywhere_is_rejected_as_pillow_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pictures.jpeg_of_kind(kind, pictures.picture(0, 0, 24), 30)
    for end in range(2, len(whole)):
        found = outcome_of(whole[:end])
        assert isinstance(found, tuple), f"{kind} cut at {end}"
        assert found == without_quick_path(whole[:end], monkeypatch)
    assert found[0] is Reason.TRUNCATED


def with_segment(marker: int, content: bytes) -> bytes:
    whole = pictures.jpeg(pictures.picture(0, 0, 24))
    return whole[:2] + bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + content + whole[2:]


ODD = {
    "bytes behind the end": pictures.jpeg(pictures.picture(0, 0)) + b"more",
    "RGB by an Adobe marker": with_segment(0xEE, b"Adobe" + bytes(7)),
    "YCbCr by an Adobe marker": with_segment(0xEE, b"Adobe" + bytes(6) + b"\1"),
    "an Adobe marker cut short": with_segment(0xEE, b"Adobe"),
    "a JFIF marker cut short": with_segment(0xE0, b"JFIF"),
    "CMYK": pictures.cmyk_jpeg(),
    "no 4:4:4 by its factors": pictures.jpeg_of_kind("4:2:0", pictures.picture(0, 0)).replace(
        b"\x01\x22\0", b"\x01\x32\0"
    ),
    "12 bits as it says": pictures.jpeg(pictures.picture(0, 0)).replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "a frame twice": pictures.jpeg(pictures.picture(0, 0)).replace(
        (frame := pictures.jpeg(pictures.picture(0, 0))[158:177]), frame + frame
    ),
    "arithmetic codes as it says": pictures.jpeg(pictures.picture(0, 0)).replace(b"\xff\xc0", b"\xff\xc9"),
    "lossless as it says": pictures.jpeg(pictures.picture(0, 0)).replace(b"\xff\xc0", b"\xff\xc3"),
    "zeros for its scan": pictures.jpeg(pictures.picture(0, 0))[:640] + bytes(400) + b"\xff\xd9",
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_jpeg_becomes_what_pillow_makes_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = outcome_of(ODD[name]), without_quick_path(ODD[name], monkeypatch)
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("side", [8001, 20_000])
def test_the_limit_of_pixels_holds_before_any_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pictures.jpeg(pictures.picture(0, 0))
    place = whole.index(b"\xff\xc0") + 5
    said = whole[:place] + side.to_bytes(2, "big") * 2 + whole[place + 4 :]
    found = outcome_of(said)
    assert isinstance(found, tuple) and found[0] is Reason.TOO_LARGE
    assert found == without_quick_path(said, monkeypatch)
