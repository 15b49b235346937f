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
        patch.setattr(images, "_decode_plain", lambda *_: None)
        return outcome_of(data)


def outcome_of(data: bytes, least_side: int = 0) -> np.ndarray | tuple[Reason, str]:
    try:
        return decode_image(data, least_side)
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


# --------------------------------------------------------------------------------------------------- smaller scales

SMOOTH = np.stack(np.meshgrid(np.arange(400) % 200, np.arange(300) // 2, indexing="xy"), -1)
SMOOTH = np.concatenate([SMOOTH, 200 - SMOOTH[..., :1]], -1).astype(np.uint8)
SMOOTH[:, 200:] = SMOOTH[:, 199::-1]  # no edge


@pytest.mark.parametrize(
    ("least_side", "shape"),
    [
        (0, (300, 400)),
        (301, (300, 400)),
        (300, (300, 400)),
        (151, (300, 400)),  # 5/8, 3/4 and 7/8 take longer than full size
        (150, (150, 200)),
        (114, (150, 200)),
        (113, (113, 150)),
        (76, (113, 150)),
        (75, (75, 100)),
        (38, (38, 50)),
        (1, (38, 50)),
    ],
)
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "4:2:0, progressive", "4:2:2, restarts", "4:1:1", "grey"])
def test_the_smallest_scale_is_taken_that_leaves_the_sides_long_enough(
    kind: str, least_side: int, shape: tuple[int, int]
) -> None:
    data = pictures.jpeg_of_kind(kind, SMOOTH, 95)
    decoded = decode_image(data, least_side)
    assert decoded.shape == (*shape, 3)
    step = 300 / shape[0]
    rows, columns = (
        ((np.arange(length) + 0.5) * step).astype(int).clip(max=most)
        for length, most in zip(shape, (299, 399), strict=True)
    )
    near = decode_image(data)[rows][:, columns].astype(int)
    assert np.abs(decoded - near).mean() < 7


def test_a_smaller_scale_comes_upright_too() -> None:
    data = pictures.jpeg_of_kind("4:2:0", SMOOTH)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = data[:2] + b"\xff\xe1" + (2 + len(exif.tobytes())).to_bytes(2, "big") + exif.tobytes() + data[2:]
    np.testing.assert_array_equal(decode_image(turned, 75), np.rot90(decode_image(data, 75), -1))


@pytest.mark.parametrize("name", ["png", "CMYK", "zeros for its scan"])
def test_what_pillow_decodes_is_decoded_at_full_size(name: str) -> None:
    data = pictures.png(SMOOTH) if name == "png" else ODD[name]
    np.testing.assert_array_equal(decode_image(data, 8), decode_image(data))


@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2, progressive", "grey", "4:2:0, restarts"])
def test_a_file_cut_anywhere_is_rejected_at_every_scale(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pictures.jpeg_of_kind(kind, pictures.picture(0, 0, 64), 20)
    for end in range(2, len(whole), 7):
        assert outcome_of(whole[:end], 8) == without_quick_path(whole[:end], monkeypatch)
