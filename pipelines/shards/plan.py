"""The order of an epoch: the samples that each worker reads for each batch, computed from seed and epoch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

_T = TypeVar("_T")


def epoch_spans(
    rows: Sequence[npt.NDArray[np.int64]], seed: int, epoch: int, world: int, rank: int
) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Return the (shard, rows) pairs that `rank` of `world` reads in `epoch`; a pure function of its arguments.

    `rows[s]` lists the rows of shard s that take part. Shards are permuted and laid end to end, and each rank takes an
    equal stretch of that line (to within one sample). So two ranks share a shard only at a border, and every sample
    belongs to exactly one rank.
    """
    order = _generator(seed, epoch).permutation(len(rows))
    total = sum(len(part) for part in rows)
    first, last = rank * total // world, (rank + 1) * total // world
    spans = []
    start = 0
    for shard in order:
        stop = start + len(rows[shard])
        taken = rows[shard][max(first - start, 0) : max(last - start, 0)]
        if len(taken):
            spans.append((int(shard), taken))
        start = stop
    return spans


def batch_sizes(total: int, steps: int, world: int, rank: int) -> list[int]:
    """Return how many of `total` samples `rank` puts into each of `steps` steps, which all ranks take together.

    A rank's samples are spread over the steps as evenly as possible, so batches differ by at most one sample instead of
    leaving one small batch at the end.
    """
    mine = (rank + 1) * total // world - rank * total // world
    return [(step + 1) * mine // steps - step * mine // steps for step in range(steps)]


def mix_sources(
    sources: Iterable[Callable[[], Iterator[_T]]], interleave: int, buffer: int, key: tuple[int, ...]
) -> Iterator[_T]:
    """Draw from up to `interleave` sources at once through a shuffle buffer; the order depends on `key` alone."""
    random = _generator(*key)
    held: list[_T] = []
    for item in _interleaved(iter(sources), interleave, random):
        held.append(item)
        if len(held) >= buffer:
            yield _pop(held, random)
    while held:
        yield _pop(held, random)


def _interleaved(
    sources: Iterator[Callable[[], Iterator[_T]]], width: int, random: np.random.Generator
) -> Iterator[_T]:
    active: list[Iterator[_T]] = []
    exhausted = False
    while True:
        while len(active) < width and not exhausted:
            source = next(sources, None)
            exhausted = source is None
            if source is not None:
                active.append(source())
        if not active:
            return
        chosen = int(random.integers(len(active)))
        try:
            yield next(active[chosen])
        except StopIteration:
            active.pop(chosen)


def _pop(held: list[_T], random: np.random.Generator) -> _T:
    place = int(random.integers(len(held)))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


def _generator(*key: int) -> np.random.Generator:
    # SeedSequence mixes the numbers of the key, so neighbouring seeds and epochs give unrelated orders.
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
