"""The guarded decoder on unusual and on broken pictures."""

import io
import struct
import sys
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.artifacts.tables import Reason
from pipelines.shards import images
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image, decode_picture
from tests.support import pictures


def test_lossless_pictures_decode_to_their_pixels() -> None:
    pixels = pictures.picture(0, 0)
    for data in (pictures.png(pixels), pictures.webp(), pictures.bmp()):
        decoded = decode_image(data)
        assert decoded.dtype == np.uint8
        assert (decoded == pixels).all()


def test_a_jpeg_decodes_to_about_its_pixels() -> None:
    pixels = pictures.picture(0, 0)
    assert np.abs(decode_image(pictures.jpeg(pixels, quality=95)).astype(int) - pixels).mean() < 12


@pytest.mark.parametrize("name", pictures.READABLE)
def test_unusual_pictures_become_rgb(name: str) -> None:
    decoded = decode_image(pictures.READABLE[name]())
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    decoded = decode_image(pictures.deep_png())
    assert decoded[0, 0].tolist() == [0, 0, 0]
    assert decoded[0, -1].tolist() == [255, 255, 255]
    assert abs(int(decoded[0, 16, 0]) - 131) <= 2


def test_transparency_lies_on_white() -> None:
    assert (decode_image(pictures.palette_alpha_png()) == 255).all()
    decoded = decode_image(pictures.alpha_png())
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, -1].tolist() == [255, 0, 0]


def test_exif_turns_the_picture_upright() -> None:
    decoded = decode_image(pictures.rotated_jpeg())
    assert decoded[:12].min() > 200
    assert decoded[-12:].max() < 50


def test_cmyk_keeps_its_colours() -> None:
    pixels = pictures.picture(1, 0)
    assert np.abs(decode_image(pictures.cmyk_jpeg()).astype(int) - pixels).mean() < 12


def test_a_phone_photograph_with_an_embedded_preview_decodes_to_its_first_picture() -> None:
    sink = io.BytesIO()
    first, second = (Image.fromarray(np.full((32, 32, 3), value, np.uint8)) for value in (200, 20))
    first.save(sink, "MPO", save_all=True, append_images=[second])
    assert abs(int(decode_image(sink.getvalue()).mean()) - 200) < 3


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text.jpg", Reason.NOT_AN_IMAGE),
        ("empty.jpg", Reason.NOT_AN_IMAGE),
        ("truncated.jpg", Reason.TRUNCATED),
        ("bomb.png", Reason.TOO_LARGE),
    ],
)
def test_broken_pictures_are_rejected_with_their_reason(name: str, reason: Reason) -> None:
    with pytest.raises(ImageReject) as caught:
        decode_image(pictures.UNREADABLE[name]())
    assert caught.value.reason is reason
    assert "\n" not in caught.value.detail


def test_a_bomb_between_one_and_two_ceilings_is_refused_even_where_warnings_are_off() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageReject) as caught:
            decode_image(pictures.bomb_png(8001, 8001))
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_ribbon_is_refused() -> None:
    with pytest.raises(ImageReject, match="too_large"):
        decode_image(pictures.png(np.zeros((1, 201, 3), np.uint8)))


def test_too_many_bytes_are_refused_before_parsing() -> None:
    with pytest.raises(ImageReject, match=f"{images.MAX_IMAGE_BYTES + 1} bytes, the limit is"):
        decode_image(pictures.webp().ljust(images.MAX_IMAGE_BYTES + 1))


def test_mutated_bytes_never_raise_anything_else() -> None:
    random = np.random.default_rng(0)
    sources = [
        pictures.jpeg(pictures.picture(0, 0)),
        pictures.png(pictures.picture(0, 0)),
        pictures.webp(),
        pictures.bmp(),
    ]
    outcomes = set()
    for _ in range(100):
        for source in sources:
            data = bytearray(source)
            for _ in range(random.integers(1, 8)):
                data[random.integers(len(data))] = random.integers(256)
            try:
                assert decode_image(bytes(data)).ndim == 3
            except ImageReject as reject:
                outcomes.add(reject.reason)
    assert len(outcomes) >= 2


def on_its_side(form: str, exif: bytes) -> bytes:
    """A picture whose upper half is white once it is turned by orientation 6."""
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16] = 255
    sink = io.BytesIO()
    Image.fromarray(np.rot90(upright, 1).copy()).save(
        sink, form, exif=exif, **({"lossless": True} if form == "WEBP" else {})
    )
    return sink.getvalue()


def exif_of(order: str, kind: int, value: int) -> bytes:
    size = 4 if kind == 4 else 2
    entry = (0x0112).to_bytes(2, order) + kind.to_bytes(2, order) + (1).to_bytes(4, order)  # type: ignore[arg-type]
    entry += value.to_bytes(size, order).ljust(4, b"\0")  # type: ignore[arg-type]
    head = {"little": b"II*\0", "big": b"MM\0*"}[order] + (8).to_bytes(4, order)  # type: ignore[arg-type]
    return b"Exif\0\0" + head + (1).to_bytes(2, order) + entry + bytes(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("kind", [3, 4])
def test_the_orientation_is_found_in_every_container_and_byte_order(form: str, order: str, kind: int) -> None:
    decoded = decode_image(on_its_side(form, exif_of(order, kind, 6)))
    assert decoded[:12].min() > 200 and decoded[-12:].max() < 50


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_comes_upright_as_pillow_has_it(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)).save(sink, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(sink)))
    assert np.array_equal(decode_image(sink.getvalue()), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "1", "P", "CMYK", "I;16"])
def test_a_picture_converted_in_strips_is_the_same(mode: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (37, 53, 4), np.uint8)
    deep = Image.fromarray(drawn[..., 0].astype(np.uint16) * 257)
    image = deep if mode == "I;16" else Image.fromarray(drawn)
    image = image.convert("RGB").quantize(16) if mode == "P" else image if mode == "I;16" else image.convert(mode)
    sink = io.BytesIO()
    image.save(sink, "JPEG" if mode == "CMYK" else "PNG", **({"transparency": 3} if mode == "P" else {}))
    whole = decode_image(sink.getvalue())
    assert np.array_equal(decode_picture(sink.getvalue(), strip_pixels=5 * 53).pixels, whole)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif_of("little", 3, 99)])
def test_an_orientation_that_is_none_leaves_the_picture_as_it_lies(exif: bytes) -> None:
    assert decode_image(on_its_side("JPEG", exif))[:, :12].min() > 200


@pytest.mark.parametrize("data", [pictures.png(pictures.picture(0, 0))[:-200], pictures.webp()[:-4]])
def test_a_file_that_lacks_its_end_is_truncated(data: bytes) -> None:
    with pytest.raises(ImageReject) as caught:
        decode_image(data)
    assert caught.value.reason is Reason.TRUNCATED


# ------------------------------------------------------------------------------------------------ formats and frames


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def as_pillow_has_it(data: bytes) -> np.ndarray:
    """The first frame by Pillow alone, upright, transparency on white."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, (255, 255, 255, 255)), layered)
    return np.asarray(upright.convert("RGB"))


TURNED = Image.Exif()
TURNED[0x0112] = 6
PICTURE = Image.fromarray(pictures.picture(0, 0, 48)[:40])
PILLOW_READS = {
    **{f"gif {mode}": saved(PICTURE.convert(mode), "GIF") for mode in ("P", "L", "1")},
    "gif interlaced, a colour see-through": saved(PICTURE.quantize(16), "GIF", transparency=3, interlace=1),
    "gif without its end": saved(PICTURE.convert("P"), "GIF")[:-1],
    **{f"tiff {m}": saved(PICTURE.convert(m), "TIFF") for m in ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr")},
    **{
        f"tiff {how}": saved(PICTURE, "TIFF", compression=how)
        for how in ("tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg")
    },
    **{
        f"tiff {how}": saved(PICTURE.convert("1"), "TIFF", compression=how)
        for how in ("group3", "group4", "tiff_ccitt")
    },
    "tiff with offsets of 64 bits": saved(PICTURE, "TIFF", big_tiff=True),
    "tiff on its side": saved(PICTURE, "TIFF", exif=TURNED),
    **{f"avif {mode}": saved(PICTURE.convert(mode), "AVIF") for mode in ("RGB", "RGBA", "L")},
    "avif on its side, with metadata": saved(PICTURE, "AVIF", exif=TURNED, xmp=b"<x/>" * 100),
    **{f"ppm {mode}": saved(PICTURE.convert(mode), "PPM") for mode in ("RGB", "L", "1")},
    "ppm of text": b"P3\n# a comment\n2 2 255\n" + b"10 200 30 " * 4,
    "pbm of text": b"P1 2 2\n1 0\n0 1\n",
    "png without its end chunk": saved(PICTURE, "PNG")[:-12],
    "png that ends in its end chunk": saved(PICTURE, "PNG")[:-5],
    "png that ends in the checksum of its pixels": saved(PICTURE, "PNG")[:-14],
}


@pytest.mark.parametrize("name", PILLOW_READS)
def test_pictures_are_what_pillow_makes_of_them(name: str) -> None:
    decoded = decode_picture(PILLOW_READS[name])
    assert np.array_equal(decoded.pixels, as_pillow_has_it(PILLOW_READS[name]))
    assert not decoded.animated


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_noted(form: str) -> None:
    data = pictures.frames(form, 48, **({"lossless": True} if form == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3  # type: ignore[attr-defined]
    decoded = decode_picture(data)
    assert decoded.animated and np.array_equal(decoded.pixels, as_pillow_has_it(data))


def test_deep_grey_pictures_are_scaled_not_clipped() -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (8, 1)))
    for data in (saved(ramp, "TIFF"), saved(ramp, "TIFF", compression="tiff_lzw"), saved(ramp, "PPM")):
        decoded = decode_image(data)
        assert decoded[0, 0].tolist() == [0, 0, 0] and decoded[0, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(PICTURE.convert("P"), "GIF")[:1000], Reason.TRUNCATED),
        (saved(PICTURE.convert("P"), "GIF")[:20], Reason.TRUNCATED),
        (saved(PICTURE, "TIFF")[:-100], Reason.TRUNCATED),
        (saved(PICTURE, "TIFF", compression="tiff_lzw")[:100], Reason.TRUNCATED),
        (saved(PICTURE, "AVIF")[:-100], Reason.TRUNCATED),
        (saved(PICTURE, "PPM")[:-100], Reason.TRUNCATED),
        (saved(PICTURE, "PNG")[:40], Reason.TRUNCATED),
        (b"P6 is what this text begins with", Reason.NOT_AN_IMAGE),
        (b"\0\0\0\x18ftypisom\0\0\0\0isomiso2" + bytes(100), Reason.NOT_AN_IMAGE),
        (saved(PICTURE, "TIFF", compression="lzma"), Reason.UNDECODABLE),
    ],
)
def test_broken_pictures_of_the_other_formats_are_rejected_with_their_reason(data: bytes, reason: Reason) -> None:
    with pytest.raises(ImageReject) as caught:
        decode_image(data)
    assert caught.value.reason is reason


def heic_pixels(height: int, width: int, step: int) -> np.ndarray:
    """What `pictures.heic` shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * step, x * step, 255 - y * (step if step == 8 else 1)], -1)


@pytest.mark.parametrize(("name", "shown"), [("turned", heic_pixels(32, 32, 8)), ("tiled", heic_pixels(96, 128, 2))])
def test_a_heic_decodes_upright_to_about_its_pixels(name: str, shown: np.ndarray) -> None:
    decoded = decode_picture(pictures.heic(name))
    assert decoded.pixels.shape == shown.shape and not decoded.animated
    assert np.abs(decoded.pixels - shown).mean() < 12


def test_a_see_through_heic_lies_on_white() -> None:
    pixels = decode_image(pictures.heic("veiled"))
    assert pixels[:, :12].min() > 240
    assert np.abs(pixels[:, 20:] - heic_pixels(32, 32, 8)[:, 20:]).mean() < 12


def heic_that_says(width: int, height: int, name: str = "turned") -> bytes:
    """A HEIC whose picture, or each of whose tiles, of 64 x 64 pixels is of another size as the container has it."""
    said = b"ispe" + struct.pack(">III", 0, 64, 64)
    assert pictures.heic(name).count(said) == 1
    return pictures.heic(name).replace(said, b"ispe" + struct.pack(">III", 0, width, height))


@pytest.mark.parametrize("size", [(8_001, 8_001), (30_000, 30_000), (20_100, 100)])
@pytest.mark.parametrize("name", ["turned", "tiled"])
def test_a_heic_that_says_it_is_large_is_refused_also_where_it_is_cropped(size: tuple[int, int], name: str) -> None:
    assert (b"clap" in pictures.heic(name)) == (name == "turned")
    with pytest.raises(ImageReject) as caught:
        decode_image(heic_that_says(*size, name))
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_heic_of_many_large_tiles_is_refused() -> None:
    with pytest.raises(ImageReject, match=r"items of \d+ pixels together"):
        decode_image(heic_that_says(8_000, 8_000, "tiled"))
    with pytest.raises(ImageReject, match="size of 64 bits"):
        decode_image(pictures.heic().replace(b"\0\0\0\x14ispe", b"\0\0\0\1ispe"))


def test_a_heic_that_is_larger_than_it_says_is_refused() -> None:
    with pytest.raises(ImageReject) as caught:
        decode_image(heic_that_says(16, 16))
    assert caught.value.reason is Reason.UNDECODABLE


def test_a_damaged_heic_is_decoded_or_rejected_with_a_reason() -> None:
    random, whole, reasons = np.random.default_rng(0), pictures.heic(), set()
    for _ in range(300):
        data = bytearray(whole[: random.integers(8, len(whole) + 1)] if random.random() < 0.3 else whole)
        data[random.integers(len(data))] ^= 1 << random.integers(8)
        try:
            assert decode_image(bytes(data)).ndim == 3
        except ImageReject as reject:
            reasons.add(reject.reason)
    assert {Reason.TRUNCATED, Reason.UNDECODABLE} <= reasons
    with pytest.raises(ImageReject) as caught:
        decode_image(whole[:-40])
    assert caught.value.reason is Reason.TRUNCATED


def test_heic_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    images._register_heif.cache_clear()
    item = b"\0\0\0\x0cmeta\0\0\0\0"
    with pytest.raises(ImageReject, match=r"hhnet\[heic\]"):
        decode_image(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + item)
