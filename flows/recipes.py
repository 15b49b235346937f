"""Training settings of `hhnet demo`: the recipe in demo.toml, fitted to the number and size of other images."""

import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.shards.containers import FORMATS, SUFFIXES

RECIPE = Path(__file__).parent / "demo.toml"
RECIPE_IMAGES = 60_000
"""Number of training images that the recipe was made for (Fashion-MNIST)."""
HEADERS_READ = 64
"""Number of images whose size is looked at, approximately."""
IMAGE_SIDES = (128, 96, 64, 32)
"""Sides of the input in pixels, the largest first."""
TRAIN_SHARE = 0.8
"""Share of the user's images that train; the others are queries."""
FEWEST_EPOCHS, MOST_EPOCHS = 8, 40
SMALL_SET, SMALL_BATCH = 4000, 32
"""Below SMALL_SET training images a batch has SMALL_BATCH images."""


@dataclass(frozen=True)
class Probe:
    """Facts on a set of images: their number, the median of the shorter side in pixels, and one of the files."""

    images: int
    side: int
    example: Path | None = None


def demo_recipe() -> Config:
    """Return the settings of demo.toml."""
    return load_config(RECIPE)


def probe_images(folder: str) -> Probe:
    """Count the images below `folder` and read the headers of some. Raises InputError if there are none."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: --data wants a folder that holds one folder per class")
    found = sorted(_images(root))
    if not found:
        raise InputError(f"{root} holds no images ({', '.join(SUFFIXES)}): --data wants one folder per class")
    sides = [side for path in found[:: max(1, len(found) // HEADERS_READ)] if (side := _side(path))]
    return Probe(len(found), round(statistics.median(sides)) if sides else IMAGE_SIDES[-1], found[0])


def _images(root: Path) -> Iterator[Path]:
    for place, _, names in os.walk(root):
        yield from (Path(place, name) for name in names if name.lower().endswith(SUFFIXES))


def _side(path: Path) -> int | None:
    """Return the shorter side from the file's header, or None if it cannot be read. Only `encode` rejects images."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return min(image.size)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None


def fit_recipe(recipe: Config, images: int, side: int) -> dict[str, Any]:
    """Return settings for `images` training images of about `side` pixels that train about as long as the recipe.

    The input is the largest that the images fill and that leaves time for FEWEST_EPOCHS epochs, else the smallest.
    """
    work = RECIPE_IMAGES * recipe.train.epochs * _cost(recipe.data.image_size, recipe.model.stem_stride)
    for size in [size for size in IMAGE_SIDES if size <= max(side * 4 // 3, IMAGE_SIDES[-1])]:
        stride = _stem_stride(recipe, size)
        epochs = int(work / (max(images, 1) * _cost(size, stride)))
        if epochs >= FEWEST_EPOCHS:
            break
    return {
        "data.image_size": size,
        "data.batch_size": SMALL_BATCH if images < SMALL_SET else recipe.data.batch_size,
        "model.stem_stride": stride,
        "train.epochs": min(max(epochs, 1), MOST_EPOCHS),
    }


def _stem_stride(recipe: Config, size: int) -> int:
    """Return the stride of the stem: the recipe's at its size, twice that up to double the size, and 4 above."""
    if size <= recipe.data.image_size:
        return recipe.model.stem_stride
    return min(4, 2 * recipe.model.stem_stride) if size <= 2 * recipe.data.image_size else 4


def _cost(size: int, stride: int) -> float:
    """Return the work for an image, up to a constant factor: the number of pixels behind the stem."""
    return (size / stride) ** 2
