"""The demo's images, as one zip of class folders: `train/<class>/00000.png` and `test/<class>/00000.png`.

Fashion-MNIST is looked for in this order: our cache, a copy installed on the system, torchvision's mirror, Debian's
package. Each source that is tried is named, and given up after 20 s without a byte. Every file is checked against a
sha256 of its unpacked content, so it does not matter who compressed it. If no source can be reached, crops of the
photographs in scikit-image's package take its place.
"""

import gzip
import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from flows.downloads import download, unpack_debian
from pipelines.cluster.progress import stage
from pipelines.errors import DamagedArtifact, HHNetError, InputError, Unavailable
from pipelines.storage import Store, scratch_folder, sha256_of

Say = Callable[[str], None]
"""Receives one line for the user."""

MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
PACKAGE = "dataset-fashion-mnist"
"""Name of Debian's package."""
ARCHIVE_FOLDER = "usr/share/datasets/fashion-mnist"
"""Folder of the files in Debian's package, relative to /."""
INSTALLED_FOLDER = Path("/") / ARCHIVE_FOLDER
CLASSES = (
    *("t-shirt-top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)


@dataclass(frozen=True)
class IdxFile:
    """A file of the original distribution, with the size in bytes and the sha256 of its content (not of the .gz)."""

    name: str
    size: int
    sha256: str


TRAIN_IMAGES = IdxFile(
    "train-images-idx3-ubyte", 47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
)
TRAIN_LABELS = IdxFile(
    "train-labels-idx1-ubyte", 60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
)
TEST_IMAGES = IdxFile(
    "t10k-images-idx3-ubyte", 7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
)
TEST_LABELS = IdxFile(
    "t10k-labels-idx1-ubyte", 10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
)
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

# Photographs inside scikit-image's wheel; the others of `skimage.data` would be downloaded.
PHOTOGRAPHS = (
    *("camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
CROP_PIXELS = 32
"""Side of a crop in pixels."""
CROP_ROWS = 10
"""Rows of crops that a photograph is scaled to."""


@dataclass(frozen=True)
class Dataset:
    """A prepared set: its zip, a title, and whether it is the fallback."""

    archive: Path
    title: str
    fallback: bool = False


def prepare_archive(say: Say, cache: Path | None = None) -> Dataset:
    """Put Fashion-MNIST, or the photographs if no source can be reached, as a zip into the cache, and return it."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hhnet"
    store = Store(cache or usual)
    if (found := _fashion_mnist(store, say)) is not None:
        return found
    say("data: Fashion-MNIST is out of reach; FALLBACK: crops of the photographs shipped with scikit-image")
    archive = _archive(store, "photographs", photographs())
    return Dataset(archive, "crops of scikit-image's photographs (fallback)", True)


def _fashion_mnist(store: Store, say: Say) -> Dataset | None:
    title = "Fashion-MNIST (60,000 training and 10,000 test images)"
    if (ready := _ready(store, "fashion-mnist")) is not None:
        say(f"data: Fashion-MNIST, from the cache ({ready})")
        return Dataset(ready, title)
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        (f"the system's copy in {INSTALLED_FOLDER}", lambda _: _installed()),
        (f"torchvision's mirror {MIRROR}", lambda folder: _from_mirror(MIRROR, folder)),
        (f"Debian's package {PACKAGE}", lambda folder: unpack_debian(PACKAGE, folder) / ARCHIVE_FOLDER),
    )
    for name, bring in sources:
        with scratch_folder() as folder:
            try:
                files = read_idx_files(bring(folder))
            except HHNetError as error:
                say(f"data: {name}: {error}")
                continue
            say(f"data: Fashion-MNIST, from {name}")
            return Dataset(_archive(store, "fashion-mnist", _fashion_images(files)), title)
    return None


def _installed() -> Path:
    if not INSTALLED_FOLDER.is_dir():
        raise Unavailable("not installed")
    return INSTALLED_FOLDER


def _from_mirror(mirror: str, folder: Path) -> Path:
    for file in FILES:
        download(f"{mirror}{file.name}.gz", folder / f"{file.name}.gz", limit=file.size)
    return folder


# ---------------------------------------------------------------------------------------------------- content


def read_idx_files(folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Read the four files in `folder`; return their content by name, uint8, unpacked and without headers.

    Raises Unavailable if one is missing, DamagedArtifact if its content is not the published one.
    """
    return {file.name: _read_idx(folder / f"{file.name}.gz", file) for file in FILES}


def _read_idx(path: Path, file: IdxFile) -> npt.NDArray[np.uint8]:
    try:
        with gzip.open(path) as stream:
            data = stream.read(file.size + 1)  # never more than the known size, whatever the .gz unpacks to
    except FileNotFoundError:
        raise Unavailable(f"{path.name} is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedArtifact(f"{path.name} is damaged, refused ({error})") from None
    if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedArtifact(f"{path.name} does not match its sha256, refused")
    header = 16 if "idx3" in file.name else 8
    return np.frombuffer(data, np.uint8, offset=header)


def _fashion_images(files: dict[str, npt.NDArray[np.uint8]]) -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    for split, images, labels in (("train", TRAIN_IMAGES, TRAIN_LABELS), ("test", TEST_IMAGES, TEST_LABELS)):
        pixels = files[images.name].reshape(-1, 28, 28)
        seen = [0] * len(CLASSES)
        for image, label in zip(pixels, files[labels.name], strict=True):
            yield f"{split}/{CLASSES[label]}/{seen[label]:05d}.png", image
            seen[label] += 1


def photographs() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
    """Yield (name, pixels) of crops of 32 x 32 pixels; each photograph is a class.

    The last quarter of a photograph's columns are `test` crops, the others `train`. No two crops overlap.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise InputError("scikit-image is not installed: name your own images with --data PATH")
    for name in PHOTOGRAPHS:
        with Image.open(Path(spec.origin).parent / "data" / name) as opened:
            photograph = opened.convert("RGB")
        height = CROP_PIXELS * CROP_ROWS
        width = round(photograph.width * height / photograph.height)
        pixels = np.asarray(photograph.resize((width, height), Image.Resampling.BOX))
        columns = min(width // CROP_PIXELS, 2 * CROP_ROWS)
        border = columns - max(1, columns // 4)
        for split, first, last in (("train", 0, border), ("test", border, columns)):
            places = ((row, column) for row in range(CROP_ROWS) for column in range(first, last))
            for number, (row, column) in enumerate(places):
                top, left = row * CROP_PIXELS, column * CROP_PIXELS
                crop = pixels[top : top + CROP_PIXELS, left : left + CROP_PIXELS]
                yield f"{split}/{Path(name).stem.replace('_', '-')}/{number:05d}.png", crop


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode grey (H, W) or RGB (H, W, 3) pixels as an uncompressed PNG, whose bytes depend on no version of zlib."""
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG", compress_level=0)
    return sink.getvalue()


# ---------------------------------------------------------------------------------------------------- archive


def _ready(store: Store, name: str) -> Path | None:
    """Return the zip in the cache if its sha256 is the one recorded when it was made, else None."""
    archive = Path(store.path(f"{name}.zip"))
    try:
        recorded = store.read(f"{name}.zip.sha256").decode()
        return archive if sha256_of(archive) == recorded.strip() else None
    except (FileNotFoundError, UnicodeDecodeError):  # not there yet, or damaged: it is made again
        return None


def _archive(store: Store, name: str, images: Iterable[tuple[str, npt.NDArray[np.uint8]]]) -> Path:
    if (ready := _ready(store, name)) is not None:
        return ready
    with scratch_folder() as folder:
        path = folder / f"{name}.zip"
        content = list(images)
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
            stage("demo: writing images", len(content), "images") as advance,
        ):
            for member, pixels in content:
                # A fixed date, so that the bytes of the zip depend on the images alone.
                archive.writestr(zipfile.ZipInfo(member, (1980, 1, 1, 0, 0, 0)), png_bytes(pixels))
                advance(1)
        for stale in (f"{name}.zip", f"{name}.zip.sha256"):  # they failed the check above, if they exist
            store.delete(stale)
        store.put_same(f"{name}.zip", path)
        store.put_same(f"{name}.zip.sha256", (sha256_of(path) + "\n").encode())
    return Path(store.path(f"{name}.zip"))


def sample_query(archive: Path) -> str:
    """Write one image of the `test` folder beside the archive, as a query to search with; return its path."""
    with zipfile.ZipFile(archive) as opened:
        first = next(name for name in opened.namelist() if name.startswith("test/"))
        Store(archive.parent).put_same(f"{archive.stem}-query.png", opened.read(first))
    return str(archive.parent / f"{archive.stem}-query.png")
