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

from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.images import MAX_SCANS, ImageReject, decode_image
from pipelines.ingest import ingest
from pipelines.intake.adopt import adopt
from pipelines.schema import Reason
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
    "apng of four billion frames": lambda: png((b"acTL", struct.pack(">II", 0xFFFFFFFF, 0))),
    "run-length bmp of 60 million pixels": lambda: rle_bmp(7_740, 7_740),
}

HARMLESS: dict[str, Callable[[], bytes]] = {
    "png text that unfolds to 1 GiB": lambda: png(*[(b"zTXt", b"k\0\0" + zlib.compress(bytes(64 << 20)))] * 16),
    "png profile that unfolds to 256 MiB": lambda: png((b"iCCP", b"p\0\0" + zlib.compress(bytes(256 << 20)))),
    "jpeg exif that names 300 MiB": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif_of_many_values(5_000, 5_000))),
    "png exif that names 16 GiB": lambda: png((b"eXIf", exif_of_many_values(20_000, 1 << 20))),
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
