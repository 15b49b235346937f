"""S3: small files that would become large or slow. Each is rejected from its headers, or costs what it weighs."""

import bz2
import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.artifacts.tables import Reason
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.ingest.adopt import adopt
from pipelines.ingest.ingest import ingest
from pipelines.shards.containers.limits import MAX_SCANS, ImageReject
from pipelines.shards.images import decode_image
from tests.fuzz.guards import peak_growth, within
from tests.fuzz.hostile_images import rle_bmp, saved
from tests.support import pictures
from tests.support.report import report

MEMORY_MIB = 256
GUARD_S = 2.0


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (32, 32), pixels: bytes | None = None) -> bytes:
    """A grey PNG of zeros with further chunks before its pixels."""
    width, height = size
    rows = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    listed = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in listed
    )


def jpeg_with(segments: bytes) -> bytes:
    """A small JPEG with segments right after its start."""
    whole = pictures.jpeg(pictures.picture(0, 0))
    return whole[:2] + segments + whole[2:]


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def exif_of_many_values(values: int, size: int) -> bytes:
    """A directory whose every entry names the same `size` bytes: a parser that copies them holds values * size."""
    entries = b"".join(
        struct.pack("<HHII", 0x9000 + number, 7, size, 8 + 2 + 12 * values + 4) for number in range(values)
    )
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", values) + entries + bytes(4) + bytes(size)


def scans(side: int, times: int) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    whole = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * times + b"\xff\xd9"


def repeated_scans_of_one_component() -> bytes:
    """The same for a sequential JPEG whose scans have one component each."""
    whole = pictures.jpeg(pictures.picture(0, 0, 512))
    first = whole.index(b"\xff\xda")
    one = segment(0xDA, b"\x01\x01\x00\x00\x3f\x00") + bytes(64)
    return whole[:first] + one * 100_000 + b"\xff\xd9"


def webp_canvas(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + (width - 1).to_bytes(3, "little")
    whole = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    body += (height - 1).to_bytes(3, "little") + whole
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_frames(frames: int) -> bytes:
    image = saved(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    frame = bytes(6) + (7).to_bytes(3, "little") * 2 + (1).to_bytes(3, "little") + b"\0" + image
    chunk = b"ANMF" + struct.pack("<I", len(frame)) + frame
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (7).to_bytes(3, "little") * 2
    body += b"ANIM" + struct.pack("<IIH", 6, 0, 0) + chunk * frames
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif(screen: tuple[int, int], *images: bytes, extension: bytes = b"") -> bytes:
    return b"GIF89a" + struct.pack("<HH", *screen) + b"\x80\0\0" + bytes(6) + extension + b"".join(images) + b";"


def gif_image(left: int = 0, width: int = 32, blocks: bytes | None = None) -> bytes:
    """One image of 32 rows; its pixels are those of a picture that Pillow wrote, unless given."""
    whole = saved(Image.new("L", (32, 32)), "GIF")
    pixels = whole[whole.index(b",") + 11 : -1] if blocks is None else blocks
    return b"," + struct.pack("<HHHHB", left, 0, width, 32, 0) + b"\x08" + pixels


def tiff(*tags: tuple[int, int, int, int], size: tuple[int, int] = (32, 32), strip: bytes = bytes(1024)) -> bytes:
    """A grey TIFF whose one strip is right behind its header; further tags, and those that replace its own."""
    width, height = size
    own = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 262: (3, 1, 1), 273: (4, 1, 8)}
    own |= {277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, len(strip))}
    own |= {tag: (kind, count, value) for tag, kind, count, value in tags}
    entries = b"".join(struct.pack("<HHII", tag, *fields) for tag, fields in sorted(own.items()))
    directory = 8 + len(strip)
    # The next directory is this one: a chain without an end.
    end = struct.pack("<I", directory)
    return b"II*\0" + struct.pack("<I", directory) + strip + struct.pack("<H", len(own)) + entries + end


def box(kind: bytes, *content: bytes) -> bytes:
    data = b"".join(content)
    return struct.pack(">I", len(data) + 8) + kind + data


def avif_that_is_larger_inside(side: int, items: int = 1) -> bytes:
    """An AVIF whose AV1 header announces frames of so many pixels a side; nothing else says so."""
    bits = f"{0:03b}1{1:1b}{0:05b}" + f"{15:04b}" * 2 + f"{side - 1:016b}" * 2
    header = int(bits.ljust(80, "0"), 2).to_bytes(10, "big")
    stream = b"\x0a" + bytes([len(header)]) + header
    head = box(b"ftyp", b"avif\0\0\0\0avifmif1miaf")
    infos = [box(b"infe", b"\2\0\0\0", struct.pack(">HH", n + 1, 0), b"av01\0") for n in range(items)]
    places = [struct.pack(">HHHIHII", n + 1, 1, 0, 0, 1, 0, len(stream)) for n in range(items)]
    return head + box(
        *(b"meta", bytes(4), box(b"pitm", bytes(4), b"\0\1")),
        box(b"iinf", bytes(4), struct.pack(">H", items), *infos),
        box(b"iloc", b"\1\0\0\0\x44\x40", struct.pack(">H", items), *places),
        box(b"idat", stream),
    )


def heic_of_size(side: int, name: str = "turned") -> bytes:
    """A HEIC whose picture, or each of whose tiles, has so many pixels a side, as its container has it."""
    here, there = (b"ispe" + struct.pack(">III", 0, size, size) for size in (64, side))
    return pictures.heic(name).replace(here, there)


REJECTED: dict[str, Callable[[], bytes]] = {
    "png between one and two ceilings": lambda: png(size=(8001, 8001)),
    "png of 400 million pixels": lambda: png(size=(20_000, 20_000), pixels=zlib.compress(bytes(1 << 20))),
    "webp canvas of 268 million pixels": lambda: webp_canvas(16_383, 16_383),
    "webp canvas between one and two ceilings": lambda: webp_canvas(11_000, 11_000),
    "webp of 100,000 frames": lambda: webp_frames(100_000),
    "jpeg with 17 MiB of EXIF": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 275),
    "jpeg with 17 MiB of ICC profile": lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 275),
    "jpeg with 30 MiB of comments": lambda: jpeg_with(segment(0xFE, bytes(65_000)) * 480),
    "jpeg of 200,000 segments": lambda: jpeg_with(segment(0xE5, b"") * 200_000),
    "progressive jpeg of 20,000 scans": lambda: scans(4000, 20_000),
    "progressive jpeg of 64 million pixels in 90 scans": lambda: scans(8000, 85),
    "jpeg of 100,000 scans of one component": repeated_scans_of_one_component,
    "png with 20 MiB of text": lambda: png(*[(b"tEXt", b"k\0" + bytes(1 << 20))] * 20),
    "png with 20 MiB of profile": lambda: png((b"iCCP", b"p\0\0" + bytes(20 << 20))),
    "png of a million chunks": lambda: png(*[(b"tEXt", b"k\0v")] * 1_000_000),
    "gif screen of 4 billion pixels": lambda: gif((65_535, 65_535), gif_image()),
    "gif image far beyond its screen": lambda: gif((6_500, 6_500), gif_image(left=60_000)),
    "gif of four million blocks": lambda: gif((32, 32), gif_image(blocks=b"\1" * (8 << 20))),
    "gif with 20 MiB of comments": lambda: gif(
        (32, 32), gif_image(), extension=b"!\xfe" + b"\xff" * (20 << 20) + b"\0"
    ),
    "tiff of 400 million pixels": lambda: tiff(size=(20_000, 20_000)),
    "tiff with a tile of 3.6 billion pixels": lambda: tiff(
        (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 1024)
    ),
    "tiff with 60 MiB of offsets": lambda: tiff((273, 4, 15 << 20, 8), strip=bytes(60 << 20)),
    "tiff of 65,535 tags": lambda: b"II*\0\x08\0\0\0\xff\xff" + bytes(12 * 65_535 + 4),
    "tiff of a jpeg of 20,000 scans": lambda: tiff((259, 3, 1, 7), size=(4000, 4000), strip=scans(4000, 20_000)),
    "avif of 268 million pixels inside": lambda: avif_that_is_larger_inside(16_384),
    "avif of 100 items of 60 million pixels": lambda: avif_that_is_larger_inside(7_740, 100),
    "avif of 5,000 items": lambda: avif_that_is_larger_inside(8, 5_000),
    "avif of 100,000 boxes": lambda: avif_that_is_larger_inside(8) + box(b"free") * 100_000,
    "heic of 400 million pixels cropped to 1,024": lambda: heic_of_size(20_000),
    "heic of four tiles of 64 million pixels": lambda: heic_of_size(8_000, "tiled"),
    "ppm of 900 million pixels": lambda: b"P6 30000 30000 255\n" + bytes(1 << 20),
    "ppm of 60 MiB of text": lambda: b"P3 3000 3000 255\n" + b"0 " * (30 << 20),
    "ppm of 16 million pixels of 12 bits": lambda: b"P6 4000 4000 4095\n" + bytes(48 << 20),
    "run-length bmp of 60 million pixels": lambda: rle_bmp(7_740, 7_740),
}

HARMLESS: dict[str, Callable[[], bytes]] = {
    "png text that unfolds to 1 GiB": lambda: png(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 << 20)))] * 16),
    "png profile that unfolds to 256 MiB": lambda: png((b"iCCP", b"p\0\0" + zlib.compress(bytes(256 << 20)))),
    "jpeg exif that names 300 MiB": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif_of_many_values(5_000, 5_000))),
    "png exif that names 16 GiB": lambda: png((b"eXIf", exif_of_many_values(20_000, 1 << 20))),
    "apng of four billion frames": lambda: png((b"acTL", struct.pack(">II", 0xFFFFFFFF, 0))),
    "gif of 100,000 frames": lambda: gif((32, 32), *[gif_image()] * 100_000),
    "tiff whose pages have no end": tiff,
    "tiff strip that unfolds to 256 MiB": lambda: tiff((259, 3, 1, 8), strip=zlib.compress(bytes(256 << 20))),
    "tiff tag that names 4 GiB": lambda: tiff((34_675, 7, 0xFFFFFFFF, 8), (700, 1, 0xFFFFFFFF, 8)),
    "pixels that unfold beyond the picture": lambda: png(pixels=zlib.compress(bytes(256 << 20))),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_bomb_is_rejected_before_it_unfolds(name: str) -> None:
    data = REJECTED[name]()
    with peak_growth() as memory, within(GUARD_S, name), pytest.raises(ImageReject) as caught:
        decode_image(data)
    report("S3", bomb=name, bytes=len(data), reason=caught.value.reason, growth_mib=round(memory.mib))
    assert caught.value.reason is Reason.TOO_LARGE
    assert memory.mib < MEMORY_MIB


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_not_needed_for_the_pixels_does_not_unfold(name: str) -> None:
    data = HARMLESS[name]()
    with peak_growth() as memory, within(GUARD_S, name):
        assert decode_image(data).shape == (32, 32, 3)
    report("S3", bomb=name, bytes=len(data), reason="decoded", growth_mib=round(memory.mib))
    assert memory.mib < MEMORY_MIB / 2


def test_the_measure_of_memory_notices_a_large_picture() -> None:
    """A test of the tests above: decoding thirty million pixels takes what it takes."""
    data = png(size=(6_000, 5_000))
    with peak_growth() as memory:
        decode_image(data)
    assert memory.mib > 60


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_largest_picture_that_is_taken_is_held_little_more_than_twice(mode: str) -> None:
    data = saved(Image.new(mode, (8000, 8000)), "PNG", compress_level=1)
    with peak_growth() as memory:
        assert decode_image(data).shape == (8000, 8000, 3)
    report("S3", bomb=f"largest {mode}", bytes=len(data), reason="decoded", growth_mib=round(memory.mib))
    assert memory.mib < 640  # 244 MiB in Pillow, 183 MiB as an array, and strips in between


def test_ordinary_progressive_pictures_are_far_from_the_limits() -> None:
    image = Image.fromarray(pictures.picture(0, 0, 64))
    data = saved(image, "JPEG", progressive=True, icc_profile=bytes(3 << 20))
    assert data.count(b"\xff\xda") < MAX_SCANS / 5
    assert np.abs(decode_image(data).astype(int) - np.asarray(image)).mean() < 12


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_a_compressed_tar_that_unfolds_to_gigabytes_is_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb.tar.{form}"
    opened = {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}[form]
    info = tarfile.TarInfo("class/big.txt")
    info.size = 4 << 30
    with opened(path, "wb") as stream:
        stream.write(info.tobuf())
        for _ in range(120):
            stream.write(bytes(1 << 20))
    with peak_growth() as memory, within(GUARD_S, form), pytest.raises(InputError, match="more than"):
        ingest(str(path), str(tmp_path / "out"), Config())
    assert memory.mib < MEMORY_MIB
    assert not (tmp_path / "out").exists()
    report("S3", bomb=f"tar.{form}", bytes=path.stat().st_size, reason="refused", growth_mib=round(memory.mib))


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst", ".tgz", ".tar.xz"])
def test_compressed_shards_are_refused_by_their_name(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"shard-0{suffix}").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(InputError, match="is compressed"):
        adopt(str(tmp_path), str(tmp_path))
