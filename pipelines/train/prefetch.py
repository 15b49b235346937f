"""The batches of a training from a position on, made in this process or, for a GPU, in a process of their own.

The thread that launches a GPU's work needs the interpreter lock for each launch. Threads that decode in the same
process take the lock away from it: on an H200, HRNet-W18-small at 32 pixels fell from 12,000 to 4,000 images a second.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from pipelines.config.settings import Config
from pipelines.errors import HHNetError
from pipelines.train.batches import DecodedCache, Leg, TrainData, epoch_batches, epoch_leg
from pipelines.train.device_squares import DrawnBatch, SentSquares, drawn_batches
from pipelines.train.job import TrainJob
from pipelines.train.learner import Batch

B = TypeVar("B")

BATCHES_AHEAD = 8
"""Number of batches that are made ahead and wait for the GPU."""


@dataclass(frozen=True)
class Position:
    """The position of worker `rank` of `world`: the epoch and its legs as (workers, steps), up to the present one."""

    rank: int
    world: int
    views: int
    epoch: int
    legs: Sequence[tuple[int, int]]


Iterate = Callable[[TrainData, Config, Position], Iterator[tuple[B, int]]]
"""What yields the batches from a position to the end of a training: `iterate_batches` or `iterate_drawn`."""


def iterate_batches(data: TrainData, config: Config, position: Position) -> Iterator[tuple[Batch, int]]:
    """Yield (batch, number of samples that did not decode) for each step from `position` to the end of the training."""
    cache = DecodedCache(config.data.cache - data.val_bytes(config, position.world))
    for leg, first in _legs(data, config, position):
        yield from epoch_batches(leg, first, position.rank, position.views, cache)


def iterate_drawn(data: TrainData, config: Config, position: Position) -> Iterator[tuple[DrawnBatch, int]]:
    """Yield the batches of `iterate_batches` for a GPU that holds the decoded training set."""
    sent = SentSquares()
    for leg, first in _legs(data, config, position):
        yield from drawn_batches(leg, first, position.rank, position.views, sent)


def _legs(data: TrainData, config: Config, position: Position) -> Iterator[tuple[Leg, int]]:
    """Yield the legs from `position` to the end of the training, each with the steps of it that are done."""
    epoch, legs, world = position.epoch, position.legs, position.world
    while epoch < config.train.epochs:
        yield epoch_leg(data, config, epoch, legs[:-1], world), legs[-1][1]
        epoch, legs = epoch + 1, [(world, 0)]


def prefetch_batches(job: TrainJob, position: Position, iterate: Iterate[B]) -> Iterator[tuple[B, int]]:
    """Yield the items of `iterate` for a job, made in another process; raise its errors here."""
    # Spawned, not forked: a forked child inherits locks that are held by threads which it does not have.
    alone: dict[str, Any] = {"num_workers": 1, "prefetch_factor": BATCHES_AHEAD, "multiprocessing_context": "spawn"}
    for item in DataLoader(_Feed(job, position, iterate), batch_size=None, collate_fn=_alone, **alone):
        if isinstance(item, HHNetError):
            raise item
        yield item


class _Feed(IterableDataset[tuple[B, int] | HHNetError]):
    def __init__(self, job: TrainJob, position: Position, iterate: Iterate[B]) -> None:
        self._job, self._position, self._iterate = job, position, iterate

    def __iter__(self) -> Iterator[tuple[B, int] | HHNetError]:
        try:
            config = self._job.config
            yield from self._iterate(TrainData.make(*self._job.open_sets(), config), config, self._position)
        except HHNetError as error:
            yield error  # as an item: if it were raised, DataLoader would replace its message by a traceback


def _alone(item: Any) -> Any:
    """Return the item unchanged: it is a whole batch already."""
    return item
