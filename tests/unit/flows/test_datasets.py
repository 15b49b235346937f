"""The demo's images: deterministic, checked, and said aloud."""

import gzip
import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import datasets
from flows.datasets import (
    CLASSES,
    FILES,
    IdxFile,
    photographs,
    png_bytes,
    prepare_archive,
    read_idx_files,
    sample_query,
)
from flows.downloads import unpack_debian
from pipelines.errors import DamagedArtifact, Unavailable


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four small files in the original's format, which stand for it in this test."""
    random = np.random.default_rng(0)
    folder = tmp_path / "idx"
    folder.mkdir()
    files = []
    for file in FILES:
        count = 30 if file.name.startswith("train") else 10
        if "idx3" in file.name:
            content = bytes(16) + random.integers(0, 256, count * 784, dtype=np.uint8).tobytes()
        else:
            content = bytes(8) + bytes(number % 10 for number in range(count))
        (folder / f"{file.name}.gz").write_bytes(gzip.compress(content, mtime=0))
        files.append(IdxFile(file.name, len(content), hashlib.sha256(content).hexdigest()))
    monkeypatch.setattr(datasets, "FILES", tuple(files))
    for name, file in zip(("TRAIN_IMAGES", "TRAIN_LABELS", "TEST_IMAGES", "TEST_LABELS"), files, strict=True):
        monkeypatch.setattr(datasets, name, file)
    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", folder)
    return folder


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Path:
        raise Unavailable("not reachable (test)")

    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", Path("/nonexistent"))
    monkeypatch.setattr(datasets, "download", refuse)
    monkeypatch.setattr(datasets, "unpack_debian", refuse)


def test_the_zip_holds_each_image_in_the_folder_of_its_class(tiny: Path, tmp_path: Path) -> None:
    said: list[str] = []
    found = prepare_archive(said.append, tmp_path / "cache")
    with zipfile.ZipFile(found.archive) as archive:
        names = archive.namelist()
        image = np.asarray(Image.open(io.BytesIO(archive.read("test/trouser/00000.png"))))
    assert len(names) == 40
    assert sum(name.startswith("train/") for name in names) == 30
    assert {name.split("/")[1] for name in names} == set(CLASSES)
    pixels = np.frombuffer(gzip.decompress((tiny / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    assert (image == pixels.reshape(-1, 28, 28)[1]).all()
    assert not found.fallback
    assert any("system's copy" in line for line in said)


def test_the_cache_is_used_and_the_bytes_are_the_same_every_time(tiny: Path, tmp_path: Path) -> None:
    first = prepare_archive(lambda _: None, tmp_path / "one").archive.read_bytes()
    assert prepare_archive(lambda _: None, tmp_path / "two").archive.read_bytes() == first
    for file in tiny.iterdir():
        file.unlink()
    said: list[str] = []
    assert prepare_archive(said.append, tmp_path / "one").archive.read_bytes() == first
    assert said == [f"data: Fashion-MNIST, from the cache ({tmp_path / 'one' / 'fashion-mnist.zip'})"]


def test_a_damaged_cache_is_made_anew(tiny: Path, tmp_path: Path) -> None:
    archive = prepare_archive(lambda _: None, tmp_path / "cache").archive
    good = archive.read_bytes()
    archive.write_bytes(good[:-1] + b"x")
    assert prepare_archive(lambda _: None, tmp_path / "cache").archive.read_bytes() == good


@pytest.mark.parametrize("damage", ["content", "longer", "not gzip", "cut"])
def test_a_damaged_file_is_refused(tiny: Path, damage: str) -> None:
    path = tiny / "t10k-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(
        {
            "content": gzip.compress(content[:-1] + bytes([content[-1] ^ 1])),
            "longer": gzip.compress(content + b"x"),
            "not gzip": content,
            "cut": path.read_bytes()[:-100],
        }[damage]
    )
    with pytest.raises(DamagedArtifact, match=r"t10k-images-idx3-ubyte\.gz.*refused"):
        read_idx_files(tiny)


def test_a_damaged_source_is_passed_over_and_named(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny / "train-labels-idx1-ubyte.gz").write_bytes(b"nonsense")
    installed = tiny
    no_network(monkeypatch)
    monkeypatch.setattr(datasets, "INSTALLED_FOLDER", installed)
    said: list[str] = []
    assert prepare_archive(said.append, tmp_path / "cache").fallback
    assert any("system's copy" in line and "refused" in line for line in said)


def test_without_any_source_the_photographs_stand_in_and_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_network(monkeypatch)
    said: list[str] = []
    found = prepare_archive(said.append, tmp_path)
    assert found.fallback and "fallback" in found.title
    assert [line for line in said if "FALLBACK" in line and "scikit-image" in line]
    assert sum("not reachable" in line for line in said) == 2  # the mirror and Debian, each by name
    with zipfile.ZipFile(found.archive) as archive:
        names = archive.namelist()
    classes = {name.split("/")[1] for name in names}
    assert len(classes) >= 10
    for split in ("train", "test"):
        assert {name.split("/")[1] for name in names if name.startswith(split)} == classes
    assert sum(name.startswith("train/") for name in names) > 800


def test_no_crop_is_in_both_sets() -> None:
    seen: dict[str, set[bytes]] = {"train": set(), "test": set()}
    for name, pixels in photographs():
        assert pixels.shape == (32, 32, 3)
        if pixels.std() > 8:  # flat sky looks the same wherever it is cut
            seen[name.split("/")[0]].add(pixels.tobytes())
    assert len(seen["train"]) > 800
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (1, 1), (200, 400, 3)])
def test_a_png_is_read_back_pixel_by_pixel(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png_bytes(pixels)))) == pixels).all()


def test_one_query_image_is_kept_to_search_with(tiny: Path, tmp_path: Path) -> None:
    archive = prepare_archive(lambda _: None, tmp_path / "cache").archive
    assert Path(sample_query(archive)).read_bytes() == Path(sample_query(archive)).read_bytes()
    assert Image.open(sample_query(archive)).size == (28, 28)


def test_apt_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match="no apt-get"):
        unpack_debian("dataset-fashion-mnist", tmp_path)


def test_the_sizes_are_those_of_the_published_counts() -> None:
    for file, count in zip(FILES, (60_000, 60_000, 10_000, 10_000), strict=True):
        assert file.size == (16 + count * 28 * 28 if "images" in file.name else 8 + count)
        assert len(bytes.fromhex(file.sha256)) == 32
    assert len({file.sha256 for file in FILES}) == 4


@pytest.mark.skipif(
    not datasets.INSTALLED_FOLDER.is_dir(),
    reason="digests can be held against nothing but the 55 MB that they are of: Debian's package is not installed",
)
def test_the_real_files_have_the_digests_in_the_code() -> None:
    files = read_idx_files(datasets.INSTALLED_FOLDER)
    labels = files["train-labels-idx1-ubyte"]
    assert np.bincount(labels).tolist() == [6000] * 10
