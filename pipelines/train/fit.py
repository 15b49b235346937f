"""Settings of `train.recipe = auto`: size of the input, batch and epochs, by the images and the CPUs.

A training that was begun keeps the settings that its run recorded, whatever machine goes on with it.
"""

import io
import logging
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.manifest import read_identity
from pipelines.artifacts.runs import read_first_begins
from pipelines.artifacts.words import short_place
from pipelines.cluster.session import ray_address
from pipelines.config.fingerprint import settings_by_kind
from pipelines.config.loading import config_from, merge_trees
from pipelines.config.recipes import AUTO, FITTED, left_open
from pipelines.config.settings import Config
from pipelines.console import NOTICE
from pipelines.errors import format_count
from pipelines.shards.containers import FORMATS
from pipelines.shards.shards import ShardSet, open_shards
from pipelines.storage import Store

_log = logging.getLogger(__name__)

Tree = dict[str, dict[str, Any]]

WORK_PER_CPU = 30_000 * 32**2
"""Work of a training for each CPU in pixels of the input, over all epochs: minutes on two CPUs."""
MOST_CPUS = 16
"""CPUs beyond these make a small network no faster."""
SIDES = (128, 96, 64, 32)
"""Sides of the input in pixels, the largest first."""
FEWEST_EPOCHS, MOST_EPOCHS = 8, 40
ENOUGH_EPOCHS = 16
"""Epochs of every input but the smallest if the work allows FEWEST_EPOCHS; of 1,007 photographs the mAP rose from 0.58
at 8 epochs to 0.70 at 16."""
SMALL_SET, SMALL_BATCH, BATCH = 4000, 32, 64
"""Below SMALL_SET training images a batch has SMALL_BATCH images, else BATCH."""
USUAL_STRIDE = 4
"""Stride of the stem that WORK_PER_CPU was measured with."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices of the drivers of Nvidia and AMD, and of both below Windows."""
HEADERS_READ = 64
"""Number of images whose size is looked at, approximately."""


def auto_if_unsaid(config: Config, out: str) -> Config:
    """Return the settings with `train.recipe = auto` if there is no GPU and they name none that changes a model.

    Those that the recipe would choose may be named; then it keeps them. A training at `out` that was begun with this
    recipe goes on with it, with a GPU too.
    """
    said = {f"{name}.{key}" for name in ("data", "model", "train") for key in getattr(config, name).model_fields_set}
    if (said - {*FITTED}) & {"train.recipe", *settings_by_kind(Config)["model"]}:
        return config
    if _recorded(Store(out)) is None and (ray_address(config) != "local" or has_gpu()):
        return config
    return config_from(merge_trees(config.model_dump(exclude_unset=True), {"train": {"recipe": AUTO}}))


def name_defaults(config: Config) -> None:
    """Say on a machine without a GPU that the size of the input is a default, which nobody chose for this machine."""
    if config.train.recipe or "image_size" in config.data.model_fields_set or ray_address(config) != "local":
        return
    if not has_gpu():
        usual = f"image_size {config.data.image_size}, {format_count(config.train.epochs, 'epoch')}"
        _log.log(NOTICE, "%s: --recipe auto would keep your settings and fit the others to this machine", usual)


def has_gpu() -> bool:
    """Tell whether torch can use a GPU. Where Linux has no device of one, the answer needs no import of torch."""
    if sys.platform == "linux" and not any(Path(device).exists() for device in GPU_DEVICES):
        return False
    import torch  # takes seconds, in which the user sees nothing

    return torch.cuda.is_available()


def fit_to_images(shards: str, out: str, config: Config) -> Config:
    """Return the settings with those that `train.recipe = auto` chooses, and say them. The user's own ones stay.

    They are those that the run at `out` recorded, if it was begun; else they fit the shards and this machine's CPUs.
    """
    tree = _recorded(Store(out))
    why = f"as the training at {short_place(out)} began"
    if tree is None:
        found, cpus = open_shards(shards), config.ray.cpus or allowed_cpus()
        tree = choose_settings(config, found.samples, usual_side(_some_images(found)), cpus)
        why = f"for {format_count(found.samples, 'image')} on {format_count(cpus, 'CPU')}, to take minutes"
    left = left_open(config)
    config = config_from(merge_trees(tree, config.model_dump(exclude_unset=True)))
    size, batch, epochs = (
        text if name in left else f"{text} (yours)"
        for name, text in (
            ("data.image_size", f"image_size {config.data.image_size}"),
            ("data.batch_size", f"batch {config.data.batch_size}"),
            ("train.epochs", format_count(config.train.epochs, "epoch")),
        )
    )
    _log.log(NOTICE, "recipe auto %s: %s, %s, %s, %s", why, size, config.model.backbone, batch, epochs)
    return config


def _recorded(store: Store) -> Tree | None:
    """Return what this recipe chose for the training that was begun at a root; None if there is none."""
    try:
        kind, mark = read_identity(store)
    except FileNotFoundError:
        return None
    for begun in read_first_begins(store) if kind == "model" else ():
        if begun.get("fingerprint") == mark and begun.get("recipe") == AUTO:
            data, train = begun["settings"]["data"], begun["settings"]["train"]
            chosen = {"image_size": data["image_size"], "batch_size": data["batch_size"]}
            return {"data": chosen, "train": {"epochs": train["epochs"]}}
    return None


def choose_settings(config: Config, images: int, side: int, cpus: int) -> Tree:
    """Return settings for `images` images of about `side` pixels that train for minutes on so many CPUs.

    The input is the largest that the images fill and that leaves time for FEWEST_EPOCHS epochs, else the smallest; if
    the user set its size, that one. A larger input than the smallest gets ENOUGH_EPOCHS epochs if it has time for
    FEWEST_EPOCHS.
    """
    work = WORK_PER_CPU * min(cpus, MOST_CPUS)
    said = "image_size" in config.data.model_fields_set
    sizes = [config.data.image_size] if said else [one for one in SIDES if one <= max(side * 4 // 3, SIDES[-1])]
    for size in sizes:
        epochs = int(work / (max(images, 1) * (size * USUAL_STRIDE / config.model.stem_stride) ** 2))
        if epochs >= FEWEST_EPOCHS:
            epochs = max(epochs, ENOUGH_EPOCHS) if size > SIDES[-1] else epochs
            break
    batch = SMALL_BATCH if images < SMALL_SET else BATCH
    return {"data": {"image_size": size, "batch_size": batch}, "train": {"epochs": min(max(epochs, 1), MOST_EPOCHS)}}


def _some_images(found: ShardSet) -> Iterator[BinaryIO]:
    """Yield about HEADERS_READ images, spread over all shards."""
    step = max(1, found.samples // HEADERS_READ)
    first = 0
    for shard in found.shards:
        rows = list(range(first, shard.rows, step))
        first = first + step * len(rows) - shard.rows
        if rows:
            yield from (io.BytesIO(sample.image) for sample in found.read(shard, rows))


def usual_side(files: Iterable[Path | BinaryIO]) -> int:
    """Return the median of the images' shorter sides, in pixels; the smallest input if no header can be read."""
    sides = [side for file in files if (side := _shorter_side(file))]
    return round(statistics.median(sides)) if sides else SIDES[-1]


def _shorter_side(file: Path | BinaryIO) -> int | None:
    """Return the shorter side from an image's header, or None if it cannot be read. Only `encode` rejects images."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return min(image.size)
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
