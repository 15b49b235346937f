"""The batches of a training from a position on, made in this process or, beside a GPU, in one of their own.

A GPU is kept busy by the thread that launches its work, and that thread needs the interpreter lock for each launch.
Threads that decode in the same process take it away: on an H200, HRNet-W18-small at 32 pixels went from 12,000 to 4,000
images a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from pipelines.config.settings import Config
from pipelines.errors import HHNetError
from pipelines.shards.shards import open_shards
from pipelines.train.batches import DecodedCache, TrainData, epoch_batches, epoch_leg
from pipelines.train.learner import Batch

AHEAD = 8
"""Batches that wait for the GPU."""


@dataclass(frozen=True)
class Position:
    """Where `rank` of `world` stands: the epoch, and its legs up to now as (workers, steps), the present one last."""

    rank: int
    world: int
    views: int
    epoch: int
    legs: Sequence[tuple[int, int]]


def batches(data: TrainData, config: Config, position: Position) -> Iterator[tuple[Batch, int]]:
    """(batch, samples that did not decode) for each step from `position` to the end of the training."""
    cache = DecodedCache(config.data.cache)
    epoch, legs, world = position.epoch, position.legs, position.world
    while epoch < config.train.epochs:
        leg = epoch_leg(data, config, epoch, legs[:-1], world)
        yield from epoch_batches(leg, legs[-1][1], position.rank, position.views, cache)
        epoch, legs = epoch + 1, [(world, 0)]


def batches_apart(
    shards: str, val: str | None, config: Config, position: Position, digests: Mapping[str, str] | None = None
) -> Iterator[tuple[Batch, int]]:
    """What `batches` yields for these shards, made in a process of their own; its errors are raised here.

    `digests` say which versions of `shards` and `val` are meant; unset = the current ones.
    """
    feed = _Feed(shards, val, config, position, digests or {})
    # Spawned, not forked: a forked child has the locks of threads that it has not.
    for item in DataLoader(
        feed, batch_size=None, collate_fn=_alone, num_workers=1, prefetch_factor=AHEAD, multiprocessing_context="spawn"
    ):
        if isinstance(item, HHNetError):
            raise item
        yield item


class _Feed(IterableDataset[tuple[Batch, int] | HHNetError]):
    def __init__(
        self, shards: str, val: str | None, config: Config, position: Position, digests: Mapping[str, str]
    ) -> None:
        self._shards, self._val, self._config, self._position = shards, val, config, position
        self._digests = digests

    def __iter__(self) -> Iterator[tuple[Batch, int] | HHNetError]:
        try:
            val = open_shards(self._val, self._digests.get("val")) if self._val else None
            train_set = open_shards(self._shards, self._digests.get("shards"))
            yield from batches(TrainData.make(train_set, val, self._config), self._config, self._position)
        except HHNetError as error:
            yield error  # a loader would raise it with a traceback for its message


def _alone(item: Any) -> Any:
    """A batch comes whole."""
    return item
