"""Input of training: the choice of samples that train and that validate, and the batches of an epoch.

An epoch is a pure function of (seed, epoch, shard index, number of workers): a position in it is one integer. If a
training goes on with another number of workers, a new leg of the epoch deals out the samples that earlier legs left.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hhnet.augment import Augment, sample_rng, trivial_augment
from hhnet.nn.model import Preprocess
from pipelines.artifacts.tables import class_ids_in
from pipelines.config.settings import Config
from pipelines.errors import InputError, format_count
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.images import decode_ahead, decode_image, decode_square
from pipelines.shards.plan import batch_sizes, epoch_spans, mix_sources
from pipelines.shards.shards import Sample, ShardSet
from pipelines.storage import batched
from pipelines.train.learner import Batch

_log = logging.getLogger(__name__)

T = TypeVar("T")
View = Callable[[npt.NDArray[np.uint8], np.random.Generator], npt.NDArray[np.uint8]]
"""A training augmentation, from the pixels that `decoding_of` makes to a square (S, S, 3)."""

QUERY_SHARE = 0.2
"""Share of the validation samples that are queries; they are searched in the others."""

SMALL_SIDE = 64
"""Side of the network's input in pixels up to which an image is a small one, which is not cut but padded."""
CHUNK_SAMPLES = 16
"""Number of samples that a thread prepares at once: a small image takes less time to prepare than to hand over."""


def preprocess_of(config: Config) -> Preprocess:
    """Return the configured preprocessing from pixels to tensors.

    If `data.resize` is not set, it is the image size up to 64 pixels, and 256/224 of the image size above.
    """
    # 256 and 224 are the usual sizes for ImageNet.
    size = config.data.image_size
    resize = config.data.resize or (size if size <= SMALL_SIDE else round(size * 256 / 224))
    return Preprocess(size=size, resize=resize, decode=config.data.decode)


def decoding_of(config: Config) -> Callable[[bytes], npt.NDArray[np.uint8]]:
    """Return the decoding of a training image, as far as it is the same in all epochs.

    It makes the square that `encode` makes, (S, S, 3), or the whole image if a view is a random window of the image.
    """
    if _strong_kind(config) == "resized_crop":
        return partial(decode_image, least_side=least_side_of(config))
    preprocess = preprocess_of(config)
    return lambda data: decode_square(data, preprocess)[0]


def views_of(config: Config, views: int) -> list[View]:
    """Return the augmentation of each view: the configured one and, before it if there are two, a weak one (flip)."""
    *weak, strong = (_view(config, augment) for augment in augments_of(config, views))
    if config.data.policy == "trivial":
        return [*weak, lambda pixels, rng: trivial_augment(strong(pixels, rng), rng)]
    return [*weak, strong]


def augments_of(config: Config, views: int) -> list[Augment]:
    """Return the crop and mirror image of each view."""
    size, strong = config.data.image_size, _strong_kind(config)
    weak = Augment(size=size, kind="none") if strong == "none" else _flip(size)
    return [weak, _flip(size) if strong == "flip" else Augment(size=size, kind=strong)][-views:]


def least_side_of(config: Config) -> int:
    """Return the length that the shorter side of a JPEG keeps when it is decoded at a smaller scale; 0 = no such scale.

    All views are cut from one decoding, and a random window is a part of the image. So that both sides of the smallest
    window keep twice the length they are resampled to, "resized_crop" needs about twice the side that the centre does.
    """
    preprocess = preprocess_of(config)
    if config.data.decode == "exact" or _strong_kind(config) != "resized_crop":
        return preprocess.least_side
    return max(preprocess.least_side, Augment(size=preprocess.size, kind="resized_crop").least_side)


def _strong_kind(config: Config) -> str:
    if config.data.augment == "auto":
        return "crop_flip" if config.data.image_size <= SMALL_SIDE else "resized_crop"
    return config.data.augment


def _flip(size: int) -> Augment:
    # A crop without padding has no room to move, so only its flip is left.
    return Augment(size=size, kind="crop_flip", padding=0)


def _view(config: Config, augment: Augment) -> View:
    if augment.kind == "resized_crop" or _strong_kind(config) != "resized_crop":
        return augment
    preprocess = preprocess_of(config)  # the weak view of a whole image
    return lambda pixels, rng: augment(preprocess.resize_crop(pixels), rng)


@dataclass(frozen=True)
class TrainData:
    """The rows that train and those that validate. `rows[s]` are the training rows of shard s."""

    train: ShardSet
    rows: tuple[npt.NDArray[np.int64], ...]
    val: ShardSet
    val_rows: tuple[tuple[int, int], ...]
    """(shard, row) of the validation samples, queries first."""
    queries: int

    @classmethod
    def make(cls, train_set: ShardSet, val_set: ShardSet | None, config: Config) -> "TrainData":
        """Split off the validation samples. Raises InputError if too little is left to train or to validate on."""
        if not train_set.classes:
            remedy = "ingest a folder of class folders or a table with labels, or encode these with another model"
            raise InputError(f"{train_set.artifact.uri}: no image has a label to learn from: {remedy}")
        source = val_set or train_set
        order = np.argsort(_draws(source, config.train.seed), kind="stable")
        total = len(order)
        held_out = order if val_set else order[: round(config.train.val_share * total)]
        chosen = _places(source, held_out[: config.train.val_limit])
        if len(train_set.classes) == 1:
            problem = f"all images are of the class {train_set.classes[0]}, so there is nothing to tell apart"
            raise InputError(f"{train_set.artifact.uri}: {problem}: add images of another class")
        if len(chosen) < 2:
            raise InputError(_too_few(total, len(chosen), val_set, train_set, config))
        if val_set and not set(val_set.classes) <= set(train_set.classes):
            used = class_ids_in(shard.table()["labels"] for shard in val_set.shards)
            unknown = sorted({name for n, name in enumerate(val_set.classes) if n in used} - set(train_set.classes))
            if unknown:
                problem = f"has classes the training shards lack: {', '.join(unknown[:5])}"
                raise InputError(f"{val_set.artifact.uri} {problem}: validate on shards of the same classes")
        trains = np.ones(sum(shard.rows for shard in train_set.shards), np.bool_)
        if not val_set:
            trains[held_out] = False
        ends = np.cumsum([shard.rows for shard in train_set.shards])[:-1]
        rows = tuple(np.flatnonzero(part) for part in np.split(trains, ends))
        queries = max(1, round(QUERY_SHARE * len(chosen)))
        data = cls(train_set, rows, source, chosen, queries)
        epoch_leg(data, config, 0, (), config.train.workers)  # for its error: too few samples for the workers
        return data

    @property
    def samples(self) -> int:
        """Number of training samples in an epoch."""
        return sum(len(rows) for rows in self.rows)

    def epoch_steps(self, config: Config) -> int:
        """Return the number of optimiser steps in an epoch."""
        return -(-self.samples // config.data.batch_size)

    def total_steps(self, config: Config) -> int:
        """Return the number of optimiser steps in the whole training."""
        return config.train.epochs * self.epoch_steps(config)

    def val_bytes(self, config: Config, world: int) -> int:
        """Return how much of `data.cache` each of `world` workers uses for the squares that it validates on.

        It is 0 if they take more than half of it: then each validation decodes them.
        """
        size = -(-len(self.val_rows) // world) * 3 * config.data.image_size**2
        return size if size <= config.data.cache // 2 else 0


def _draws(shards: ShardSet, seed: int) -> npt.NDArray[np.bytes_]:
    """Draw 16 bytes for each sample from its key and the seed, so that its draw stays when others come or go."""

    def drawn(key: str) -> bytes:
        return hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()

    parts = [np.array(list(map(drawn, shard.table()["key"].to_pylist())), "S16") for shard in shards.shards]
    return np.concatenate([np.empty(0, "S16"), *parts])


def _places(shards: ShardSet, numbers: npt.NDArray[np.int64]) -> tuple[tuple[int, int], ...]:
    """Return (shard, row) of each sample number; numbers count through all shards."""
    ends = np.cumsum([shard.rows for shard in shards.shards])
    found = np.searchsorted(ends, numbers, side="right")
    first = numbers - (ends[found] - np.array([shards.shards[s].rows for s in found], np.int64))
    return tuple(zip(found.tolist(), first.tolist(), strict=True))


@dataclass(frozen=True)
class DecodedSample:
    """A sample and its pixels from `decoding_of`, uint8 (H, W, 3), or None if it did not decode."""

    key: str
    shard: str
    row: int
    labels: tuple[int, ...]
    pixels: npt.NDArray[np.uint8] | None
    number: int | None = None
    """Number of its square on a GPU, which has the pixels then."""

    @property
    def is_image(self) -> bool:
        """Whether the sample did decode."""
        return self.pixels is not None or self.number is not None


class DecodedCache:
    """Decoded samples, up to `limit` bytes of pixels, so that later epochs need neither read nor decode them."""

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._held: dict[tuple[str, int], DecodedSample] = {}

    def get(self, shard: str, row: int) -> DecodedSample | None:
        """Return the sample at a row of a shard, or None if it is not held."""
        return self._held.get((shard, row))

    def keep(self, sample: DecodedSample) -> None:
        """Hold a sample if it fits into the bytes that are left."""
        size = 0 if sample.pixels is None else sample.pixels.nbytes
        if size <= self._left and (sample.shard, sample.row) not in self._held:
            self._held[sample.shard, sample.row] = sample
            self._left -= size


@dataclass(frozen=True)
class Leg:
    """The part of an epoch that is trained with one number of workers: the rows of each shard, and the steps.

    An epoch is one leg unless the number of workers changes in it.
    """

    data: TrainData
    config: Config
    epoch: int
    number: int
    rows: tuple[npt.NDArray[np.int64], ...]
    steps: int
    world: int

    def batch_sizes(self, rank: int) -> list[int]:
        """Return the number of samples that `rank` takes in each step."""
        return batch_sizes(sum(map(len, self.rows)), self.steps, self.world, rank)

    def samples(self, rank: int, cache: DecodedCache) -> Iterator[Sample | DecodedSample]:
        """Yield the samples of `rank` in training order, decoded if `cache` holds all that are read together."""
        train = self.data.train

        def read(number: int, rows: npt.NDArray[np.int64]) -> Iterable[Sample | DecodedSample]:
            shard, places = train.shards[number], rows.tolist()
            held = [sample for row in places if (sample := cache.get(shard.name, row))]
            return held if len(held) == len(places) else train.read(shard, places)

        return self._ordered(rank, read)

    def rows_after(self, steps: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Return the rows that no worker has been given after `steps` steps."""
        given = [np.zeros(rows.max(initial=-1) + 1, np.bool_) for rows in self.rows]
        for rank in range(self.world):
            places = self._ordered(rank, lambda shard, rows: ((shard, int(row)) for row in rows))
            for shard, row in islice(places, sum(self.batch_sizes(rank)[:steps])):
                given[shard][row] = True
        return tuple(rows[~taken[rows]] for rows, taken in zip(self.rows, given, strict=True))

    def _ordered(self, rank: int, read: Callable[[int, npt.NDArray[np.int64]], Iterable[T]]) -> Iterator[T]:
        """Yield the results of `read` for the spans of `rank` in training order, which does not depend on `read`."""
        seed, data = self.config.train.seed, self.config.data
        spans = epoch_spans(self.rows, seed, self.epoch, self.world, rank)
        sources = (lambda shard=shard, rows=rows: iter(read(shard, rows)) for shard, rows in spans)
        # Only later legs have their number in the key: an epoch without a change of workers needs none.
        key = (seed, self.epoch, self.world, rank, *([self.number] if self.number else []))
        return mix_sources(sources, data.interleave, data.shuffle_buffer, key)


def epoch_leg(data: TrainData, config: Config, epoch: int, before: Iterable[Sequence[int]], world: int) -> Leg:
    """Return the leg of `world` workers in `epoch` after the legs `before`, each given as (workers, steps).

    Raises InputError if too few samples are left for so many workers.
    """
    leg = Leg(data, config, epoch, 0, data.rows, data.epoch_steps(config), world)
    for workers, steps in before:
        earlier = replace(leg, world=workers)
        leg = replace(leg, number=leg.number + 1, rows=earlier.rows_after(steps), steps=leg.steps - steps)
    if min((size for rank in range(world) for size in leg.batch_sizes(rank)), default=0) < 2:
        samples, needed = sum(map(len, leg.rows)), f"{world} workers and data.batch_size = {config.data.batch_size}"
        remedy = "each worker needs 2 samples a step, so lower train.workers or add images"
        raise InputError(f"{samples} training samples are too few for {needed}: {remedy}")
    return leg


def epoch_batches(
    leg: Leg, first: int, rank: int, views: int = 1, cache: DecodedCache | None = None
) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, number of samples that did not decode) for each step of `rank` in `leg`, from step `first` on.

    The views of a sample (see `views_of`) stand side by side in a batch. Decoded samples are kept in `cache`. Raises
    InputError if fewer than two samples of a batch decode.
    """
    config, augments = leg.config, views_of(leg.config, views)

    def augmented(sample: DecodedSample, rng: np.random.Generator) -> list[npt.NDArray[np.uint8]]:
        assert sample.pixels is not None, "what did not decode has no views"
        return [augment(sample.pixels, rng) for augment in augments]

    for good, bad in decoded_steps(leg, first, rank, cache or DecodedCache(0), augmented):
        squares = np.stack([square for _, made in good for square in made])
        batch = Batch(squares, *labels_and_keys(leg, [sample for sample, _ in good], views))
        yield soften_labels(batch, config, leg.epoch, views), bad


def decoded_steps(
    leg: Leg, first: int, rank: int, cache: DecodedCache, make: Callable[[DecodedSample, np.random.Generator], T]
) -> Iterator[tuple[list[tuple[DecodedSample, T]], int]]:
    """Yield, for each step, what `make` returns of the decoded samples and how many samples did not decode.

    `make` gets the random generator of the sample in this epoch, and runs in several threads.
    """
    config, sizes = leg.config, leg.batch_sizes(rank)
    samples = islice(leg.samples(rank, cache), sum(sizes[:first]), None)
    decode = decoding_of(config)

    def prepare(chunk: list[Sample | DecodedSample]) -> list[tuple[DecodedSample, T | None]]:
        decoded = [sample if isinstance(sample, DecodedSample) else _decode(sample, cache, decode) for sample in chunk]
        rngs = (sample_rng(config.train.seed, leg.epoch, sample.key) for sample in decoded)
        return [
            (sample, make(sample, rng) if sample.is_image else None) for sample, rng in zip(decoded, rngs, strict=True)
        ]

    # Two batches ahead: one that the network takes next, and one that is being decoded.
    ahead = -(-2 * max(sizes) // CHUNK_SAMPLES)
    chunks = decode_ahead(batched(samples, CHUNK_SAMPLES), prepare, config.data.workers, ahead)
    ready = chain.from_iterable(chunks)
    for size in sizes[first:]:
        taken = list(islice(ready, size))
        good = [(sample, made) for sample, made in taken if made is not None]
        for sample, _ in taken:
            cache.keep(sample)
        if len(good) < 2:
            bad = next(sample for sample, made in taken if made is None)
            remedy = "check the shards with `hhnet verify`, or raise data.batch_size"
            raise InputError(f"{bad.shard}: too few images of a batch decode (first bad one: {bad.key}): {remedy}")
        yield good, len(taken) - len(good)


def labels_and_keys(leg: Leg, samples: Sequence[DecodedSample], views: int) -> tuple[npt.NDArray[np.bool_], list[str]]:
    """Return the multi-hot labels (views * samples, C) and the keys of a batch."""
    labels = np.zeros((len(samples), len(leg.data.train.classes)), dtype=np.bool_)
    for place, sample in enumerate(samples):
        labels[place, list(sample.labels)] = True
    return labels.repeat(views, 0), [sample.key for sample in samples for _ in range(views)]


def soften_labels(batch: Batch, config: Config, epoch: int, views: int) -> Batch:
    """Return the batch after `train.mixup` and `train.label_smoothing`."""
    shares = draw_shares(batch.keys, config, epoch)
    squares = torch.as_tensor(batch.squares)
    if shares is not None:
        squares = blend_squares(squares, torch.from_numpy(shares), views)
    return Batch(squares.numpy(), blend_labels(batch.labels, shares, config, views), batch.keys)


def draw_shares(keys: Sequence[str], config: Config, epoch: int) -> npt.NDArray[np.float32] | None:
    """Draw the share that each image keeps of itself in mixup, float32 (B,); None without mixup.

    Mixup (Zhang et al. 2018) blends each sample with the next one of the batch, and the last with the first. The share
    of the sample itself is drawn from Beta(alpha, alpha) by a generator seeded with its key, like its augmentation. All
    views of a sample are blended with the same share, each with the same view of the other sample.
    """
    alpha = config.train.mixup
    if not alpha:
        return None
    rngs = (sample_rng(config.train.seed, epoch, f"{key}\0mixup") for key in keys)
    return np.array([rng.beta(alpha, alpha) for rng in rngs], np.float32)


def blend_squares(squares: Tensor, shares: Tensor, views: int) -> Tensor:
    """Blend each image, uint8 (B, S, S, 3), with the same view of the next sample."""
    kept = shares[:, None, None, None]
    return (kept * squares + (1 - kept) * squares.roll(-views, 0)).round().to(torch.uint8)


def blend_labels(
    labels: npt.NDArray[np.bool_ | np.float32], shares: npt.NDArray[np.float32] | None, config: Config, views: int
) -> npt.NDArray[np.bool_ | np.float32]:
    """Blend the labels like the images, and spread a share of them evenly over all classes: float32 (B, C).

    The second is label smoothing (Szegedy et al. 2016). Without either the labels stay as they are.
    """
    smoothing = config.train.label_smoothing
    if shares is None and not smoothing:
        return labels
    soft: npt.NDArray[np.float32] = labels.astype(np.float32)
    if shares is not None:
        soft = shares[:, None] * soft + (1 - shares[:, None]) * np.roll(soft, -views, 0)
    smooth: npt.NDArray[np.float32] = (1 - smoothing) * soft + smoothing * soft.sum(1, keepdims=True) / soft.shape[1]
    return smooth


def _decode(sample: Sample, cache: DecodedCache, decode: Callable[[bytes], npt.NDArray[np.uint8]]) -> DecodedSample:
    record = sample.record
    if (held := cache.get(record.shard, record.row)) is not None:
        return held
    pixels, problem = None, sample.damage
    if problem is None:
        try:
            pixels = decode(sample.image)
        except ImageReject as reject:
            problem = f"{reject.reason}: {reject.detail}"
    if problem is not None:
        fields = {"shard": record.shard, "key": record.key, "problem": problem}
        _log.debug("left out: %(key)s of %(shard)s (%(problem)s)", fields, extra=fields)
    return DecodedSample(record.key, record.shard, record.row, record.labels, pixels)


def _too_few(samples: int, chosen: int, val_set: ShardSet | None, train_set: ShardSet, config: Config) -> str:
    """Return the message that there are too few samples to validate on, with the number needed."""
    uri, needed = (val_set or train_set).artifact.uri, "validation needs a query and one sample to find, 2 at least"
    if val_set:
        return f"{uri} has {format_count(samples, 'sample')}: {needed}"
    return (
        f"{uri} has {format_count(samples, 'sample')}, of which train.val_share={config.train.val_share:g} and "
        f"train.val_limit={config.train.val_limit} leave {chosen} to validate on: {needed}; add images, give --val or "
        "raise train.val_share"
    )
