"""What training reads: which samples train and which validate, and the batches of an epoch.

An epoch is a pure function of (seed, epoch, shard index, number of workers): a position in it is one integer.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from hhnet.augment import Augment, sample_rng
from hhnet.model import Preprocess
from pipelines.config import Config
from pipelines.errors import InputError
from pipelines.images import ImageReject, decode_ahead, decode_image
from pipelines.learning.learner import Batch
from pipelines.shards import Sample, ShardSet, batch_sizes, epoch_spans, mixed

QUERY_SHARE = 0.2
"""Share of the validation samples that are queries; the others are what they are searched in."""


def preprocess_of(config: Config) -> Preprocess:
    """The configured way from pixels to tensors."""
    size = config.data.image_size
    return Preprocess(size=size, resize=config.data.resize or (size if size <= 64 else round(size * 256 / 224)))


def augment_of(config: Config) -> Callable[[npt.NDArray[np.uint8], np.random.Generator], npt.NDArray[np.uint8]]:
    """The configured training augmentation, from decoded pixels (H, W, 3) to a square (S, S, 3)."""
    size, kind = config.data.image_size, config.data.augment
    if kind == "auto":
        kind = "crop_flip" if size <= 64 else "resized_crop"
    # A flip is a crop that has no room to move.
    augment = Augment(size=size, kind="crop_flip", padding=0) if kind == "flip" else Augment(size=size, kind=kind)
    if kind == "resized_crop":
        return augment
    preprocess = preprocess_of(config)
    return lambda pixels, rng: augment(preprocess.resize_crop(pixels), rng)


@dataclass(frozen=True)
class TrainData:
    """Which rows train and which validate. `rows[s]` are the training rows of shard s."""

    train: ShardSet
    rows: tuple[npt.NDArray[np.int64], ...]
    val: ShardSet
    val_rows: tuple[tuple[int, int], ...]
    """(shard, row) of the validation samples, queries first."""
    queries: int

    @classmethod
    def make(cls, train_set: ShardSet, val_set: ShardSet | None, config: Config) -> "TrainData":
        """Split off the validation samples; InputError where there is too little to train or to validate on."""
        places = [(s, row) for s, shard in enumerate((val_set or train_set).shards) for row in range(shard.rows)]
        keys = [key for shard in (val_set or train_set).shards for key in shard.table["key"].to_pylist()]
        order = sorted(range(len(keys)), key=lambda i: _draw(config.train.seed, keys[i]))
        share = len(keys) if val_set else round(config.train.val_share * len(keys))
        held_out = [places[i] for i in order[:share]]
        chosen = held_out[: config.train.val_limit]
        if len(chosen) < 2:
            raise InputError(f"{len(chosen)} validation samples are too few: give --val, or raise train.val_share")
        if val_set and not set(val_set.classes) <= set(train_set.classes):
            unknown = sorted(set(val_set.classes) - set(train_set.classes))
            raise InputError(f"{val_set.artifact.uri} has classes the training shards lack: {', '.join(unknown[:5])}")
        held = set() if val_set else set(held_out)
        rows = tuple(
            np.array([row for row in range(shard.rows) if (s, row) not in held], dtype=np.int64)
            for s, shard in enumerate(train_set.shards)
        )
        queries = max(1, round(QUERY_SHARE * len(chosen)))
        data = cls(train_set, rows, val_set or train_set, tuple(chosen), queries)
        world = config.train.workers
        sizes = [size for rank in range(world) for size in data.batch_sizes(config, world, rank)]
        if min(sizes, default=0) < 2:
            raise InputError(
                f"{data.samples} training samples are too few for {world} workers and data.batch_size = "
                f"{config.data.batch_size}: each worker needs 2 samples a step"
            )
        return data

    @property
    def samples(self) -> int:
        """Training samples in an epoch."""
        return sum(len(rows) for rows in self.rows)

    def batch_sizes(self, config: Config, world: int, rank: int) -> list[int]:
        """Samples of `rank` in each step of an epoch."""
        return batch_sizes(self.samples, config.data.batch_size, world, rank)

    def total_steps(self, config: Config) -> int:
        """Optimiser steps of the whole training."""
        return config.train.epochs * -(-self.samples // config.data.batch_size)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()


def epoch_samples(data: TrainData, config: Config, epoch: int, world: int, rank: int) -> Iterator[Sample]:
    """The samples of `rank` in `epoch`, undecoded, in training order."""
    seed = config.train.seed
    spans = epoch_spans(data.rows, seed, epoch, world, rank)
    sources = (
        lambda shard=shard, rows=rows: data.train.read(data.train.shards[shard], rows.tolist()) for shard, rows in spans
    )
    return mixed(sources, config.data.interleave, config.data.shuffle_buffer, (seed, epoch, world, rank))


def epoch_batches(
    data: TrainData, config: Config, epoch: int, first: int, world: int, rank: int
) -> Iterator[tuple[Batch, int]]:
    """(batch, samples that did not decode) for each step of `epoch` from step `first` on."""
    sizes = data.batch_sizes(config, world, rank)
    samples = islice(epoch_samples(data, config, epoch, world, rank), sum(sizes[:first]), None)
    augment = augment_of(config)
    classes = len(data.train.classes)

    def prepare(sample: Sample) -> tuple[Sample, npt.NDArray[np.uint8] | None]:
        if sample.damage is not None:
            return sample, None
        try:
            pixels = decode_image(sample.image)
        except ImageReject:
            return sample, None
        return sample, augment(pixels, sample_rng(config.train.seed, epoch, sample.record.key))

    ready = decode_ahead(samples, prepare, config.data.workers, 2 * max(sizes))
    for size in sizes[first:]:
        taken = list(islice(ready, size))
        good = [(sample, square) for sample, square in taken if square is not None]
        if len(good) < 2:
            bad = next(sample.record for sample, square in taken if square is None)
            raise InputError(f"{bad.shard}: too few images of a batch decode (first bad one: {bad.key})")
        labels = np.zeros((len(good), classes), dtype=np.bool_)
        for place, (sample, _) in enumerate(good):
            labels[place, list(sample.record.labels)] = True
        squares = np.stack([square for _, square in good])
        yield Batch(squares, labels, [sample.record.key for sample, _ in good]), len(taken) - len(good)
