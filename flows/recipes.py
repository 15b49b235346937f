"""Settings of `hhnet demo`: those of demo.toml for Fashion-MNIST, the recipe `auto` for other images."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config.loading import config_from, load_config, load_tree, merge_trees, read_toml
from pipelines.config.settings import Config
from pipelines.errors import InputError
from pipelines.shards.containers import SUFFIXES
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_image
from pipelines.train.fit import HEADERS_READ, usual_side

RECIPE = Path(__file__).parent / "demo.toml"
TRAIN_SHARE = 0.8
"""Share of the user's images that train; the others are queries."""
EXAMPLES_TRIED = 20
"""Images of which the first readable one is the demo's example of a search."""
REJECT_BUDGET = 0.1
"""Share of the user's images that may be unreadable before their demo ends: few of them must not cost a training."""


@dataclass(frozen=True)
class Probe:
    """Facts on a set of images: their number, the median of the shorter side in pixels, and one of the files."""

    images: int
    side: int
    example: Path | None = None


def demo_recipe() -> Config:
    """Return the settings of demo.toml."""
    return load_config(RECIPE)


def demo_settings(flags: Mapping[str, Any], file: Path | None, sets: Iterable[str], out: str) -> Config:
    """Return the settings for the images that `flags` describe, changed by those of the user: a file, then `sets`.

    If `flags` name a recipe, it takes the place of what demo.toml says on data, model and training.
    """
    base = read_toml(RECIPE)
    if "train.recipe" in flags:
        base = {name: section for name, section in base.items() if name not in ("data", "model", "train")}
    tree = merge_trees(load_tree(base, (), flags), load_tree(file))
    return config_from(load_tree(tree, sets, {"run.out": out}))


def probe_images(folder: str) -> Probe:
    """Count the images below `folder` and read the headers of some. Raises InputError if there are none."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}: --data wants a folder that holds one folder per class")
    found = sorted(_images(root))
    if not found:
        raise InputError(f"{root} holds no images ({', '.join(SUFFIXES)}): --data wants one folder per class")
    if all(path.parent == root for path in found):
        raise InputError(f"{root} holds no folders of classes, and training needs classes: sort its images into some")
    example = next((path for path in found[:EXAMPLES_TRIED] if _is_readable(path)), found[0])
    return Probe(len(found), usual_side(found[:: max(1, len(found) // HEADERS_READ)]), example)


def _is_readable(path: Path) -> bool:
    try:
        decode_image(path.read_bytes())
    except (OSError, ImageReject):
        return False
    return True


def _images(root: Path) -> Iterator[Path]:
    for place, _, names in os.walk(root):
        yield from (Path(place, name) for name in names if name.lower().endswith(SUFFIXES))
